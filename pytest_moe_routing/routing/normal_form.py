"""Whether two recipes mean the same: each is written in its simplest words, and these compared.

Meaning is what real numbers would give. Precision is not meaning: rounding of bias, weights or
scaling factor, and an epsilon against 0/0; `Recipe.differences` still shows them. That equal normal
forms mean the same, and unequal ones do not, is tested by running recipes.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from math import inf
from typing import Any

from pytest_moe_routing.routing.recipe import Recipe

#: An epsilon above this changes weights that bfloat16 can tell apart.
_NEGLIGIBLE = 1e-4


@lru_cache(maxsize=1 << 16)
def normal_form(recipe: Recipe, num_experts: int) -> Recipe:
    """Return the one recipe that stands for all that mean the same for this many experts."""
    weight = _weight(recipe, num_experts)
    choice = _choice(recipe, num_experts, weight["weigh_by"] == "selection")
    return Recipe(top_k=recipe.top_k, **choice, **weight)


def same(wanted: Recipe, got: Recipe, num_experts: int) -> bool:
    """Whether both recipes give every token the same experts, with the same weights."""
    return normal_form(wanted, num_experts) == normal_form(got, num_experts)


def _choice(recipe: Recipe, num_experts: int, weighed: bool) -> dict[str, Any]:
    """Return the fields that decide which experts are chosen.

    Where selection scores are `weighed` as well, they matter even to a constant choice.
    """
    grouped, size = recipe.grouped, num_experts // recipe.n_group
    mask = _mask(recipe, num_experts)
    # The k best experts lie in the k groups of the best maxima.
    if recipe.group_score == "max" and recipe.top_k <= recipe.topk_group and mask == -inf:
        grouped = False
    groups: dict[str, Any] = {}
    ranks_sums = False
    if recipe.per_group and recipe.n_group > 1:
        groups = {name: getattr(recipe, name) for name in ("n_group", "topk_group", "per_group")}
    elif grouped:
        groups = {name: getattr(recipe, name) for name in ("n_group", "topk_group", "group_score")}
        groups["mask"] = mask
        # Groups of one have no second expert: all sums are -inf, and the first groups are kept.
        ranks_sums = recipe.group_score == "top2_sum" and size > 1
    # A constant set: all experts, or all of the groups that are kept whatever the logits are.
    always = grouped and size == 1 and mask == -inf
    if recipe.top_k == (recipe.topk_group if always else num_experts):
        if not always:
            groups, grouped, ranks_sums = {}, False, False
        if not weighed:
            return {"score": "identity", **groups}
    # Scores keep the order of logits, but neither that of sums nor that of biased scores.
    if recipe.bias or ranks_sums:
        return {"score": recipe.score, "bias": recipe.bias, **groups}
    # With a mask, what matters is whether scores can lie below it. Without groups there is none.
    unmasked = mask == -inf or recipe.score == "identity"
    return {"score": "identity" if unmasked else "sigmoid", **groups}


def _mask(recipe: Recipe, num_experts: int) -> float:
    """Return the mask of excluded groups, -inf where it lets in no expert of theirs.

    All scores but raw logits lie above 0 (that float32 underflows is precision): without a bias
    every mask is as good as 0, and lets in experts only where the kept groups have too few.
    """
    if not recipe.grouped:
        return -inf
    if recipe.bias or recipe.score == "identity":
        return recipe.mask
    enough = recipe.top_k <= num_experts // recipe.n_group * recipe.topk_group
    return -inf if enough else 0.0


def _weight(recipe: Recipe, num_experts: int) -> dict[str, Any]:
    """Return the fields that decide the weights of the chosen."""
    weigh_by, normalize, epsilon = recipe.weigh_by, recipe.normalize, 0.0
    if weigh_by == "selection" and not recipe.bias:
        weigh_by = recipe.score
    if normalize == "sum" and recipe.epsilon > _NEGLIGIBLE:
        epsilon = recipe.epsilon
    elif normalize != "none" and recipe.top_k == 1:
        # The only weight, over itself.
        weigh_by, normalize = "identity", "softmax"
    elif weigh_by == "softmax" and (
        normalize == "sum" or (normalize == "none" and recipe.top_k == num_experts)
    ):
        # The sum over all experts cancels out, or is the sum over the chosen.
        weigh_by, normalize = "identity", "softmax"
    # Kernels take the factor as float32.
    scale: float = struct.unpack("f", struct.pack("f", recipe.scale))[0]
    always_one = (recipe.top_k, weigh_by, normalize, scale) == (1, "identity", "softmax", 1.0)
    return {
        "weigh_by": weigh_by,
        "normalize": normalize,
        "epsilon": epsilon,
        "scale": scale,
        # A weight of 1 does nothing on either side.
        "weight_on": "output" if always_one else recipe.weight_on,
    }
