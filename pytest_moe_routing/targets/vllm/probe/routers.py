"""Runs the routers of one release of vLLM on a CPU, and compares them with the model's router.

It is run by `targets.server` with the arguments ROOT FLASHINFER VERSION PLATFORM, and answers for
one platform, `cuda` or `cpu`. vLLM's factory chooses the router; its Python code runs as it is, and
in the place of a compiled operator runs what the operator is for (`targets.vllm.operators`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import chain
from operator import attrgetter
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.oracle.own_router import reading_of
from pytest_moe_routing.oracle.routers import Output
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.vllm import operators
from pytest_moe_routing.targets.vllm.probe import factory, release
from pytest_moe_routing.targets.vllm.probe.gate_linear import gate_cases
from pytest_moe_routing.targets.vllm.probe.ranks import Off
from pytest_moe_routing.targets.vllm.probe.router_case import (
    Case,
    LayerMethod,
    SelectExperts,
    compare,
    select,
)
from pytest_moe_routing.targets.vllm.probe.router_configs import cases

#: Row of the contract for the switch between `grouped_topk`'s compiled and torch paths.
_FUSED_GROUPED = "router-switches.VLLM_USE_FUSED_MOE_GROUPED_TOPK"
#: Rows of the contract for packages of models, whose routing functions are run.
_MODELS = ("router-models", "router-models-packages")


class _Cpu:
    """The platform object of vLLM's CPU build."""

    device_name = device_type = "cpu"
    dispatch_key = "CPU"
    simple_compile_backend = "eager"

    def is_cpu(self) -> bool:
        return True

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def __getattr__(self, name: str) -> Any:
        if name.startswith(("is_", "has_", "supports_")):
            return lambda *_, **__: False
        raise AttributeError(name)


