"""Runs the routers of one release of SGLang on a CPU, and compares them with the model's router.

It is run by `targets.server` with the arguments ROOT FLASHINFER VERSION. A model's own MoE block
makes the TopK, as on CUDA with the Triton runner; SGLang's Python code runs as it is, and in the
place of a compiled or Triton kernel runs what it is for (`targets.sglang.kernels`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.oracle.own_router import reading_of
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.sglang import kernels
from pytest_moe_routing.targets.sglang.probe import main as blocks
from pytest_moe_routing.targets.sglang.probe.old_routers import OldRouters
from pytest_moe_routing.targets.sglang.probe.router_case import (
    HIDDEN,
    Case,
    compare,
    exact,
    function_of,
    give_bias,
    rest,
    runs_of,
    values_of,
)
from pytest_moe_routing.targets.sglang.probe.router_configs import cases
from pytest_moe_routing.targets.sglang.probe.world import choose_runner
from pytest_moe_routing.targets.stubs import source_of

#: Rows of the contract for the kernels that run in torch.
_KERNELS = ("router-kernels-gate", "router-kernels-softmax", "router-kernels-sigmoid")


class Routers(blocks.Blocks):
    """Answers about the routers of one release's models."""

    def __init__(self, root: str, flashinfer: FlashInfer, version: str) -> None:
        super().__init__(root, flashinfer, version)
        self.root = root
        self._compared: dict[str, list[dict[str, Any]]] = {}
        self._enter_torch = cache(self._stand_in)

    def _stand_in(self) -> None:
        """Enter the world, with kernels that a CPU runs.

        Raises:
            Unsupported: The release does not have a name that the routers' runs need.
        """
        self.names.require("routers")
        for key in _KERNELS:
            # Older releases have others.
            self.names.spelling(key)
        combine = self.names.spelling("router-combine").module
        if "moe_runner_config.routed_scaling_factor" not in source_of(self.root, combine):
            raise Unsupported(
                "the factor by which this release's Triton runner multiplies its output "
                "is not known"
            )
        self._enter()
        _choose_triton(self.names)
        importlib.reload(_with_kernels(self.names, self.root))

    def run(self, model: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Route for a model by the TopK that its block makes, in every way that there is.

        Raises:
            Unsupported: The release has no such architecture, or its block cannot be built here.
        """
        self._enter_torch()
        return runs_of(self._compared, model, config, self._routed)

    def read(self, model: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the TopK of a model's block computes otherwise than the model's config.

        Raises:
            Unsupported: The release has no such architecture, its block cannot be built here, or
                its code has other experts than the config.
        """
        self._enter_torch()
        if model["dtype"] != "bfloat16":
            raise Unsupported("models are run only in bfloat16")
        seen = blocks._Seen()
        topk, factor = self._built(
            model["architecture"], values_of(model["architecture"], config), seen
        )
        (layer,) = seen.made
        told = layer.moe_runner_config
        experts = model["experts"]
        limit = told.gemm1_clamp_limit or told.swiglu_limit
        asked = experts["activation"], experts["activation_limit"], experts["gated"]
        if (told.activation, limit, told.is_gated) != asked:
            raise Unsupported(f"{seen.layers[0][1]} has other experts than the config")

        def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            give_bias(topk.topk_config, bias)
            hidden = torch.zeros(len(logits), HIDDEN, dtype=torch.bfloat16)
            output = topk.forward_cuda(hidden, logits)
            return output.topk_weights * exact(factor, scale), output.topk_ids

        router = RouterConfig(**model["router"])
        scale = router.routed_scaling_factor
        return dict(reading_of(route, router))

    def layer_request(self, architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a model's block asks of its TopK, and what goes around it.

        Raises:
            Unsupported: The release has no such architecture, or its block cannot be built here, or
                a function of its own routes.
        """
        self._enter_torch()
        seen = blocks._Seen()
        topk, factor = self._built(architecture, values_of(architecture, config), seen)
        asked, bias = topk.topk_config, topk.topk_config.correction_bias
        if asked.custom_routing_function is not None:
            raise Unsupported("the model has its own routing function, which test_router covers")
        scaled = asked.apply_routed_scaling_factor_on_output
        names = ("top_k", "use_grouped_topk", "num_expert_group", "topk_group", "renormalize")
        return {
            "block": seen.layers[0][1],
            **{name: getattr(asked, name) for name in names},
            "scoring_func": asked.scoring_func,
            "routed_scaling_factor": asked.routed_scaling_factor if scaled else None,
            "bias_dtype": None if bias is None else _dtype(bias),
            "logits_dtype": _dtype(seen.logits[0]),
            "gate_dtypes": sorted(seen.gates),
            "on_input": seen.on_input,
            "output_factor": factor,
        }

    def run_other(self) -> list[dict[str, Any]]:
        """Route by functions that no model of the zoo reaches on CUDA.

        Raises:
            Unsupported: The release does not have a name that the routers' runs need.
        """
        self._enter_torch()
        return [compare(case) for case in cases(self.names)]

    def _routed(
        self, architecture: str, values: Mapping[str, Any], router: RouterConfig
    ) -> Iterator[dict[str, Any]]:
        recipe = replace(recipe_of(router), weight_on="output")
        dtype = getattr(torch, router.logits_dtype)
        topk, factor = self._built(architecture, values)
        recipe = replace(recipe, scale=rest(recipe.scale, factor))
        case = Case(topk.forward_cuda, topk.topk_config, recipe, router.num_experts, dtype)
        yield compare(case)
        if router.logits_dtype == "float32":
            way = "cuda, with bfloat16 logits"
            yield compare(replace(case, dtype=torch.bfloat16, way=way, reach="bfloat16 logits"))
        way = "--enable-torch-compile, one token"
        yield compare(replace(case, forward=topk.forward_native, way=way, reach="opt-in"))
        shared = values.get("n_shared_experts")
        if shared == 1 and self._fuses_shared_experts(architecture):
            with _shared_experts(self.names, 1):
                topk, factor = self._built(architecture, values)
                recipe = replace(recipe_of(router), weight_on="output")
                case = Case(
                    topk.forward_cuda,
                    topk.topk_config,
                    replace(recipe, scale=rest(recipe.scale, factor)),
                    router.num_experts,
                    dtype,
                    way="cuda, shared experts fused",
                    # Where ranks sum their outputs, the model's code divides it among them.
                    shared_weight=(topk.topk_config.fused_shared_experts_scaling_factor or 1)
                    / factor,
                )
                yield compare(case)
                way = "--enable-torch-compile, one token, shared experts fused"
                yield compare(replace(case, forward=topk.forward_native, way=way, reach="opt-in"))

    def _fuses_shared_experts(self, architecture: str) -> bool:
        """Whether the block's module can put its shared expert among the routed ones."""
        if not self.names.has("router-shared-experts"):
            return False
        module = self.sources.blocks(architecture)[0][0]
        count = self.names.spelling("router-shared-experts-count").path
        return f"{count}()" in self.sources.source(module)

    def _built(
        self, architecture: str, config: Mapping[str, Any], seen: blocks._Seen | None = None
    ) -> tuple[Any, float]:
        """Return the TopK of a model's block, and the factor on the weights behind it."""
        module, name, given = self.sources.blocks(architecture)[0]
        seen = seen or blocks._Seen()
        try:
            with (
                patch.object(blocks, "_SIZE", HIDDEN),
                blocks._watching(self.names, seen),
                torch.no_grad(),
                _experts_give_weights(self.names, seen),
            ):
                block = blocks._build(self.names, module, name, given, config, None)
                blocks._fill(block, seen, config)
                _note_gates(block, seen, config["num_experts"])
                output = blocks._forward(block, config["num_experts"])
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{name} cannot be built and run here: {text}") from error
        if len(seen.topks) != 1:
            raise Unsupported(f"{name} makes {len(seen.topks)} TopK layers, not one")
        values = output.float().unique().tolist()
        if len(values) != 1:
            raise Unsupported(f"{name} does more than scale what its experts give")
        return seen.topks[0], values[0]


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _note_gates(block: nn.Module, seen: blocks._Seen, num_experts: int) -> None:
    """Note the dtypes in which the block's modules give router logits, while it runs."""

    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor) and first.shape[-1] == num_experts:
            seen.gates.add(_dtype(first))

    for module in block.modules():
        module.register_forward_hook(note)


def _choose_triton(names: Names) -> None:
    """SGLang's own routing on CUDA, with the Triton runner, and nothing else."""
    choose_runner(names.get("router-runner.TRITON").value)


def stand_ins() -> dict[str, Any]:
    """Return replacements of SGLang's own functions around its routers, by key of the contract."""
    return {
        # No remapping of experts.
        "router-placement.topk_ids_logical_to_physical": lambda ids, *_: ids,
        "router-placement.transform_select_experts_inputs": (
            lambda router_logits, correction_bias, **_: (router_logits, correction_bias)
        ),
        "router-capturer": lambda: None,
        "router-context": lambda: False,
    }


def _with_kernels(names: Names, root: str) -> ModuleType:
    """Return the module of TopK, which the world has changed, with kernels that a CPU runs."""
    for module, members in kernels.in_torch().items():
        vars(import_module(module)).update(members)
    for key, value in stand_ins().items():
        spelling = names.spelling(key)
        setattr(import_module(spelling.module), spelling.path, value)
    fast = names.spelling("router-fast-topk")
    for module in (fast.module, fast.module.rpartition(".")[0]):
        setattr(import_module(module), fast.path, function_of(root, fast.module, fast.path))
    return stubs.real_module(names.spelling("topk").module)


@contextmanager
def _experts_give_weights(names: Names, seen: blocks._Seen) -> Iterator[None]:
    """Let TopK weigh all 1, and every MoE layer return that, times what its runner multiplies."""

    def forward(self: Any, hidden_states: Tensor, topk_output: Any = None, **_: Any) -> Tensor:
        factor = self.moe_runner_config.routed_scaling_factor
        weight = float(topk_output.topk_weights.flatten()[0])
        return torch.full_like(hidden_states, weight * (1.0 if factor is None else factor)).float()

    def route(self: Any, hidden_states: Tensor, router_logits: Any, *_: Any, **__: Any) -> Any:
        seen.logits.append(router_logits)
        shape = len(hidden_states), self.topk_config.top_k
        ids, weights = torch.zeros(shape, dtype=torch.int32), torch.ones(shape)
        return names.get("router-output")(weights, ids, None)

    with (
        patch.object(names.get("router-layer"), "forward", forward),
        patch.object(names.get("topk"), "forward_cuda", route),
    ):
        yield


@contextmanager
def _shared_experts(names: Names, count: int) -> Iterator[None]:
    """Let models put so many shared experts among the routed ones."""
    shared = names.get("router-shared-experts")()
    shared.num_fused_shared_experts = count
    model = stubs.known("model", shared_experts=shared)
    getter = names.spelling("stand-ins.context.get_model").path
    readers = [
        m for name, m in sys.modules.items() if name.startswith("sglang.") and getter in vars(m)
    ]
    with ExitStack() as stack:
        for module in readers:
            stack.enter_context(patch.dict(vars(module), {getter: lambda: model}))
        yield


def handlers(root: str, flashinfer: str, version: str) -> dict[str, Callable[..., Any]]:
    """Return what answers questions about the routers of an SGLang."""
    routers = Routers(root, FlashInfer.of(flashinfer), version)
    is_old = not routers.names.expects("router-kernels-gate")
    runs = OldRouters(root, version) if is_old else routers
    return {
        "run": runs.run,
        "run_other": runs.run_other,
        "read": routers.read,
        "layer_request": routers.layer_request,
    }


def main() -> None:
    serve(handlers(*sys.argv[1:]))
