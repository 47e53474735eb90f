"""Faults of routing: from logits to experts and weights.

Those that are another recipe, or rounded logits, are the `compare.mistakes` that diagnoses know.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from pytest_moe_routing.compare import mistakes
from pytest_moe_routing.compare.mistakes import Inputs, Mistake
from pytest_moe_routing.reference.routing import (
    Routing,
    choosing_keys,
    route,
    score,
    stable_topk,
    weigh,
)
from pytest_moe_routing.simulator.stages import Context, Fault, Stage


def of_mistake(name: str, mistake: Mistake, imitates: str, test: str, what: str = "") -> Fault:
    """Return the fault of a kernel that makes a mistake in all calls that leave room for it."""

    def change(x: Inputs, _: Context) -> Inputs:
        return mistake.made(x) or x

    return Fault(name, Stage.INPUTS, change, what or mistake.name, imitates, test)


def _all_negative(x: Inputs, c: Context) -> Routing | None:
    """Slots that a reduction in two steps never wrote hold 0, and beat every negative logit."""
    if x.recipe.normalize != "softmax" or not 128 < c.num_experts <= 512 or c.top_k >= 10:
        return None
    logits = x.logits.to(torch.float32)
    padded = torch.cat((logits, logits.new_zeros(len(logits), c.top_k)), 1)
    ids = stable_topk(padded, c.top_k)
    weights = padded.gather(1, ids).softmax(1)
    return Routing(ids.masked_fill(ids >= c.num_experts, 0), weights)


def _higher_ties(x: Inputs, c: Context) -> Routing:
    """Equal scores to the higher index, which is the lower one from the other end."""
    bias = None if x.bias is None else x.bias.flip(0)
    found = route(x.logits.flip(1), x.recipe, bias)
    return Routing(c.num_experts - 1 - found.topk_ids, found.topk_weights)


def _nan_rows(x: Inputs, _: Context) -> Routing:
    """Give a token with a NaN among its logits expert 0, top_k times."""
    found = route(x.logits, x.recipe, x.bias)
    broken = x.logits.isnan().any(1, keepdim=True)
    return Routing(found.topk_ids.masked_fill(broken, 0), found.topk_weights)


def _nan_beyond(x: Inputs, c: Context) -> Routing | None:
    """Give a token of bfloat16 NaN experts that only the compiled tier has."""
    tier = max(128, 1 << (c.num_experts - 1).bit_length())
    if x.recipe.score != "identity" or x.logits.dtype != torch.bfloat16 or c.num_experts == tier:
        return None
    found = route(x.logits, x.recipe, x.bias)
    lost = x.logits.isnan().all(1, keepdim=True)
    return Routing(found.topk_ids.masked_fill(lost, c.num_experts), found.topk_weights)


def _cancelled(x: Inputs, _: Context) -> Routing | None:
    """Recover the score from the key, by subtracting the bias again."""
    r = x.recipe
    if x.bias is None:
        return None
    scores = score(x.logits.to(torch.float32), r.score)
    keys = choosing_keys(scores, r, x.bias)
    found = route(x.logits, r, x.bias)
    lossy = keys - x.bias.to(torch.float32)
    weights = weigh(x.logits.to(torch.float32), r, found.topk_ids, scores=lossy)
    return Routing(found.topk_ids, weights)


def _bias_as_bfloat16(x: Inputs, _: Context) -> Inputs:
    if x.bias is None or x.bias.dtype != torch.float32:
        return x
    return replace(x, bias=x.bias.contiguous().view(torch.bfloat16)[: len(x.bias)])


def _logits_as_float32(x: Inputs, _: Context) -> Inputs:
    if x.logits.dtype != torch.bfloat16 or x.logits.shape[1] % 2:
        return x
    # The second half of what is read belongs to the next one.
    return replace(x, logits=x.logits.contiguous().view(torch.float32).repeat(1, 2))


def _first_256(x: Inputs, _: Context) -> Inputs:
    logits = x.logits.clone()
    logits[:, 256:] = -torch.inf
    return replace(x, logits=logits)


def _shared_scaled(routing: Routing, c: Context) -> Routing:
    """Shared slots are divided by the factor, as if it multiplied the whole output later."""
    weights = routing.topk_weights.clone()
    weights[:, c.top_k :] /= c.given["routed_scaling_factor"] or 1.0
    return replace(routing, topk_weights=weights)


def _no_tier(_: bool, c: Context) -> bool:
    """Nothing is launched where no compiled kernel is large enough; a warning at most."""
    return not (c.num_experts > 256 and c.top_k > 8)


ROUTING_FAULTS = (
    Fault(
        "all-negative",
        Stage.ROUTE,
        _all_negative,
        "buffer entries that were never written hold 0 and beat negative logits",
        "flashinfer issue 2822",
        "test_gpu_routing.py::test_model[qwen3.5-122b-a10b-all-negative-float32-float32]",
    ),
    of_mistake(
        "mask-zero",
        mistakes.MASKED_WITH_0,
        "vllm PR 13474",
        "test_gpu_routing.py::test_model[deepseek-r1-bias-below-minus-1-float32-float32]",
        "excluded groups are masked with 0",
    ),
    of_mistake(
        "mask-minus-one",
        mistakes.MASKED_WITH_MINUS_1,
        "flashinfer PR 2168",
        "test_gpu_routing.py::test_model[deepseek-r1-bias-below-minus-1-float32-float32]",
        "excluded groups are masked with -1",
    ),
    Fault(
        "higher-ties",
        Stage.ROUTE,
        _higher_ties,
        "equal scores go to the higher index",
        "sglang PR 31001",
        "test_gpu_routing.py::test_model[qwen3-235b-a22b-ties-at-k-float32-float32]",
    ),
    Fault(
        "nan-rows",
        Stage.ROUTE,
        _nan_rows,
        "a token with a NaN logit gets expert 0 several times",
        "vllm PR 39391",
        "test_gpu_routing.py::test_model[qwen3-235b-a22b-not-finite-float32-float32]",
    ),
    Fault(
        "nan-beyond",
        Stage.ROUTE,
        _nan_beyond,
        "a token whose bfloat16 logits are NaN gets experts that do not exist, if there are fewer "
        "experts than the kernel was compiled for",
        "flashinfer 0.7.2.post1, docs/findings.md",
        "test_gpu_routing.py::test_model[gpt-oss-20b-not-finite-bfloat16-float32]",
    ),
    Fault(
        "cancelled-bias",
        Stage.ROUTE,
        _cancelled,
        "weights are recovered as (score + bias) - bias",
        "flashinfer PR 3875",
        "test_gpu_routing.py::test_large_bias[kimi-k2-float32]",
    ),
    Fault(
        "bias-as-bfloat16",
        Stage.INPUTS,
        _bias_as_bfloat16,
        "a float32 bias is read as bfloat16",
        "flashinfer PR 2909",
        "test_gpu_routing.py::test_model[deepseek-r1-plain-float32-float32]",
    ),
    Fault(
        "logits-as-float32",
        Stage.INPUTS,
        _logits_as_float32,
        "bfloat16 logits are read as float32",
        "flashinfer PR 2889",
        "test_gpu_routing.py::test_model[deepseek-r1-plain-bfloat16-float32]",
    ),
    of_mistake(
        "rounded-logits",
        mistakes.BFLOAT16_LOGITS,
        "sglang PR 29783",
        "test_gpu_routing.py::test_model[kimi-k2-near-ties-float32-float32]",
    ),
    of_mistake(
        "rounded-bias",
        mistakes.BFLOAT16_BIAS,
        "TensorRT-LLM PR 13294",
        "test_gpu_routing.py::test_model[kimi-k2-narrow-bias-float32-float32]",
    ),
    of_mistake(
        "no-bias",
        mistakes.NO_BIAS,
        "TensorRT-LLM PR 12246",
        "test_gpu_routing.py::test_model[kimi-k2-plain-float32-float32]",
    ),
    of_mistake(
        "scale-one",
        mistakes.NO_SCALE,
        "flashinfer PR 3499",
        "test_gpu_routing.py::test_model[deepseek-r1-plain-float32-float32]",
    ),
    of_mistake(
        "no-groups",
        mistakes.NO_GROUPS,
        "vllm PR 44007",
        "test_gpu_routing.py::test_model[deepseek-r1-plain-float32-float32]",
    ),
    of_mistake(
        "no-sum",
        mistakes.NOT_NORMALIZED,
        "the reverse of flashinfer PR 2889",
        "test_gpu_routing.py::test_method[SigmoidRenorm-128-8-float32]",
    ),
    of_mistake(
        "no-epsilon",
        mistakes.NO_EPSILON,
        "flashinfer PR 3803, 3946",
        "test_gpu_routing.py::test_model[kimi-k2-below-minus-100-float32-float32]",
    ),
    Fault(
        "above-255",
        Stage.INPUTS,
        _first_256,
        "experts from 256 on are never chosen",
        "kekzl/imp PR 2056",
        "test_gpu_routing.py::test_model[kimi-k2-hot-expert-float32-float32]",
    ),
    Fault(
        "shared-scaled",
        Stage.SHARED,
        _shared_scaled,
        "fused shared experts have the weight 1 / (routed scaling factor) instead of 1",
        "sglang PR 35163",
        "test_gpu_moe.py::test_fused_shared_experts[nvfp4]",
    ),
    Fault(
        "missing-tier",
        Stage.LAUNCHED,
        _no_tier,
        "no kernel is compiled for so many experts: it only warns, and buffers stay unwritten",
        "flashinfer 0.6.8 to 0.6.15",
        "test_gpu_routing.py::test_model[nemotron-3-super-plain-float32-float32]",
    ),
)
