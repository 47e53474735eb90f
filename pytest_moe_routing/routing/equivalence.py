"""Whether two recipes mean the same, decided by running both.

They do when they choose the same experts with the same weights, in float64, on logits and biases
built to tell recipes apart. Precision (rounding of bias or weights, an epsilon against 0/0) is not
meaning; `Recipe.differences` still shows it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from pytest_moe_routing.logits import make
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing.recipe import Recipe

_WITNESSES = ("plain", "all-negative", "bias-below-minus-1")
_TOKENS = 16
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Counterexample:
    """One token that two recipes route differently.

    Attributes:
        pattern: The logits pattern it comes from.
        token: Its row there.
        logits, bias: What it says about the experts that either recipe chose, by expert.
        wanted, got: Weight by chosen expert.
        sides: What the weight multiplies, (wanted, got).
    """

    pattern: str
    token: int
    logits: dict[int, float]
    bias: dict[int, float]
    wanted: dict[int, float]
    got: dict[int, float]
    sides: tuple[str, str] = ("output", "output")

    def lines(self) -> list[str]:
        """The token, as lines that a person can follow."""

        def show(values: dict[int, float]) -> str:
            return "  ".join(f"{expert}: {value:.6g}" for expert, value in values.items())

        sides = [f" on the expert {side}" for side in self.sides]
        if self.sides[0] == self.sides[1]:
            sides = ["", ""]
        return [
            f"token {self.token} of logits pattern {self.pattern!r}",
            f"logits   {show(self.logits)}",
            *([f"bias     {show(self.bias)}"] if self.bias else []),
            f"wanted   {show(self.wanted)}{sides[0]}",
            f"got      {show(self.got)}{sides[1]}",
        ]


def meaning(recipe: Recipe) -> Recipe:
    """The recipe without what is only precision."""
    return replace(recipe, epsilon=0.0, bias_dtype="float32", weight_dtype="float32")


def same(wanted: Recipe, got: Recipe, num_experts: int) -> bool:
    """Whether both recipes mean the same for this many experts."""
    return counterexample(wanted, got, num_experts) is None


def counterexample(wanted: Recipe, got: Recipe, num_experts: int) -> Counterexample | None:
    """A token that both recipes route differently, or None when they mean the same.

    A recipe without bias is given none, which is the same as zeros.
    """
    return _counterexample(meaning(wanted), meaning(got), num_experts)


@lru_cache(maxsize=4096)
def _counterexample(wanted: Recipe, got: Recipe, num_experts: int) -> Counterexample | None:
    if wanted == got:
        return None
    # Inputs that exercise whatever either recipe does.
    both = replace(wanted if wanted.grouped else got, bias=wanted.bias or got.bias)
    for pattern in _WITNESSES:
        case = make(pattern, both, num_tokens=_TOKENS, num_experts=num_experts)
        routings = [
            route(case.logits, recipe, case.bias if recipe.bias else None, dtype=torch.float64)
            for recipe in (wanted, got)
        ]
        dense = [routing.dense(num_experts) for routing in routings]
        chosen = [
            torch.zeros_like(d).scatter(1, r.topk_ids, 1)
            for d, r in zip(dense, routings, strict=True)
        ]
        differs = (chosen[0] != chosen[1]) | (
            (dense[0] - dense[1]).abs() > _TOLERANCE * dense[0].abs().clamp_min(1e-300)
        )
        # Sides differ for every token: any token shows it.
        tokens = differs.any(1).nonzero().flatten().tolist()
        if wanted.weight_on != got.weight_on:
            tokens = tokens or [0]
        if tokens:
            return _show(pattern, tokens[0], case, routings, (wanted.weight_on, got.weight_on))
    return None


def _show(pattern, token, case, routings, sides) -> Counterexample:  # type: ignore[no-untyped-def]
    weights = [
        dict(zip(r.topk_ids[token].tolist(), r.topk_weights[token].tolist(), strict=True))
        for r in routings
    ]
    experts = sorted({*weights[0], *weights[1]})
    return Counterexample(
        pattern,
        token,
        logits={e: case.logits[token, e].item() for e in experts},
        bias={} if case.bias is None else {e: case.bias[e].item() for e in experts},
        wanted=weights[0],
        got=weights[1],
        sides=sides,
    )
