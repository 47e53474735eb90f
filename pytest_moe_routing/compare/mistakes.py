"""What may be wrong with a routing, as data: each mistake is an edit of the recipe or its inputs.

A routing that is wrong, but right to the last token once the reference makes the same mistake, is
diagnosed. Nothing is guessed from ratios or correlations. Faults of the simulated kernels and the
tests use the same objects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pytest_moe_routing.compare.rows import Rows
from pytest_moe_routing.reference.routing import as_bfloat16
from pytest_moe_routing.routing.recipe import Recipe


@dataclass(frozen=True)
class Inputs:
    """What is routed: logits `[num_tokens, num_experts]`, by a recipe, with its bias."""

    logits: Tensor
    recipe: Recipe
    bias: Tensor | None


@dataclass(frozen=True)
class Mistake:
    """One way to be wrong.

    Attributes:
        name: What a diagnosis says.
        edit: From what should be routed to what is routed instead.
        when: Whether a recipe leaves room for this mistake.
        rounds: It rounds to bfloat16, which proves nothing where that is allowed.
    """

    name: str
    edit: Callable[[Inputs], Inputs]
    when: Callable[[Recipe], bool] = lambda recipe: True
    rounds: bool = False

    def made(self, inputs: Inputs) -> Inputs | None:
        """Return what is routed instead of some inputs; None if that is the same."""
        if not self.when(inputs.recipe):
            return None
        edited = self.edit(inputs)
        if edited.recipe == inputs.recipe and edited.logits is inputs.logits:
            return None if edited.bias is inputs.bias else edited
        return edited if edited.recipe.bias else replace(edited, bias=None)


def recipe_with(**fields: Any) -> Callable[[Inputs], Inputs]:
    """Return an edit that gives a recipe other fields."""
    return lambda x: replace(x, recipe=replace(x.recipe, **fields))


def _scaled_twice(x: Inputs) -> Inputs:
    return replace(x, recipe=replace(x.recipe, scale=x.recipe.scale**2))


def _rounded_logits(x: Inputs) -> Inputs:
    return replace(x, logits=as_bfloat16(x.logits))


def _biased(recipe: Recipe) -> bool:
    return recipe.bias


def _grouped(recipe: Recipe) -> bool:
    return recipe.grouped


_SUM = "groups are ranked by the sum of their two best experts, not by the best"
_MAX = "groups are ranked by their best expert, not by the sum of their two best"
#: Where all keys are lower, one number cannot be told from another.
_MASK = "experts of excluded groups take part, with a number such as 0 for their keys"

NO_BIAS = Mistake("the router's correction bias is ignored", recipe_with(bias=False))
BFLOAT16_BIAS = Mistake(
    "the router's correction bias is rounded to bfloat16",
    recipe_with(bias_dtype="bfloat16"),
    _biased,
)
NO_GROUPS = Mistake("the group limit is ignored", recipe_with(n_group=1, topk_group=1))
NOT_NORMALIZED = Mistake(
    "router weights are not normalized",
    recipe_with(normalize="none", epsilon=0.0),
    lambda r: r.normalize == "sum",
)
NORMALIZED = Mistake(
    "router weights are normalized, and should not be",
    recipe_with(normalize="sum"),
    lambda r: r.normalize == "none" and r.top_k > 1,
)
NO_SCALE = Mistake("the routed scaling factor is missing", recipe_with(scale=1.0))
SCALED_TWICE = Mistake("the routed scaling factor is applied twice", _scaled_twice)
BIASED_WEIGHTS = Mistake(
    "router weights are those of score + bias", recipe_with(weigh_by="selection"), _biased
)
BFLOAT16_WEIGHTS = Mistake(
    "router weights are rounded to bfloat16", recipe_with(weight_dtype="bfloat16"), rounds=True
)
BFLOAT16_LOGITS = Mistake("router logits are rounded to bfloat16", _rounded_logits)
BFLOAT16_SCORES = Mistake(
    "scores are rounded to bfloat16", recipe_with(score_dtype="bfloat16"), rounds=True
)
BFLOAT16_ROUTER = Mistake(
    "scores and weights are computed in bfloat16",
    recipe_with(score_dtype="bfloat16", normalize_dtype="bfloat16"),
    rounds=True,
)
NO_EPSILON = Mistake(
    "all chosen scores underflow to 0, and 0/0 is NaN without the recipe's epsilon",
    recipe_with(epsilon=0.0),
    lambda r: r.normalize == "sum",
)
RANKED_BY_SUM = Mistake(_SUM, recipe_with(group_score="top2_sum"), _grouped)
RANKED_BY_MAX = Mistake(_MAX, recipe_with(group_score="max"), _grouped)
MASKED_WITH_0 = Mistake(_MASK, recipe_with(mask=0.0), _grouped)
MASKED_WITH_MINUS_1 = Mistake(_MASK, recipe_with(mask=-1.0), _grouped)
RANKED_BY_MAX_AND_MASKED = Mistake(
    f"{_MAX}; {_MASK}",
    recipe_with(group_score="max", mask=0.0),
    lambda r: r.grouped and r.group_score != "max",
)

#: Mistakes that any fused MoE may make as well.
RECIPES = (NO_BIAS, BFLOAT16_BIAS, NO_GROUPS, NOT_NORMALIZED, NORMALIZED)

#: In the order in which they are tried. Some are special cases of others: the plainer first.
MISTAKES = (
    NO_SCALE,
    SCALED_TWICE,
    BIASED_WEIGHTS,
    BFLOAT16_WEIGHTS,
    BFLOAT16_LOGITS,
    BFLOAT16_SCORES,
    BFLOAT16_ROUTER,
    NO_EPSILON,
    *RECIPES,
    RANKED_BY_SUM,
    RANKED_BY_MAX,
    MASKED_WITH_0,
    MASKED_WITH_MINUS_1,
    RANKED_BY_MAX_AND_MASKED,
)


def diagnose(
    rows: Rows,
    ids: Tensor,
    weights: Tensor | None,
    tokens: Tensor,
    worst: Tensor,
    wrong: tuple[Tensor, Tensor],
) -> tuple[str, ...]:
    """Return the mistake that explains a routing; or one for its experts, and one for its weights.

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
        made = mistake.made(Inputs(rows.logits, rows.recipe, rows.bias))
        if made is None or (mistake.rounds and rounded):
            continue
        for some in (worst, tokens):
            view = Rows(made.logits[some], made.recipe, made.bias, rows.precision)
            view.lower_index = rows.lower_index
            right = (
                _chooses(view, ids[some], rows.ids[some], wrong[0][some]),
                weights is None or _weighs(view, ids[some], weights[some], wrong[1][some]),
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


def _chooses(view: Rows, ids: Tensor, wanted: Tensor, wrong: Tensor) -> bool:
    """Return whether a mistake may lead to these experts, and not as well to those wanted.

    A mistake that makes keys too alike to tell would explain any choice.
    """
    other = (ids.sort(1).values != view.ids.sort(1).values).any(1)
    return all(
        view.beaten(token, ids[token]) is None
        and not (wrong[token] and view.beaten(token, wanted[token]) is None)
        for token in other.nonzero().flatten().tolist()
    )


def _weighs(view: Rows, ids: Tensor, weights: Tensor, wrong: Tensor) -> bool:
    """Return whether a mistake leads to these weights.

    Where it may leave them undefined, any number would be explained: a wrong one must be NaN.
    """
    may = view.judge_weights(ids, weights)
    vague = may.undefined & ~weights.isnan() & wrong.unsqueeze(1)
    return not bool((may.outside | vague).any())
