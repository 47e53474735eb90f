"""Further ways in which SGLang runs a model's router: with experts placed elsewhere, in layers that
route by a table, and with two batches that overlap.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.routers import WrongAnswer, WronglyCaptured
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.around import Capturer, placement
from pytest_moe_routing.targets.sglang.probe.default_runner import layer_runner, multiplying_runners
from pytest_moe_routing.targets.sglang.probe.requests import requesting
from pytest_moe_routing.targets.sglang.probe.router_case import exact
from pytest_moe_routing.targets.sglang.probe.watching import Seen, experts_called

#: A way differs from the others in one point, which any logits show.
PLAIN = ("plain",)
PLACED = "--enable-eplb, --enable-return-routed-experts"
OVERLAPPED = "--enable-two-batch-overlap"
#: Methods whose layers of experts leave the factor to TopK.
FACTOR_IN_TOPK = "a runner that leaves the factor to TopK"
HASHED = "a layer that routes by a table"
#: The environment in which such a layer does so in torch, rather than in a kernel.
IN_TORCH = {"SGLANG_OPT_USE_FUSED_HASH_TOPK": "0"}

#: An attribute of a layer of experts: whether TopK applies the factor, rather than its runner.
_LEAVES_FACTOR = "should_fuse_routed_scaling_factor_in_topk"

Forward = Callable[..., Any]


def located(ids: Tensor, info: Any = None, *_: Any) -> Tensor:
    """Return the physical experts of logical ones, as `topk_ids_logical_to_physical` does.

    Raises:
        WrongAnswer: There is an id that no routed expert has.
    """
    if info is None:
        return ids
    table: Tensor = info.partial_logical_to_rank_dispatch_physical_map
    if int(ids.max()) >= len(table):
        raise WrongAnswer(f"expert {int(ids.max())} is looked up in a placement of {len(table)}")
    return table[ids]


def placed(forward: Forward, num_experts: int) -> Forward:
    """Return a router whose experts lie in reverse order, and whose ids are captured.

    It returns logical experts, and raises `WronglyCaptured` unless those are what is captured.
    """
    reverse = placement(num_experts, algorithm="static")
    table = reverse.partial_logical_to_rank_dispatch_physical_map

    def run(*inputs: Tensor, **more: Any) -> Any:
        capturer = Capturer()
        with requesting(capturer=capturer):
            output = forward(*inputs, expert_location_dispatch_info=reverse, **more)
        physical = output.topk_ids
        is_routed = physical < num_experts
        # The table is its own inverse.
        logical = torch.where(is_routed, table[physical.clamp(0, num_experts - 1)], physical)
        if not capturer.told:
            raise WronglyCaptured("no selected experts are captured")
        told, wanted = capturer.told[0], logical.masked_fill(~is_routed, -1)
        if not bool(((wanted == -1) | (told[:, : wanted.shape[1]] == wanted)).all()):
            raise WronglyCaptured("the experts that are captured are not the logical ones")
        return output._replace(topk_ids=logical)

    return run


def hashed(
    layer: Any, recipe: Recipe, num_experts: int, environment: Mapping[str, str]
) -> tuple[Forward, Any]:
    """Return a router of a layer that routes by a table, and what has its bias.

    Each token is an entry of its own in the table, which has the experts that `recipe` chooses.

    Args:
        environment: Variables with which the layer is run.
    """
    bias = torch.zeros(num_experts, dtype=torch.float32) if recipe.bias else None
    config = SimpleNamespace(correction_bias=bias)

    def forward(hidden: Tensor, logits: Tensor, **more: Any) -> Any:
        tokens = torch.arange(len(logits))
        layer.tid2eid[: len(logits)] = route(
            logits.float(), recipe, config.correction_bias
        ).topk_ids
        with patch.dict(os.environ, environment):
            return layer(hidden, logits, input_ids=tokens, **more)

    return forward, config


class _State(dict[str, Any]):
    """What the operations of an overlapped block hand on."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__


