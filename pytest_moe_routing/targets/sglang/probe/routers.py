"""Runs the routers of one release of SGLang on a CPU, and compares them with the model's router.

`python -m pytest_moe_routing.targets.sglang.probe.routers ROOT FLASHINFER` answers. A model's own
MoE block makes the TopK, as on CUDA with the Triton runner; SGLang's Python code runs as it is, and
in the place of a compiled or Triton kernel runs what it is for (`targets.sglang.kernels`).
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.sglang import kernels
from pytest_moe_routing.targets.sglang.probe import main as blocks
from pytest_moe_routing.targets.sglang.probe.router_case import HIDDEN, Case, compare
from pytest_moe_routing.targets.sglang.probe.router_configs import cases
from pytest_moe_routing.targets.sglang.probe.world import known
from pytest_moe_routing.targets.stubs import source_of

_MOE = "sglang.srt.layers.moe"
_TOPK = f"{_MOE}.topk"
#: Where a release has the Triton runner's code that scales what experts give.
_COMBINES = (
    f"{_MOE}.moe_runner.triton_utils.fused_moe",
    f"{_MOE}.fused_moe_triton.fused_moe",
)
_UTILITIES = "sglang.srt.utils.common"
#: Attributes of configs that blocks read besides, and that do not matter to routing.
_FURTHER: Mapping[str, Mapping[str, Any]] = {
    "GptOssForCausalLM": {"swiglu_limit": None, "dtype": None},
    "KimiK3ForConditionalGeneration": {
        "routed_expert_hidden_size": None,
        "latent_moe_use_norm": False,
        "topk_method": "noaux_tc",
    },
    "KimiLinearForCausalLM": {
        "routed_expert_hidden_size": None,
        "activation_situ_beta": 1.0,
        "activation_situ_linear_beta": 1.0,
    },
}


class Routers(blocks.Blocks):
    """Answers about the routers of one release's models."""

    def __init__(self, root: str, flashinfer: FlashInfer) -> None:
        super().__init__(root, flashinfer)
        self.root = root
        self._compared: dict[str, list[dict[str, Any]]] = {}
        _choose_triton()
        importlib.reload(_with_kernels(root))
        self._combine_scales = any(
            "moe_runner_config.routed_scaling_factor" in source_of(root, module)
            for module in _COMBINES
        )

    def run(self, model: Mapping[str, Any], config: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Route for a model by the TopK that its block makes, in every way that there is.

        Raises:
            Unsupported: The release has no such architecture, or its block cannot be built here.
        """
        router = RouterConfig(**model["router"])
        if router.not_expressible is not None:
            raise Unsupported(f"no recipe computes the router: {router.not_expressible}")
        values = {**_FURTHER.get(model["architecture"], {}), **config}
        values |= {
            name: HIDDEN
            for name, value in config.items()
            if value == blocks._SIZE and "size" in name
        }
        # Models that share a block and a config share its runs.
        key = json.dumps([model["architecture"], router.logits_dtype, values], sort_keys=True)
        if key not in self._compared:
            self._compared[key] = list(self._routed(model["architecture"], values, router))
        return [{**run, "subject": model["id"]} for run in self._compared[key]]

    def run_other(self) -> list[dict[str, Any]]:
        """Route by functions that no model of the zoo reaches on CUDA."""
        return [compare(case) for case in cases()]

    def _routed(
        self, architecture: str, values: Mapping[str, Any], router: RouterConfig
    ) -> Iterator[dict[str, Any]]:
        recipe = replace(recipe_of(router), weight_on="output")
        dtype = getattr(torch, router.logits_dtype)
        topk, factor = self._built(architecture, values)
        recipe = replace(recipe, scale=_rest(recipe.scale, factor))
        case = Case(topk.forward_cuda, topk.topk_config, recipe, router.num_experts, dtype)
        yield compare(case)
        if router.logits_dtype == "float32":
            way = "cuda, handed bfloat16 logits"
            yield compare(replace(case, dtype=torch.bfloat16, way=way, reach="bfloat16 logits"))
        way = "--enable-torch-compile, one token"
        yield compare(replace(case, forward=topk.forward_native, way=way, reach="opt-in"))
        shared = values.get("n_shared_experts")
        if shared == 1 and self._fuses_shared_experts(architecture):
            with _shared_experts(1):
                topk, factor = self._built(architecture, values)
                recipe = replace(recipe_of(router), weight_on="output")
                case = Case(
                    topk.forward_cuda,
                    topk.topk_config,
                    replace(recipe, scale=_rest(recipe.scale, factor)),
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
        module = self.sources.blocks(architecture)[0][0]
        has_config = source_of(self.root, "sglang.srt.configs.shared_experts") != ""
        return has_config and "get_num_fused_shared_experts()" in self.sources.source(module)

    def _built(self, architecture: str, config: Mapping[str, Any]) -> tuple[Any, float]:
        """The TopK of a model's block, and the factor on the weights behind it."""
        if not self._combine_scales:
            raise Unsupported("what this release's Triton runner multiplies is not known")
        module, name, given = self.sources.blocks(architecture)[0]
        seen = blocks._Seen()
        try:
            with (
                patch.object(blocks, "_SIZE", HIDDEN),
                blocks._watching(seen),
                torch.no_grad(),
                _experts_give_weights(),
            ):
                block = blocks._build(module, name, given, config, None)
                blocks._fill(block, seen)
                output = blocks._forward(block, config["num_experts"])
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{name} is not built and run here: {text}") from error
        if len(seen.topks) != 1:
            raise Unsupported(f"{name} makes {len(seen.topks)} TopK")
        values = output.float().unique().tolist()
        if len(values) != 1:
            raise Unsupported(f"{name} does more than scale what its experts give")
        return seen.topks[0], values[0]


def _rest(scale: float, factor: float) -> float:
    """What is left of a scale behind a factor, which was measured in bfloat16."""
    return 1.0 if math.isclose(scale, factor, rel_tol=2**-8) else scale / factor


def _choose_triton() -> None:
    """SGLang's own routing on CUDA, with the Triton runner, and nothing else."""
    utils = import_module(f"{_MOE}.utils")
    for module in (utils, import_module(_MOE)):
        vars(module)["get_moe_runner_backend"] = lambda: utils.MoeRunnerBackend.TRITON
    import_module("sglang.srt.runtime_context").get_server_args().moe_runner_backend = "triton"


def _with_kernels(root: str) -> ModuleType:
    """The module of TopK, which the world has changed, with kernels that a CPU runs."""
    stand_ins = {
        **kernels.in_torch(),
        "sglang.srt.eplb.expert_location_dispatch": {
            # No remapping of experts.
            "topk_ids_logical_to_physical": lambda ids, *_: ids,
            "transform_select_experts_inputs": lambda router_logits, correction_bias, **_: (
                router_logits,
                correction_bias,
            ),
        },
        "sglang.srt.state_capturer.routed_experts": {"get_global_experts_capturer": lambda: None},
        "sglang.srt.model_executor.forward_context": {"has_forward_context": lambda: False},
    }
    for module, members in stand_ins.items():
        vars(import_module(module)).update(members)
    for module in ("sglang.srt.utils", "sglang.srt.utils.common"):
        vars(import_module(module))["fast_topk"] = _function(root, _UTILITIES, "fast_topk")
    return import_module(_TOPK)


def _function(root: str, module: str, name: str) -> Any:
    """A function that needs nothing but torch, out of a module that is not imported."""
    tree = ast.parse(source_of(root, module))
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    space: dict[str, Any] = {"torch": torch}
    exec(compile(tree, module, "exec"), space)
    return space.get(name, stubs.Stub(name))


@contextmanager
def _experts_give_weights() -> Iterator[None]:
    """Let TopK weigh all 1, and every MoE layer return that, times what its runner multiplies."""

    def forward(self: Any, hidden_states: Tensor, topk_output: Any = None, **_: Any) -> Tensor:
        factor = self.moe_runner_config.routed_scaling_factor
        weight = float(topk_output.topk_weights.flatten()[0])
        return torch.full_like(hidden_states, weight * (1.0 if factor is None else factor)).float()

    def route(self: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
        shape = len(hidden_states), self.topk_config.top_k
        ids, weights = torch.zeros(shape, dtype=torch.int32), torch.ones(shape)
        return import_module(_TOPK).StandardTopKOutput(weights, ids, None)

    layer = import_module(f"{_MOE}.fused_moe_triton.layer").FusedMoE
    with (
        patch.object(layer, "forward", forward),
        patch.object(import_module(_TOPK).TopK, "forward_cuda", route),
    ):
        yield


@contextmanager
def _shared_experts(count: int) -> Iterator[None]:
    """Let models put so many shared experts among the routed ones."""
    shared = import_module("sglang.srt.configs.shared_experts").SharedExpertsConfig()
    shared.num_fused_shared_experts = count
    model = known("model", shared_experts=shared)
    readers = [
        m
        for name, m in sys.modules.items()
        if name.startswith("sglang.") and "get_model" in vars(m)
    ]
    with ExitStack() as stack:
        for module in readers:
            stack.enter_context(patch.dict(vars(module), {"get_model": lambda: model}))
        yield


def main() -> None:
    root, release = sys.argv[1:]
    routers = Routers(root, FlashInfer.of(release))
    serve({"run": routers.run, "run_other": routers.run_other})


if __name__ == "__main__":
    main()
