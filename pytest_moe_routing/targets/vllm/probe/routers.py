"""Runs the routers of one release of vLLM on a CPU, and compares them with the model's router.

`python -m pytest_moe_routing.targets.vllm.probe.routers ROOT FLASHINFER PLATFORM` answers for one
platform, `cuda` or `cpu`. vLLM's factory chooses the router; its Python code runs as it is, and in
the place of a compiled operator runs what the operator is for (`targets.vllm.operators`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.oracle.routers import Output
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.vllm import operators
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.probe.experts import MOE
from pytest_moe_routing.targets.vllm.probe.models import has_architecture, routing_function
from pytest_moe_routing.targets.vllm.probe.router_case import Case, compare
from pytest_moe_routing.targets.vllm.probe.router_configs import cases

_ROUTER = f"{MOE}.router"
#: The switch between `grouped_topk`'s compiled and torch paths.
_FUSED_GROUPED = "VLLM_USE_FUSED_MOE_GROUPED_TOPK"
_MODELS = ("vllm.model_executor.models", "vllm.models")


class _Cpu:
    """The platform object of vLLM's CPU build."""

    device_name = device_type = "cpu"
    simple_compile_backend = "eager"

    def is_cpu(self) -> bool:
        return True

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("is_", "has_", "supports_")):
            return lambda *_, **__: False
        raise AttributeError(name)


class _Off:
    """vLLM's AITER operators where there is no AITER: none is enabled."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: False


class _TritonKernel:
    """A function under `triton.jit`, which no CPU runs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = function.__name__

    def __getitem__(self, grid: Any) -> Any:
        raise Unsupported(f"{self._name} is a Triton kernel, which runs on a GPU alone")


class Routers:
    """Answers for one platform."""

    def __init__(self, root: str, flashinfer: FlashInfer, platform: str) -> None:
        self.root, self.platform = root, platform
        #: Models that share a router share its runs.
        self._compared: dict[Any, list[dict[str, Any]]] = {}
        torch.compile = lambda f=None, *_, **__: f or (lambda g: g)  # type: ignore[assignment]
        release.install(root, flashinfer)
        stubs.extend(real=_MODELS, absent=["transformers"])
        if platform == "cpu":
            import_module("vllm.platforms").current_platform = _Cpu()  # type: ignore[attr-defined]
        stand_ins = {
            "vllm._custom_ops": operators.in_torch(platform),
            "vllm._aiter_ops": {"rocm_aiter_ops": _Off()},
            "vllm.forward_context": {"is_forward_context_available": lambda: False},
            "vllm.logger": {"init_logger": lambda _: stubs.Stub("logger")},
        }
        for module, members in stand_ins.items():
            vars(import_module(module)).update(members)
        import_module("vllm.triton_utils").triton.jit = _TritonKernel

    def run(self, model: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Route for a model, in every way that this platform has.

        Raises:
            Unsupported: The release has no such architecture, or nothing can be compared.
        """
        router = RouterConfig(**model["router"])
        if not has_architecture(self.root, model["architecture"]):
            raise Unsupported(f"this release has no {model['architecture']}")
        if router.not_expressible is not None:
            raise Unsupported(f"no recipe computes the router: {router.not_expressible}")
        recipe = replace(recipe_of(router), scale=release.router_factor(model), weight_on="output")
        function = self._routing_function(model)
        if function is not None:
            # The layer applies no factor to what such a function returns.
            recipe = replace(recipe, scale=1.0)

        def make(bias: Tensor | None) -> Any:
            with patch.object(release, "routing_function_of", lambda _: function):
                made = release.make_router(model)
            if bias is not None:
                made.e_score_correction_bias = bias
            return made

        made = make(None)
        key = type(made).__name__, recipe, router.num_experts, router.logits_dtype, function
        if key not in self._compared:
            self._compared[key] = [
                compare(
                    Case(make, recipe, router.num_experts, dtype, way, "", reach, switches),
                    self.output,
                )
                for way, reach, switches, dtype in self._ways(made, router.logits_dtype)
            ]
        return [{**run, "subject": model["id"]} for run in self._compared[key]]

    def run_other(self) -> list[dict[str, Any]]:
        """Route in every configuration that the factory takes and no model of the zoo has."""
        if self.platform == "cpu":
            return []
        return [compare(case, self.output) for case in cases(self.root)]

    @property
    def output(self) -> Output:
        """What fused experts take; the CPU's read int32 ids in memory order."""
        return Output(ids=("int32",), contiguous=True) if self.platform == "cpu" else Output()

    def _ways(
        self, router: Any, dtype: str
    ) -> Iterator[tuple[str, str, Mapping[str, str], torch.dtype]]:
        """Ways in which the factory's router may compute otherwise, and who goes them."""
        has_switch = type(router).__name__ == "GroupedTopKRouter"
        for value, suffix in (
            (("1", ""), ("0", f", {_FUSED_GROUPED}=0")) if has_switch else (("1", ""),)
        ):
            way, switches = self.platform + suffix, {_FUSED_GROUPED: value}
            yield way, "opt-in" if suffix else "model", switches, getattr(torch, dtype)
            if dtype == "float32":
                reach = "opt-in" if suffix else "bfloat16 logits"
                yield f"{way}, handed bfloat16 logits", reach, switches, torch.bfloat16

    def _routing_function(self, model: Mapping[str, Any]) -> Any:
        """The routing function that the model's code gives to its layer, itself."""
        found = routing_function(self.root, model["architecture"])
        if found is None:
            return None
        value: Any = release.real(found[0])
        for name in found[1].split("."):
            value = getattr(value, name, None)
        if value is None:
            raise Unsupported(f"{found[0]}.{found[1]} is no function that can be run alone")
        return value


def main() -> None:
    root, flashinfer, platform = sys.argv[1:]
    routers = Routers(root, FlashInfer.of(flashinfer), platform)
    serve({"run": routers.run, "run_other": routers.run_other})


if __name__ == "__main__":
    main()
