"""What may be wrong with a fused MoE, as data: each defect changes the layer that is computed.

A kernel's output that lies outside the reference's error bars, but inside those of the reference
*with a defect*, is diagnosed. Nothing is guessed from ratios or correlations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_moe_routing.compare.mistakes import RECIPES, Inputs, Mistake, recipe_with
from pytest_moe_routing.reference.activation import ACTIVATIONS
from pytest_moe_routing.reference.layouts import interleave_rows, swap_halves
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.quantization import Quantized
from pytest_moe_routing.reference.routing import Routing, route
from pytest_moe_routing.reference.weights import Expert, Experts


@dataclass(frozen=True)
class Changed:
    """Experts with a change made to each as it is opened."""

    experts: Experts
    change: Callable[[Expert], Expert]

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int, /) -> Expert:
        return self.change(self.experts[expert])


@dataclass(frozen=True)
class Defect:
    """One way to be wrong.

    Attributes:
        name: What a diagnosis says.
        change: The problem that such a kernel solves instead; None where the defect would change
            nothing, or cannot be told without logits.
    """

    name: str
    change: Callable[[MoEProblem], MoEProblem | None]


def _scaled(power: int) -> Callable[[MoEProblem], MoEProblem | None]:
    def change(p: MoEProblem) -> MoEProblem | None:
        if p.recipe is None or p.recipe.scale == 1:
            return None
        ids, weights = p.routing.topk_ids, p.routing.topk_weights
        return replace(p, routing=Routing(ids, weights * p.recipe.scale**power))

    return change


def _shifted(by: int) -> Callable[[MoEProblem], MoEProblem | None]:
    def change(p: MoEProblem) -> MoEProblem | None:
        ids = (p.routing.topk_ids + by) % len(p.experts)
        return replace(p, routing=Routing(ids, p.routing.topk_weights))

    return change


def _rerouted(mistake: Mistake) -> Callable[[MoEProblem], MoEProblem | None]:
    """Return a change to the routing that a mistake leads to."""

    def change(p: MoEProblem) -> MoEProblem | None:
        if p.recipe is None or p.logits is None:
            return None
        made = mistake.made(Inputs(p.logits, p.recipe, p.bias))
        if made is None:
            return None
        return replace(p, routing=route(made.logits, made.recipe, made.bias))

    return change


def _fewer(p: MoEProblem) -> MoEProblem | None:
    if p.routing.topk_ids.shape[1] == 1:
        return None
    return replace(p, routing=Routing(p.routing.topk_ids[:, :-1], p.routing.topk_weights[:, :-1]))


def _fewer_before_normalizing(p: MoEProblem) -> MoEProblem | None:
    if p.recipe is None or p.recipe.top_k == 1 or p.recipe.normalize == "none":
        return None
    return _rerouted(Mistake("", recipe_with(top_k=p.recipe.top_k - 1)))(p)


def _unweighted(p: MoEProblem) -> MoEProblem | None:
    ones = torch.ones_like(p.routing.topk_weights)
    return replace(p, routing=Routing(p.routing.topk_ids, ones))


def _other_side(p: MoEProblem) -> MoEProblem | None:
    side = "input" if p.layer.weight_on == "output" else "output"
    return replace(p, layer=replace(p.layer, weight_on=side))


def _unclamped(p: MoEProblem) -> MoEProblem | None:
    if p.layer.activation.limit is None:
        return None
    return replace(p, layer=replace(p.layer, activation=replace(p.layer.activation, limit=None)))


def _activated(name: str) -> Callable[[MoEProblem], MoEProblem | None]:
    def change(p: MoEProblem) -> MoEProblem | None:
        act, other = p.layer.activation, ACTIVATIONS[name]
        if act.gated != other.gated or act.name == name:
            return None
        return replace(p, layer=replace(p.layer, activation=other))

    return change


def _each(edit: Callable[[Expert], Expert | None]) -> Callable[[MoEProblem], MoEProblem | None]:
    """Return a change of every expert, or None if it does not apply to the first expert."""

    def change(p: MoEProblem) -> MoEProblem | None:
        if edit(p.experts[0]) is None:
            return None
        return replace(p, experts=Changed(p.experts, lambda e: edit(e) or e))

    return change


def _rows_of_gemm1(move: Callable[[Tensor], Tensor]) -> Callable[[MoEProblem], MoEProblem | None]:
    """Rows of a gated first GEMM, with their scales and biases, in another order."""

    def edit(e: Expert) -> Expert:
        q = e.gemm1
        scales = q.scales if q.scales is None or q.scales.shape[-2] == 1 else move(q.scales)
        bias = None if e.bias1 is None else move(e.bias1.unsqueeze(1)).squeeze(1)
        return replace(e, gemm1=replace(q, data=move(q.data), scales=scales), bias1=bias)

    def change(p: MoEProblem) -> MoEProblem | None:
        return _each(edit)(p) if p.layer.activation.gated else None

    return change


def _no_expert_bias(e: Expert) -> Expert | None:
    return None if e.bias1 is None and e.bias2 is None else replace(e, bias1=None, bias2=None)


def _scale_row_off(gemm: str) -> Callable[[Expert], Expert | None]:
    def edit(e: Expert) -> Expert | None:
        q: Quantized = getattr(e, gemm)
        if q.scales is None or q.scales.shape[-2] == 1:
            return None
        rolled = replace(q, scales=q.scales.roll(1, -2))
        return replace(e, gemm1=rolled) if gemm == "gemm1" else replace(e, gemm2=rolled)

    return edit


def _transposed_scales(p: MoEProblem) -> MoEProblem | None:
    """Read the input's scales `[tokens, blocks]` as if they lay `[blocks, tokens]` in memory."""
    scales = p.hidden.scales
    if scales is None or min(scales.shape) == 1:
        return None
    wrong = scales.T.contiguous().view(scales.shape)
    return replace(p, hidden=replace(p.hidden, scales=wrong))


#: In the order in which they are reported. Some are special cases of others: the plainer first.
DEFECTS: tuple[Defect, ...] = (
    Defect("the routed scaling factor is missing", _scaled(-1)),
    Defect("the routed scaling factor is applied twice", _scaled(1)),
    Defect("the router weight is on the wrong side of the expert", _other_side),
    Defect("the router weights are missing", _unweighted),
    Defect("gate and up are swapped", _rows_of_gemm1(swap_halves)),
    Defect("gate and up rows are interleaved", _rows_of_gemm1(interleave_rows)),
    Defect("experts are off by one: each token's next one is used", _shifted(1)),
    Defect("experts are off by one: each token's previous one is used", _shifted(-1)),
    Defect("the last of the top_k experts is left out", _fewer),
    Defect("top_k is one too small", _fewer_before_normalizing),
    *(Defect(mistake.name, _rerouted(mistake)) for mistake in RECIPES),
    Defect("the activation's clamp is missing", _unclamped),
    Defect("the experts' biases are ignored", _each(_no_expert_bias)),
    Defect("block scales of the first GEMM are one row off", _each(_scale_row_off("gemm1"))),
    Defect("block scales of the second GEMM are one row off", _each(_scale_row_off("gemm2"))),
    Defect("scales of the hidden states are read transposed", _transposed_scales),
    *(Defect(f"the activation is {name}", _activated(name)) for name in ACTIVATIONS),
)
