"""The experts and weights that a whole block of a model hands to its experts, for known logits.

The tokens are unit vectors, and the gate's weight has values that are exact in bfloat16. So the
logits are the same in any precision: a column of the weight for each token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.oracle.routers import answer_problem
from pytest_moe_routing.reference.own_routers import OWN_ROUTERS, Choice, OwnRouter
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.targets import layers
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe import main as blocks
from pytest_moe_routing.targets.sglang.probe.router_case import HIDDEN, rest
from pytest_moe_routing.targets.sglang.probe.watching import Seen, experts_called

_TOLERANCE = 2.0**-7


@dataclass
class _Given:
    """What the experts were given."""

    hidden: Tensor
    weights: Tensor
    ids: Tensor


def choice_problem(
    names: Names, question: Mapping[str, Any], seen: Seen, gates: list[Tensor], factor: float
) -> str | None:
    """Return where a block gives its experts another choice than the model's router makes.

    What TopK chooses is judged elsewhere; here it has to be chosen by the logits, and to arrive.
    Routing functions of models are compared with the model's router.

    Args:
        question: `architecture`; the fields of the model's `router`; and the attributes of its
            `config`.
        seen: What was made when the block was built.
        gates: The weights of the product that the router's logits are; none if the block gets
            its logits from outside.
        factor: By what the block multiplies the experts' output where TopK weighs 1.

    Raises:
        Unsupported: The logits are of no weight that is known, or the block does not run.
    """
    config, own = RouterConfig(**question["router"]), OWN_ROUTERS.get(question["architecture"])
    if config.not_expressible is not None and own is None:
        raise Unsupported(f"no recipe computes the router: {config.not_expressible}")
    if not (gates or "router_logits" in inspect.signature(seen.block.forward).parameters):
        raise Unsupported("the logits are of no weight that can be traced")
    extra = int(question["config"][own.extra]) if own and own.extra else 0
    table = exact_logits(config.num_experts + extra)
    tokens = torch.eye(HIDDEN, dtype=torch.bfloat16).repeat(2, 1)
    logits = table.T.repeat(2, 1)
    each = _fill(seen.block, own, gates, table)
    (topk,), given, after = seen.topks, list[_Given](), factor / seen.weight
    if problem := _row_problem(seen.block, topk.topk_config.correction_bias):
        return problem
    try:
        with _taking(names, given), torch.no_grad():
            output = layers.first_of(blocks.run(seen.block, tokens, logits))
            (found,) = given
            if own is None and topk.topk_config.custom_routing_function is None:
                right = topk.forward_cuda(tokens, logits.to(seen.logits[0].dtype))
                weights = right.topk_weights.float() * seen.weight
                wanted = Choice(weights, right.topk_ids.long(), torch.zeros(len(tokens)))
                return _chosen_problem(found, wanted, 1.0)
    except Exception as error:
        raise Unsupported(f"with known logits: {type(error).__name__}: {error}") from error
    if own is None:
        recipe = replace(recipe_of(config), weight_on="output")
        recipe = replace(recipe, scale=rest(recipe.scale, after))
        bias = each.float() if recipe.bias else None
        return answer_problem(found.weights, found.ids, logits, bias, recipe)
    wanted, scale = own.route(logits, each, config.num_experts, config.top_k), 1.0
    if config.routed_scaling_factor is not None:
        scale = config.routed_scaling_factor
    by_token = (output.float() * tokens.float()).sum(-1)
    return _chosen_problem(found, wanted, rest(scale, after)) or _unchanged_problem(
        by_token, wanted.unchanged * scale
    )


def exact_logits(count: int) -> Tensor:
    """Return float32 values `[count, HIDDEN]`, all different in a column and exact in bfloat16."""
    steps = 1 + torch.arange(128, dtype=torch.float32) / 128
    values = torch.cat([steps * 2.0**power for power in range(-3, 2)])
    values = torch.cat([values, -values])
    generator = torch.Generator().manual_seed(count)
    columns = [
        values[torch.randperm(len(values), generator=generator)[:count]] for _ in range(HIDDEN)
    ]
    return torch.stack(columns, 1)


def _fill(block: nn.Module, own: OwnRouter | None, gates: list[Tensor], table: Tensor) -> Tensor:
    """Give a block the weight of its gate and a value for each expert; return those values."""
    for weight in gates:
        if weight.shape != table.shape:
            raise Unsupported(f"a gate's weight is {list(weight.shape)}, not {list(table.shape)}")
    # A gate may have kept a copy of its weight in another dtype, when the block was run before.
    kept = [each for each in block.buffers() if gates and each.shape == table.shape]
    for weight in (*gates, *kept):
        weight.copy_(table)
    generator = torch.Generator().manual_seed(1)
    each = torch.randint(-32, 32, (len(table),), generator=generator) / 128
    if own is not None and "scale" in own.each:
        each = each + 1
    for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
        is_each = own.each and own.each in name if own else "bias" in name
        if is_each and tensor.numel() == each.numel():
            tensor.copy_(each.view_as(tensor))
    return each


def _row_problem(block: nn.Module, bias: Tensor | None) -> str | None:
    """Return whose bias a router has, if the block has a row for each kind of tokens.

    The only experts of such a block are those of the first kind, which is text.
    """
    if bias is None:
        return None
    for name, rows in block.named_parameters():
        has_rows = rows.dim() == 2 and len(rows) > 1
        if has_rows and rows.untyped_storage()._cdata == bias.untyped_storage()._cdata:
            row = (bias.storage_offset() - rows.storage_offset()) // rows.stride(0)
            return f"TopK has row {row} of {name}, its tokens have row 0" if row else None
    return None


@contextmanager
def _taking(names: Names, given: list[_Given]) -> Iterator[None]:
    """Have experts take what they are given, and return nothing."""

    def take(hidden_states: Tensor, topk_output: Any) -> Tensor:
        weights, ids = topk_output.topk_weights, topk_output.topk_ids
        given.append(_Given(hidden_states.clone(), weights.clone(), ids.clone()))
        return torch.zeros_like(hidden_states)

    def forward(_: Any, hidden_states: Tensor, topk_output: Any = None, **__: Any) -> Tensor:
        return take(hidden_states, topk_output)

    def function(hidden_states: Tensor, topk_output: Any, _config: Any) -> Tensor:
        return take(hidden_states, topk_output)

    layer: Callable[..., Any] = names.get("router-layer")
    with experts_called(function), patch.object(layer, "forward", forward):
        yield


def _chosen_problem(given: _Given, wanted: Choice, scale: float) -> str | None:
    """Return which token's experts or weights are not those of a router of its own."""
    shape = len(given.ids), int(max(given.ids.max(), wanted.ids.max())) + 1

    def dense(ids: Tensor, weights: Tensor) -> Tensor:
        return torch.zeros(shape, dtype=torch.float32).scatter_add(1, ids.long(), weights.float())

    got, right = dense(given.ids, given.weights), dense(wanted.ids, wanted.weights * scale)
    return _first_difference(got, right, "weighs")


def _unchanged_problem(got: Tensor, wanted: Tensor) -> str | None:
    """Return which token is itself in the output otherwise than the router has it there."""
    return _first_difference(
        got.unsqueeze(1), wanted.unsqueeze(1), "the token itself, added, weighs"
    )


def _first_difference(got: Tensor, wanted: Tensor, what: str) -> str | None:
    is_wrong = (got - wanted).abs() > _TOLERANCE * wanted.abs().clamp(min=2.0**-12)
    if not is_wrong.any():
        return None
    token, at = is_wrong.nonzero()[0].tolist()
    name = f"expert {at} {what}" if got.shape[1] > 1 else what
    count = int(is_wrong.any(1).sum())
    return (
        f"{count} of {len(got)} tokens; token {token}: {name} {float(got[token, at]):.6g} instead "
        f"of {float(wanted[token, at]):.6g}"
    )
