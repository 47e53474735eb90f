"""What may be wrong with a routing, as data: each mistake changes what a right routing is.

A routing that is wrong, but right to the last token once the reference makes the same mistake, is
diagnosed. Nothing is guessed from ratios or correlations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.compare.rows import Rows, Weights
from pytest_moe_routing.compare.tolerances import Precision
from pytest_moe_routing.reference import routing as reference
from pytest_moe_routing.routing.recipe import Recipe

#: More than float32 moves a bfloat16 number that it scales.
_SCALING = 2.0**-22


class _MaskedWithZero(Rows):
    """Experts of excluded groups take part, with one number as the key of all."""

    mask = 0.0

    def __init__(
        self, logits: Tensor, recipe: Recipe, bias: Tensor | None, precision: Precision
    ) -> None:
        super().__init__(logits, recipe, bias, precision)
        kept = reference.stable_topk(reference.group_scores(self.keys, recipe), recipe.topk_group)
        out = torch.ones(len(kept), recipe.n_group, dtype=torch.bool).scatter(1, kept, False)
        size = self.keys.shape[1] // recipe.n_group
        self.keys = self.keys.masked_fill(out.repeat_interleave(size, 1), self.mask)
        self.recipe = replace(recipe, n_group=1, topk_group=1)
        self.ids = reference.choose(self.keys, self.recipe)


class _MaskedWithMinusOne(_MaskedWithZero):
    mask = -1.0


class _ScaledTwice(Rows):
    def judge_weights(self, ids: Tensor, weights: Tensor) -> Weights:
        return super().judge_weights(ids, weights / self.recipe.scale)


class _WeighedByKeys(Rows):
    def weighing(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys.gather(1, ids), self.errors.gather(1, ids)


class _NoEpsilon(Rows):
    def judge_weights(self, ids: Tensor, weights: Tensor) -> Weights:
        may = super().judge_weights(ids, weights)
        scores, errors = self.weighing(ids)
        lost = (scores <= errors).all(1, keepdim=True)
        return replace(may, outside=may.outside & ~(weights.isnan() & lost))


class _Bfloat16Logits(Rows):
    def __init__(
        self, logits: Tensor, recipe: Recipe, bias: Tensor | None, precision: Precision
    ) -> None:
        super().__init__(_bfloat16(logits), recipe, bias, precision)


class _Bfloat16Scores(Rows):
    def score(self, logits: Tensor, name: str) -> tuple[Tensor, Tensor]:
        scores, errors = super().score(logits, name)
        low, value, high = (_bfloat16(scores + side * errors) for side in (-1, 0, 1))
        return value, errors + torch.maximum(value - low, high - value)


class _Bfloat16(_Bfloat16Scores):
    """Weights are computed in bfloat16 as well, up to the scaling factor."""

    def judge_weights(self, ids: Tensor, weights: Tensor) -> Weights:
        recipe, logits = replace(self.recipe, scale=1.0), self.logits.to(torch.bfloat16)
        scores = self.score(self.logits, recipe.score)[0].to(torch.bfloat16)
        exact = reference.weigh(logits, recipe, ids, scores).to(weights) * self.recipe.scale
        near = torch.isclose(weights, exact, _SCALING, 0.0, equal_nan=True)
        return Weights(exact, exact, exact, ~near & (weights != _bfloat16(exact)))


class _Bfloat16Weights(Rows):
    def __init__(
        self, logits: Tensor, recipe: Recipe, bias: Tensor | None, precision: Precision
    ) -> None:
        half_a_step = 2.0**-8
        super().__init__(logits, recipe, bias, replace(precision, weight=half_a_step))

    def judge_weights(self, ids: Tensor, weights: Tensor) -> Weights:
        may = super().judge_weights(ids, weights)
        # Rounded after they were scaled, or before.
        finer = [
            (x - _bfloat16(x)).abs() > _SCALING * x.abs()
            for x in (weights, weights / self.recipe.scale)
        ]
        return replace(may, outside=may.outside | (finer[0] & finer[1]))


def _bfloat16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).to(x.dtype)


@dataclass(frozen=True)
class Mistake:
    """One way to be wrong.

    Attributes:
        name: What a diagnosis says.
        fields: Of the recipe that is computed instead.
        when: Whether a recipe leaves room for this mistake.
        rows: What is computed instead, where no recipe says it.
        rounds: It rounds to bfloat16, which proves nothing where that is allowed.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    when: Callable[[Recipe], bool] = lambda recipe: True
    rows: type[Rows] = Rows
    rounds: bool = False

    def recipe(self, recipe: Recipe) -> Recipe | None:
        """What is computed instead of a recipe; None if that is no mistake."""
        other = replace(recipe, **self.fields)
        return other if self.when(recipe) and (other != recipe or self.rows is not Rows) else None


