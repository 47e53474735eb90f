"""One release of vLLM, imported to be asked as if it ran on a Blackwell GPU.

FlashInfer is a recorder with the entry points of one release, so whether vLLM finds it good enough
is asked for real. A model is what `ModelSpec.as_dict` says; an opt-in switch that a scheme needs
counts as switched on.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from operator import attrgetter
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets import recorder, stubs
from pytest_moe_routing.targets.vllm.probe.experts import MOE, QUANTIZATION, SCHEMES
from pytest_moe_routing.targets.vllm.probe.models import (
    has_architecture,
    routing_function,
    scales_output,
)

_root = ""
#: Opt-in switches of vLLM, all on.
_SWITCHES = {
    "VLLM_USE_FLASHINFER_MOE_INT4": "1",
    "VLLM_USE_FLASHINFER_MOE_FP4": "1",
    "VLLM_USE_FLASHINFER_MOE_FP8": "1",
    "VLLM_USE_FLASHINFER_MOE_FP16": "1",
}
_REAL = (
    MOE,
    *(
        f"{QUANTIZATION}.utils.{name}"
        for name in (
            "quant_utils",
            "flashinfer_utils",
            "flashinfer_fp4_moe",
            "flashinfer_mxint4_moe",
        )
    ),
    *dict.fromkeys(
        f"{QUANTIZATION}.{module}"
        for scheme in SCHEMES.values()
        for module, _ in scheme.methods
        if not module.startswith(".")
    ),
    "vllm.scalar_type",
    "vllm.utils.flashinfer",
    "vllm.utils.math_utils",
    "vllm.envs",
)
#: Third-party packages that vLLM's modules import and that do not matter here. Others that are
#: missing are found out, one import after the other.
_ABSENT = (
    "flashinfer",
    "flashinfer_cubin",
    "aiter",
    "compressed_tensors",
    "cutlass",
    "deep_gemm",
    "regex",
    "requests",
    "vllm_flash_attn",
)


class _Blackwell:
    """The platform object on one of the Blackwell family; no to every other question."""

    device_name = "Blackwell"
    device_type = "cuda"
    simple_compile_backend = "eager"

    def is_cuda(self) -> bool:
        return True

    is_cuda_alike = is_cuda

    def is_device_capability_family(self, family: int, *_: Any) -> bool:
        return family == 100

    def is_device_capability(self, capability: Any, *_: Any) -> bool:
        return capability in (100, (10, 0))

    def has_device_capability(self, capability: Any, *_: Any) -> bool:
        return bool(
            (capability if isinstance(capability, tuple) else divmod(capability, 10)) <= (10, 0)
        )

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("is_", "has_", "supports_")):
            return lambda *_, **__: False
        raise AttributeError(name)


def _fp8(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    return x.to(torch.float8_e4m3fn), torch.ones(len(x), 1)


def _fp4(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    tokens, size = x.shape
    scales = torch.zeros(tokens, size // 16, dtype=torch.uint8)
    return torch.zeros(tokens, size // 2, dtype=torch.uint8), scales


#: Quantization of activations, as to shape and dtype: it needs a GPU, and its values do not matter.
_QUANTIZERS = {
    "per_token_group_quant_fp8": _fp8,
    "scaled_fp8_quant": _fp8,
    "scaled_fp4_quant": _fp4,
}


def _register(op_name: str, op_func: Any, *_: Any, **__: Any) -> None:
    """Call a custom operator as the plain function that it is made of."""
    setattr(torch.ops.vllm, op_name, op_func)


def install(root: str, flashinfer: FlashInfer) -> None:
    """Make `vllm` importable from `root`, on a platform and beside a FlashInfer of our own."""
    global _root
    _root = root
    os.environ.update(_SWITCHES)
    stubs.install("vllm", root, real=_REAL, absent=_ABSENT)
    recorder.install(flashinfer)
    import_module("vllm.platforms").current_platform = _Blackwell()  # type: ignore[attr-defined]
    operators = import_module("vllm.utils.torch_utils")
    operators.direct_register_custom_op = _register  # type: ignore[attr-defined]
    for module in ("vllm._custom_ops", f"{QUANTIZATION}.utils.fp8_utils"):
        vars(import_module(module)).update(_QUANTIZERS)


def real(module: str) -> ModuleType:
    """A module of vLLM.

    Raises:
        Unsupported: This release has none.
    """
    try:
        return stubs.real_module(module)
    except ModuleNotFoundError as error:
        if not module.startswith(error.name or "-"):
            raise
        raise Unsupported(f"this release has no {module}") from None


def accepted(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that this release's function takes."""
    known = inspect.signature(function).parameters
    return {name: value for name, value in arguments.items() if name in known}


@cache
def config() -> ModuleType:
    return real(f"{MOE}.config")


def numbers() -> dict[str, int]:
    """Number of each routing method."""
    return {member.name: int(member) for member in config().RoutingMethodType}


def router_factor(model: Mapping[str, Any]) -> float:
    """The scaling factor that the layer's router gets: 1 when the output is scaled elsewhere."""
    factor: float = model["router"]["routed_scaling_factor"]
    return 1.0 if factor != 1.0 and scales_output(_root, model["architecture"]) else factor


def make_router(model: Mapping[str, Any]) -> Any:
    """What vLLM's factory makes of the arguments that the model's own code passes."""
    router = model["router"]
    bias = None
    if router["correction_bias"] is not None:
        bias = torch.zeros(router["num_experts"], dtype=getattr(torch, router["correction_bias"]))
    factory = real(f"{MOE}.router.router_factory").create_fused_moe_router
    return factory(
        top_k=router["top_k"],
        global_num_experts=router["num_experts"],
        renormalize=router["renormalize"],
        use_grouped_topk=router["n_group"] is not None,
        num_expert_group=router["n_group"],
        topk_group=router["topk_group"],
        scoring_func=router["scoring_func"],
        routed_scaling_factor=router_factor(model),
        e_score_correction_bias=bias,
        custom_routing_function=routing_function_of(model),
        **accepted(factory, {"eplb_state": None}),
    )


def routing_function_of(model: Mapping[str, Any]) -> Any:
    """The routing function that the model's code gives to the layer, as a stub.

    The router recognises the function itself, as an attribute of its module, and never runs it.
    """
    found = routing_function(_root, model["architecture"])
    return found and attrgetter(found[1])(import_module(found[0]))


def classify(model: Mapping[str, Any]) -> list[str]:
    """The method that the model's router says it is, and how it came to that."""
    router = make_router(model)
    architecture = model["architecture"]
    path = [f"{type(router).__name__}.routing_method_type"]
    if not has_architecture(_root, architecture):
        path.insert(0, f"no {architecture} in this release, so by the config alone")
    return [router.routing_method_type.name, *path]
