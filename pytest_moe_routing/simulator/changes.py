"""What a fault changes: from what is right at a stage of the simulator to what is wrong there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.reference.routing import (
    Routing,
    choosing_keys,
    group_scores,
    route,
    score,
    stable_topk,
    weigh,
)
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.routing.recipe import Recipe


@dataclass
class Context:
    """The call that a fault happens in.

    Attributes:
        given: The entry point's arguments.
        scheme: The quantization, or `routing` for the standalone operator.
        tuning: Whether tactics are being tried out.
        routing: Where the tokens went, once known.
        routed: Whether the caller chose the experts.
    """

    given: dict[str, Any]
    scheme: str
    method: str
    num_experts: int
    top_k: int
    shard: Shard
    tuning: bool = False
    routing: Routing | None = None
    routed: bool = False


@dataclass(frozen=True)
class Inputs:
    """What is about to be routed."""

    logits: Tensor
    recipe: Recipe
    bias: Tensor | None


# -- routing ----------------------------------------------------------------------------------


def recipe(**fields: Any) -> Callable[[Recipe, Context], Recipe]:
    """A recipe with other fields, where it has the ones that these are about."""

    def change(recipe: Recipe, _: Context) -> Recipe:
        return replace(recipe, **fields)

    return change


def no_sum(recipe: Recipe, _: Context) -> Recipe:
    return replace(recipe, normalize="none") if recipe.normalize == "sum" else recipe


def no_epsilon(recipe: Recipe, _: Context) -> Recipe:
    return replace(recipe, epsilon=0.0)


def all_negative(x: Inputs, c: Context) -> Routing | None:
    """Slots that a reduction in two steps never wrote hold 0, and beat every negative logit."""
    if x.recipe.normalize != "softmax" or not 128 < c.num_experts <= 512 or c.top_k >= 10:
        return None
    logits = x.logits.to(torch.float32)
    padded = torch.cat((logits, logits.new_zeros(len(logits), c.top_k)), 1)
    ids = stable_topk(padded, c.top_k)
    weights = padded.gather(1, ids).softmax(1)
    return Routing(ids.masked_fill(ids >= c.num_experts, 0), weights)


def masked_with(value: float) -> Callable[[Inputs, Context], Routing | None]:
    """Excluded groups are masked with a number that biased scores can lie below."""

    def change(x: Inputs, c: Context) -> Routing | None:
        r = x.recipe
        if not r.grouped:
            return None
        logits = x.logits.to(torch.float32)
        keys = choosing_keys(score(logits, r.score), r, x.bias)
        kept = stable_topk(group_scores(keys, r), r.topk_group)
        mask = torch.zeros(len(keys), r.n_group, dtype=torch.bool).scatter(1, kept, True)
        mask = mask.repeat_interleave(c.num_experts // r.n_group, 1)
        ids = stable_topk(keys.masked_fill(~mask, value), r.top_k)
        return Routing(ids, weigh(logits, r, ids))

    return change


def higher_ties(x: Inputs, c: Context) -> Routing:
    """Equal scores to the higher index, which is the lower one from the other end."""
    bias = None if x.bias is None else x.bias.flip(0)
    found = route(x.logits.flip(1), x.recipe, bias)
    return Routing(c.num_experts - 1 - found.topk_ids, found.topk_weights)


def nan_rows(x: Inputs, _: Context) -> Routing:
    """A token with a NaN among its logits gets expert 0, top_k times."""
    found = route(x.logits, x.recipe, x.bias)
    broken = x.logits.isnan().any(1, keepdim=True)
    return Routing(found.topk_ids.masked_fill(broken, 0), found.topk_weights)


def nan_beyond(x: Inputs, c: Context) -> Routing | None:
    """A token of bfloat16 NaN gets experts of the compiled tier that the router does not have."""
    tier = max(128, 1 << (c.num_experts - 1).bit_length())
    if x.recipe.score != "identity" or x.logits.dtype != torch.bfloat16 or c.num_experts == tier:
        return None
    found = route(x.logits, x.recipe, x.bias)
    lost = x.logits.isnan().all(1, keepdim=True)
    return Routing(found.topk_ids.masked_fill(lost, c.num_experts), found.topk_weights)


def cancelled(x: Inputs, _: Context) -> Routing | None:
    """The score is recovered from the key, by taking the bias away again."""
    r = x.recipe
    if x.bias is None:
        return None
    scores = score(x.logits.to(torch.float32), r.score)
    keys = choosing_keys(scores, r, x.bias)
    found = route(x.logits, r, x.bias)
    lossy = keys - x.bias.to(torch.float32)
    return Routing(found.topk_ids, weigh(x.logits.to(torch.float32), r, found.topk_ids, lossy))


def as_bfloat16(bias: Tensor | None, _: Context) -> Tensor | None:
    if bias is None or bias.dtype != torch.float32:
        return bias
    return bias.contiguous().view(torch.bfloat16)[: len(bias)]


def as_float32(logits: Tensor, _: Context) -> Tensor:
    if logits.dtype != torch.bfloat16 or logits.shape[1] % 2:
        return logits
    # The second half of what is read is the neighbour's.
    return logits.contiguous().view(torch.float32).repeat(1, 2)


def rounded(logits: Tensor, _: Context) -> Tensor:
    return logits.to(torch.bfloat16)


def first_256(logits: Tensor, _: Context) -> Tensor:
    logits = logits.clone()
    logits[:, 256:] = -torch.inf
    return logits


def no_tier(_: bool, c: Context) -> bool:
    """Nothing is launched where no compiled kernel is large enough; a warning at most."""
    return not (c.num_experts > 256 and c.top_k > 8)


# -- expert parallelism, weights, the sum ------------------------------------------------------


def rank_0(shard: Shard, _: Context) -> Shard:
    return replace(shard, local_expert_offset=0)


def zeros_off_rank_0(output: Tensor, c: Context) -> Tensor:
    return torch.zeros_like(output) if c.shard.local_expert_offset else output


def global_index(local: Tensor, c: Context) -> Tensor:
    """Local weights are indexed with the expert's global number."""
    return local + c.shard.local_expert_offset