#: Mistakes that are other recipes; of any fused MoE as well.
RECIPES = (
    Mistake("the router's correction bias is ignored", {"bias": False}),
    Mistake("the router's correction bias is rounded to bfloat16", {"bias_dtype": "bfloat16"}),
    Mistake("the group limit is ignored", {"n_group": 1, "topk_group": 1}),
    Mistake(
        "router weights are not normalized",
        {"normalize": "none", "epsilon": 0.0},
        lambda r: r.normalize == "sum",
    ),
    Mistake(
        "router weights are normalized, and should not be",
        {"normalize": "sum"},
        lambda r: r.normalize == "none" and r.top_k > 1,
    ),
)


def _biased(recipe: Recipe) -> bool:
    return recipe.bias


def _grouped(recipe: Recipe) -> bool:
    return recipe.grouped


_SUM = "groups are ranked by the sum of their two best experts, not by the best"
_MAX = "groups are ranked by their best expert, not by the sum of their two best"
_MASK = "experts of excluded groups take part, with a number such as 0 for their keys"

#: In the order in which they are tried. Some are special cases of others: the plainer first.
MISTAKES = (
    Mistake("the routed scaling factor is missing", {"scale": 1.0}),
    Mistake("the routed scaling factor is applied twice", {}, lambda r: r.scale != 1, _ScaledTwice),
    Mistake("router weights are those of score + bias", {}, _biased, _WeighedByKeys),
    Mistake("router weights are rounded to bfloat16", rows=_Bfloat16Weights, rounds=True),
    Mistake("router logits are rounded to bfloat16", rows=_Bfloat16Logits),
    Mistake("scores are rounded to bfloat16", rows=_Bfloat16Scores, rounds=True),
    Mistake("scores and weights are computed in bfloat16", rows=_Bfloat16, rounds=True),
    Mistake(
        "all chosen scores underflow to 0, and 0/0 is NaN without the recipe's epsilon",
        {},
        lambda r: r.normalize == "sum" and r.epsilon > 0,
        _NoEpsilon,
    ),
    *RECIPES,
    Mistake(_SUM, {"group_score": "top2_sum"}, _grouped),
    Mistake(_MAX, {"group_score": "max"}, _grouped),
    Mistake(_MASK, {}, _grouped, _MaskedWithZero),
    Mistake(_MASK, {}, _grouped, _MaskedWithMinusOne),
    Mistake(f"{_MAX}; {_MASK}", {"group_score": "max"}, _grouped, _MaskedWithZero),
)


def diagnose(
    rows: Rows,
    ids: Tensor,
    weights: Tensor | None,
    tokens: Tensor,
    worst: Tensor,
    wrong: tuple[Tensor, Tensor],
) -> tuple[str, ...]:
    """The mistake that explains a routing; or one that explains its experts, and one its weights.

    Args:
        rows: The reference's view of all tokens.
        ids, weights: int64 and float64 `[num_tokens, top_k]`, as the implementation gave them.
        tokens: int64 `[n]`, all that must be explained, right ones as well: distinct experts.
        worst: Some of them that are wrong, to rule out most mistakes by.
        wrong: bool `[num_tokens]`: tokens with wrong experts, and those with wrong weights.
    """
    both = bool(wrong[0].any() and wrong[1].any())
    rounded = rows.precision.weight >= 2.0**-8
    found = []
    for mistake in MISTAKES:
        recipe = mistake.recipe(rows.recipe)
        if recipe is None or (mistake.rounds and rounded):
            continue
        bias = rows.bias if recipe.bias else None
        for some in (worst, tokens):
            made = mistake.rows(rows.logits[some], recipe, bias, rows.precision)
            right = (
                _chooses(made, ids[some], rows.ids[some], wrong[0][some]),
                weights is None
                or not bool(made.judge_weights(ids[some], weights[some]).outside.any()),
            )
            if not (all(right) or (both and any(right))):
                break
        else:
            if all(right):
                return (mistake.name,)
            found.append((mistake.name, right))
    lines = []
    for part, what in enumerate(("experts", "weights")):
        names = (name for name, right in found if right[part])
        lines += [f"{name} (explains the {what} alone)" for name in names][:1]
    return tuple(lines)


def _chooses(made: Rows, ids: Tensor, wanted: Tensor, wrong: Tensor) -> bool:
    """Whether a mistake may lead to these experts, and not as well to those that are wanted.

    A mistake that makes keys too alike to tell would explain any choice.
    """
    other = (ids.sort(1).values != made.ids.sort(1).values).any(1)
    return all(
        made.beaten(token, ids[token]) is None
        and not (wrong[token] and made.beaten(token, wanted[token]) is None)
        for token in other.nonzero().flatten().tolist()
    )