def overlapped(forward: Forward, block: Any, scale: float) -> Forward:
    """Return a router with the factor that the last operation of an overlapped block multiplies by.

    Args:
        scale: What the factor is if it is near.

    The router raises `Unsupported` if that operation does more than multiply.
    """

    def run(hidden: Tensor, logits: Tensor) -> Any:
        output = forward(hidden, logits)
        state = _State(hidden_states_after_combine=torch.ones_like(hidden), shared_output=None)
        if getattr(block, "shared_experts", None) is not None:
            state["shared_output"] = torch.zeros_like(hidden)
        block.op_output(state)
        values = state["hidden_states_mlp_output"].float().unique().tolist()
        if len(values) != 1:
            raise Unsupported(f"{type(block).__name__}.op_output does more than scale its input")
        return output._replace(topk_weights=output.topk_weights * exact(values[0], scale))

    return run


@contextmanager
def experts_give_weights(names: Names, seen: Seen) -> Iterator[None]:
    """Let TopK weigh all 1, and every MoE layer return that, times what its runner multiplies.

    A layer that leaves the factor to TopK raises `Unsupported` if it is not known that its runner
    does not multiply as well.
    """

    def weighed(hidden_states: Tensor, topk_output: Any, config: Any, is_scaled: bool) -> Tensor:
        seen.runners.append(config)
        factor = None if is_scaled else config.routed_scaling_factor
        weight = seen.weight = float(topk_output.topk_weights.flatten()[0])
        return torch.full_like(hidden_states, weight * (1.0 if factor is None else factor))

    def forward(self: Any, hidden_states: Tensor, topk_output: Any = None, **_: Any) -> Tensor:
        is_scaled = getattr(self, _LEAVES_FACTOR)
        if is_scaled and not isinstance(getattr(type(self), _LEAVES_FACTOR, None), property):
            if (runner := layer_runner(names, self)) not in multiplying_runners(names):
                raise Unsupported(f"not judged: whether the runner {runner} leaves the factor out")
            is_scaled = False
        return weighed(hidden_states, topk_output, self.moe_runner_config, is_scaled)

    def function(hidden_states: Tensor, topk_output: Any, config: Any) -> Tensor:
        seen.on_input = bool(config.apply_router_weight_on_input)
        return weighed(hidden_states, topk_output, config, False)

    topk, is_over = names.get("topk"), list[bool]()
    native = topk.forward_native

    def route_natively(self: Any, *inputs: Any, **given: Any) -> Any:
        if is_over:
            # Some code of models keeps the method that it found.
            return native(self, *inputs, **given)
        seen.forward = "forward_native"
        return route(self, *inputs, **given)

    def route(self: Any, hidden_states: Tensor, router_logits: Any, *_: Any, **__: Any) -> Any:
        seen.logits.append(router_logits)
        shape = len(hidden_states), self.topk_config.top_k
        ids, weights = torch.zeros(shape, dtype=torch.int32), torch.ones(shape)
        return names.get("router-output")(weights, ids, None)

    with (
        experts_called(function),
        patch.object(names.get("router-layer"), "forward", forward),
        patch.object(topk, "forward_cuda", route),
        patch.object(topk, "forward_native", route_natively),
    ):
        yield
    is_over.append(True)


@contextmanager
def shared_experts(names: Names, count: int) -> Iterator[None]:
    """Let models put so many shared experts among the routed ones."""
    replaced: dict[str, Any] = {}
    if names.has("router-shared-experts"):
        shared = names.get("router-shared-experts")()
        shared.num_fused_shared_experts = count
        model = stubs.known("model", shared_experts=shared)
        replaced[names.spelling("stand-ins.context.get_model").path] = lambda: model
    elif names.has("router-shared-experts-off"):
        replaced[names.spelling("router-shared-experts-off").path] = lambda: not count
    with ExitStack() as stack:
        for name, value in replaced.items():
            for module in [m for n, m in sys.modules.items() if n.startswith("sglang.")]:
                if name in vars(module):
                    stack.enter_context(patch.dict(vars(module), {name: value}))
        yield


@contextmanager
def factor_in_topk(names: Names) -> Iterator[None]:
    """Let every layer of experts leave the factor to TopK."""
    always = property(lambda _: True, lambda _, value: None)
    with patch.object(names.get("router-layer"), _LEAVES_FACTOR, always, create=True):
        yield
