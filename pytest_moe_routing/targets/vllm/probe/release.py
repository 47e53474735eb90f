"""One release of vLLM, imported to be asked as if it ran on a Blackwell GPU.

FlashInfer is a recorder with the entry points of one release, so whether vLLM finds it good enough
is asked for real. A model is what `ModelSpec.as_dict` says; an opt-in switch that a scheme needs
counts as switched on.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets import recorder, stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.vllm.probe.models import ModelSources

# One release per process: vLLM's modules are global as well.
_names: Names | None = None
_sources: ModelSources | None = None


class _Blackwell:
    """The platform object on one of the Blackwell family; no to every other question."""

    device_name = "Blackwell"
    device_type = "cuda"
    dispatch_key = "CUDA"
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


def _mxfp8(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    scales = torch.zeros(len(x), x.shape[1] // 32, dtype=torch.uint8)
    return x.to(torch.float8_e4m3fn), scales


#: Quantization of activations, as to shape and dtype: it needs a GPU, and its values do not matter.
#: By key of the contract.
_QUANTIZERS = {
    "quantizers-groups": _fp8,
    "quantizers-mxfp8": _mxfp8,
    "quantizers.scaled_fp8_quant": _fp8,
    "quantizers.scaled_fp4_quant": _fp4,
}


def _register(op_name: str, op_func: Any, *_: Any, **__: Any) -> None:
    """Call a custom operator as the plain function that it is made of."""
    setattr(torch.ops.vllm, op_name, op_func)


def install(root: str, flashinfer: FlashInfer, version: str) -> None:
    """Make `vllm` importable from `root`, on a platform and with a FlashInfer of our own."""
    global _names, _sources
    contract = Contract.of("vllm")
    definitions = stubs.definitions("vllm", root)
    _names = Names(contract, version, definitions, stubs.real_module)
    _sources = ModelSources(_names, root)
    os.environ.update({row.key.rpartition(".")[2]: "1" for row in contract.members("switches")})
    stubs.install(contract, root)
    recorder.install(flashinfer)
    for key, value in (
        ("current-platform", _Blackwell()),
        ("custom-operators", _register),
        *_QUANTIZERS.items(),
    ):
        if _names.is_there(key):
            spelling = _names.spelling(key)
            setattr(import_module(spelling.module), spelling.path, value)


def names() -> Names:
    """Return the contract's names in this release."""
    assert _names is not None
    return _names


def sources() -> ModelSources:
    """Return the code of this release's models."""
    assert _sources is not None
    return _sources


def accepted(function: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of the arguments that a function asks for.

    Raises:
        Unsupported: It asks for one that is not among them.
    """
    known = inspect.signature(function).parameters.values()
    unknown = [
        p.name
        for p in known
        if p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        and p.name not in arguments
    ]
    if unknown:
        raise Unsupported(
            f"not judged: {function.__qualname__} of vLLM {names().version} asks for "
            f"{', '.join(unknown)}, which the probe does not know"
        )
    return {p.name: arguments[p.name] for p in known if p.name in arguments}


def numbers() -> dict[str, int]:
    """Return the number of each routing method."""
    names().require("numbers")
    return {member.name: int(member) for member in names().get("methods")}


def architecture_of(model: Mapping[str, Any]) -> str:
    """Return the architecture whose code makes the model's MoE layer."""
    return sources().maker([model["architecture"], *model.get("architectures", ())])


def router_factor(model: Mapping[str, Any]) -> float:
    """Return the scaling factor of the layer's router: 1 when the output is scaled elsewhere."""
    factor: float = model["router"]["routed_scaling_factor"]
    return 1.0 if factor != 1.0 and sources().scales_output(architecture_of(model)) else factor


def make_router(model: Mapping[str, Any]) -> Any:
    """Return what vLLM's factory makes of the arguments that the model's own code passes."""
    arguments = router_arguments(model)
    return names().get("router-factory")(**names().accepted("router-factory", arguments))


def router_arguments(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model's own code says of its router, in the words of vLLM."""
    router = model["router"]
    bias = None
    if router["correction_bias"] is not None:
        bias = torch.zeros(router["num_experts"], dtype=getattr(torch, router["correction_bias"]))
    return {
        "top_k": router["top_k"],
        "global_num_experts": router["num_experts"],
        "renormalize": router["renormalize"],
        "use_grouped_topk": router["n_group"] is not None,
        "num_expert_group": router["n_group"],
        "topk_group": router["topk_group"],
        "scoring_func": router["scoring_func"],
        "routed_scaling_factor": router_factor(model),
        "e_score_correction_bias": bias,
        "custom_routing_function": routing_function_of(model),
        "eplb_state": None,
        **sources().groups(architecture_of(model)),
    }


def routing_function_of(model: Mapping[str, Any]) -> Any:
    """Return the routing function that the model's code gives to the layer, as a stub.

    The router recognizes the function itself, as an attribute of its module, and never runs it.
    """
    found = sources().routing_function(architecture_of(model))
    return found and attrgetter(found[1])(import_module(found[0]))


def classify(model: Mapping[str, Any]) -> list[str]:
    """Return the method that the model's router says it is, and how it came to that."""
    names().require("verdicts")
    router = make_router(model)
    architecture = model["architecture"]
    path = [f"{type(router).__name__}.routing_method_type"]
    if not sources().has_architecture(architecture):
        path.insert(0, f"no {architecture} in this release, so by the config alone")
    return [router.routing_method_type.name, *path]