class _TritonKernel:
    """A function under `triton.jit`, which no CPU runs."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = function.__name__

    def __getitem__(self, grid: Any) -> Any:
        raise Unsupported(f"{self._name} is a Triton kernel, which runs only on a GPU")


class Routers:
    """Answers for one platform."""

    def __init__(self, root: str, flashinfer: FlashInfer, version: str, platform: str) -> None:
        self.platform = platform
        #: Models that share a router share its runs.
        self._compared: dict[Any, list[dict[str, Any]]] = {}
        release.install(root, flashinfer, version)
        self.names = release.names()
        self._enter = cache(self._stand_in)

    def _stand_in(self) -> None:
        """Put stand-ins in the place of what lies around the routers.

        Raises:
            Unsupported: The release does not have a name that the routers' runs need.
        """
        self.names.require("routers")
        models = [self.names.spelling(key).module for key in _MODELS if self.names.has(key)]
        stubs.extend(real=models, absent=["transformers"])
        for key, value in stand_ins(self.platform).items():
            if self.names.has(key):
                spelling = self.names.spelling(key)
                setattr(import_module(spelling.module), spelling.path, value)
        if self.names.has("router-triton"):
            triton = self.names.spelling("router-triton")
            getattr(import_module(triton.module), triton.path).jit = _TritonKernel

    def run(self, model: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Route for a model, in every way that this platform has.

        Raises:
            Unsupported: The release has no such architecture, or nothing can be compared.
        """
        self._enter()
        router = RouterConfig(**model["router"])
        if not release.sources().has_architecture(model["architecture"]):
            raise Unsupported(f"this release has no {model['architecture']}")
        if router.not_expressible is not None:
            raise Unsupported(f"no recipe computes the router: {router.not_expressible}")
        recipe = replace(recipe_of(router), scale=release.router_factor(model), weight_on="output")
        function = self._routing_function(model)
        if function is not None:
            # The layer applies no factor to what such a function returns.
            recipe = replace(recipe, scale=1.0)
        made = self._made(model, None, function)
        key = type(made).__name__, recipe, router.num_experts, router.logits_dtype, function
        if key not in self._compared:
            self._compared[key] = [
                compare(
                    Case(
                        self._maker(model, function),
                        *(recipe, router.num_experts, dtype, way, "", reach, switches),
                    ),
                    self.output,
                )
                for way, reach, switches, dtype in self._ways(made, router.logits_dtype)
            ]
        return [{**run, "subject": model["id"]} for run in self._compared[key]]

    def _maker(self, model: Mapping[str, Any], function: Any) -> Callable[[Tensor | None], Any]:
        """Return what gives a bias to a model's router, which is made once, as on a server."""
        router = cache(lambda: self._made(model, None, function))

        def make(bias: Tensor | None) -> Any:
            if bias is not None:
                router().e_score_correction_bias = bias
            return router()

        return make

    def _made(self, model: Mapping[str, Any], bias: Tensor | None, function: Any) -> Any:
        """Return a model's router, with a bias of ours and the routing function of its code."""
        with patch.object(release, "routing_function_of", lambda _: function):
            made = self._make(model)
        if bias is not None:
            made.e_score_correction_bias = bias
        return made

    def _make(self, model: Mapping[str, Any]) -> Any:
        """Return the router of a model's layer: an object, or a function of an older release."""
        key = "router-function-cpu" if self.platform == "cpu" else "router-function"
        if self.names.expects(key):
            return SelectExperts(key, release.router_arguments(model))
        if self.platform == "cuda" and self.names.expects("router-method"):
            return LayerMethod(release.router_arguments(model))
        return factory.router_of(model)

    def run_other(self) -> list[dict[str, Any]]:
        """Route in every configuration that the factory takes and no model of the zoo has.

        Raises:
            Unsupported: The release does not have a name that the routers' runs need.
        """
        self._enter()
        if self.platform == "cpu" or not self.names.has("router-factory"):
            return []
        every = chain(cases(self.names), gate_cases())
        return [compare(case, self.output) for case in every]

    def read(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the factory's router has otherwise than the config of a model.

        Raises:
            Unsupported: There is no such router, or it computes something else.
        """
        self._enter()
        function = self._routing_function(model)

        def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            return select(self._made(model, bias, function), logits)

        return dict(reading_of(route, RouterConfig(**model["router"])))

    @property
    def output(self) -> Output:
        """What fused experts take; the CPU's read int32 ids in memory order."""
        return Output(ids=("int32",), contiguous=True) if self.platform == "cpu" else Output()

    def _ways(
        self, router: Any, dtype: str
    ) -> Iterator[tuple[str, str, Mapping[str, str], torch.dtype]]:
        """Ways in which the factory's router may compute otherwise, and who goes them."""
        has_switch = not isinstance(router, SelectExperts) and isinstance(
            router, self.names.get("router-grouped")
        )
        switch = self.names.spelling(_FUSED_GROUPED).path if has_switch else ""
        for value, suffix in (("1", ""), ("0", f", {switch}=0")) if has_switch else (("1", ""),):
            way, switches = self.platform + suffix, {switch: value} if has_switch else {}
            only = "opt-in" if suffix else "on a CPU" if self.platform == "cpu" else ""
            yield way, only or "model", switches, getattr(torch, dtype)
            if dtype == "float32":
                reach = only or "bfloat16 logits"
                yield f"{way}, with bfloat16 logits", reach, switches, torch.bfloat16

    def _routing_function(self, model: Mapping[str, Any]) -> Any:
        """Return the routing function that the model's code gives to its layer, itself."""
        found = release.sources().routing_function(release.architecture_of(model))
        if found is None:
            return None
        module, name = found
        try:
            return attrgetter(name)(stubs.real_module(module))
        except AttributeError:
            raise Unsupported(f"{module}.{name} cannot run on its own") from None


def stand_ins(platform: str) -> dict[str, Any]:
    """Return replacements of vLLM's own functions around its routers, by key of the contract."""
    values: dict[str, Any] = {
        f"router-operators.{name}": f for name, f in operators.in_torch(platform).items()
    }
    values |= {
        "router-aiter": Off(),
        "router-context": lambda: False,
        "router-batches": lambda: False,
        "router-logger": lambda _: stubs.Stub("logger"),
    }
    return {**values, "current-platform": _Cpu()} if platform == "cpu" else values


def handlers(
    root: str, flashinfer: str, version: str, platform: str
) -> dict[str, Callable[..., Any]]:
    """Install a vLLM in this process, and return what answers questions about its routers."""
    routers = Routers(root, FlashInfer.of(flashinfer), version, platform)
    return {"run": routers.run, "run_other": routers.run_other, "read": routers.read}


def main() -> None:
    serve(handlers(*sys.argv[1:]), "vllm")
