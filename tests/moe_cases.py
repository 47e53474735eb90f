"""MoE problems at two sizes, and what can be a little wrong with a kernel that solves them."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pytest_moe_routing.logits import EVEN, bell, integers, loud
from pytest_moe_routing.reference.activation import activation
from pytest_moe_routing.reference.moe import MoELayer
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.weights import GeneratedExperts, static_scale
from pytest_moe_routing.routing.recipe import Recipe
from pytest_moe_routing.schemes import storage_of

TESTED = (
    "bf16",
    "fp8_per_tensor",
    "fp8_block",
    "mxfp8",
    "nvfp4",
    "mxfp4",
    "mxfp4_bf16",
    "mxint4",
)


@dataclass(frozen=True)
class Size:
    """Experts, how many of them a token has, and the width of a layer."""

    experts: int
    top_k: int
    hidden: int
    inner: int


#: The layers of the GPU suite.
SUITE = Size(16, 4, 512, 256)

#: Two experts of a published model, by scheme: Qwen3-235B, Llama-4-Scout, DeepSeek-R1, gpt-oss.
FULL = {
    "bf16": Size(2, 2, 4096, 1536),
    "fp8_per_tensor": Size(2, 2, 5120, 8192),
    "mxfp4": Size(2, 2, 2880, 2880),
    "mxfp4_bf16": Size(2, 2, 2880, 2880),
}
FULL |= {scheme: Size(2, 2, 7168, 2048) for scheme in TESTED if scheme not in FULL}


def make(scheme, size=SUITE, *, tokens=33, act="silu", seed=0, even=False):
    """A problem in which every other token is loud enough to reach a clamp of 7.

    With `even`, the experts of a token contribute about as much as each other.
    """
    gated = act != "relu2"
    made = GeneratedExperts(
        size.experts,
        size.hidden,
        size.inner,
        storage_of(scheme).weight,
        gated,
        intermediate_scale=static_scale(storage_of(scheme).intermediate),
        even=even,
        seed=seed,
    )
    share = EVEN if even else 1
    recipe = Recipe(size.top_k, "sigmoid", bias=True, normalize="sum", scale=2.5)
    return MoEProblem.of(
        loud(tokens, size.hidden, seed=seed + 1),
        [made[e] for e in range(size.experts)],
        MoELayer(scheme, activation(act)),
        recipe=recipe,
        logits=bell(tokens, size.experts, seed=seed + 2) * share,
        bias=bell(size.experts, seed=seed + 3) / 8,
    )


@dataclass(frozen=True)
class Slip:
    """Something that is a little wrong.

    Attributes:
        name: What the table says.
        act: Activation of the problem that can show it.
        problem: The problem that such a kernel solves instead, by a seed.
        output: What it does with its float32 output.
        family: The family of aggregates that must name it.
        schemes: Where there is such a thing.
    """

    name: str
    family: str
    act: str = "silu"
    problem: Callable = lambda problem, seed: problem
    output: Callable = lambda output, seed: output
    schemes: tuple = TESTED


def _token(output, seed):
    output = output.clone()
    output[seed % len(output)] *= 1.02
    return output


def _router_weight(problem, seed):
    """The least of a token's experts."""
    weights = problem.routing.topk_weights.clone()
    token = seed % len(weights)
    weights[token, weights[token].argmin()] *= 1.1
    return replace(problem, routing=Routing(problem.routing.topk_ids, weights))


def busiest(problem):
    """The expert with the most tokens."""
    return int(problem.routing.topk_ids.flatten().bincount().argmax())


def _row(gemm):
    """A row of block scales, or what is a row of them where a scale has two dimensions."""

    def change(problem, seed):
        number = busiest(problem)
        matrix = getattr(problem.experts[number], gemm)
        scales = matrix.scales.clone()
        row = int(integers(1, seed=seed + 71)[0]) % len(scales)
        scales[row] = one_code_up(scales[row])
        experts = list(problem.experts)
        changed = {gemm: replace(matrix, scales=scales)}
        experts[number] = replace(experts[number], **changed)
        return replace(problem, experts=experts)

    return change


def one_code_up(scales):
    """The next larger scale; where codes are finer than those of E4M3, a step that E4M3 has.

    The next of a bfloat16 scale, 0.4 to 0.8 % larger, moves less than the rounding of the output.
    """
    if scales.dtype == torch.float32:
        return scales * 1.125
    if scales.dtype == torch.bfloat16:
        return scales * 1.0625
    return (scales.view(torch.uint8) + 1).view(scales.dtype)


def _activated(**factors):
    def change(problem, seed):
        act = problem.layer.activation
        fields = {name: getattr(act, name) * factor for name, factor in factors.items()}
        return replace(problem, layer=replace(problem.layer, activation=replace(act, **fields)))

    return change


_BLOCKS = ("fp8_block", "mxfp8", "nvfp4", "mxfp4", "mxfp4_bf16", "mxint4")

SLIPS = (
    Slip("everything, by 1 %", "output", output=lambda output, seed: output * 1.01),
    Slip("one token, by 2 %", "token", output=_token),
    Slip("one router weight, by 10 %", "expert of a token", problem=_router_weight),
    Slip(
        "a row of block scales of the first GEMM, by one code",
        "row of the first GEMM",
        problem=_row("gemm1"),
        schemes=_BLOCKS,
    ),
    Slip(
        "a row of block scales of the second GEMM, by one code",
        "row of the second GEMM",
        problem=_row("gemm2"),
        schemes=_BLOCKS,
    ),
    Slip("the clamp, by 10 %", "limit", "swigluoai", problem=_activated(limit=1.1)),
    Slip("alpha, by 6 %", "alpha", "swigluoai", problem=_activated(alpha=1.6 / 1.702)),
)