def everyone_local(local: Tensor, c: Context) -> Tensor:
    return local % c.shard.local_num_experts


def memory(**fields: Any) -> Callable[[Any, Context], Any]:
    def change(memory: Any, _: Context) -> Any:
        return replace(memory, **fields)

    return change


def linear_scales(memory: Any, _: Context) -> Any:
    return replace(memory, scales="linear") if memory.scales == "tiles" else memory


def tuned_scales(memory: Any, c: Context) -> Any:
    return linear_scales(memory, c) if c.tuning else memory


def transposed(scales: Tensor, c: Context) -> Tensor:
    if c.scheme != "fp8_block":
        return scales
    return scales.T.contiguous().view(scales.shape)


def unclamped(given: dict[str, Any], _: Context) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name != "gemm1_clamp_limit"}


def physical_limit(given: dict[str, Any], _: Context) -> dict[str, Any]:
    """The limit is taken as one of dequantized numbers, though accumulators are compared."""
    limit, gate = given.get("gemm1_clamp_limit"), given.get("output1_scale_gate_scalar")
    if limit is None or gate is None:
        return given
    return {**given, "gemm1_clamp_limit": limit * gate}


def scale_gate_only(given: dict[str, Any], _: Context) -> dict[str, Any]:
    """One scalar dequantizes both halves, and the intermediate is not quantized with its own."""
    for name in ("scale", "scales"):
        if given.get(f"output1_{name}_gate_scalar") is not None:
            gate = given[f"output1_{name}_gate_scalar"]
            return {**given, f"output1_{name}_scalar": gate}
    return given


def no_bias(given: dict[str, Any], _: Context) -> dict[str, Any]:
    return {**given, **{name: None for name in ("gemm1_bias", "gemm2_bias") if name in given}}


def packed_small(topk: Tensor, _: Context) -> Tensor:
    """In a small batch the bits of weights are taken from the next slot."""
    if len(topk) > 4:
        return topk
    return (topk >> 16 << 16) | (topk.roll(1, 1) & 0xFFFF)


def mislabelled(weights: Tensor, _: Context) -> Tensor:
    """bfloat16 bits in a buffer that is called float32."""
    half = weights.contiguous().view(torch.int16).flatten()
    padded = torch.cat((half, torch.zeros_like(half)))
    return padded.view(torch.float32).view(weights.shape)


def unweighted(weights: Tensor, _: Context) -> Tensor:
    return torch.ones_like(weights)


def weighted_twice(weights: Tensor, c: Context) -> Tensor:
    """The weight is on the input, and once more on the output."""
    assert c.routing is not None
    if not c.given.get("use_routing_scales_on_input"):
        return weights
    return c.routing.topk_weights.to(torch.float32)


def scaled_again(weights: Tensor, c: Context) -> Tensor:
    return weights * (c.given["routed_scaling_factor"] or 1.0) if c.routed else weights


def large_batches(rows: Tensor, _: Context) -> Tensor:
    """From the second tile of tokens on, rows are those of the token one tile before."""
    return torch.cat((rows[:8], rows[:-8])) if len(rows) > 8 else rows


def not_a_number(rows: Tensor, _: Context) -> Tensor:
    """Where an expert's numbers are all 0, its scale is 0 too, and 0 / 0 is not."""
    return rows.masked_fill((rows == 0).all(-1, keepdim=True), torch.nan)
