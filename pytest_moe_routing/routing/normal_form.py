"""Whether two recipes mean the same: each is written in its simplest words, and these compared.

Meaning is what real numbers would give. Precision is not meaning: rounding of bias, weights or
scaling factor, and an epsilon against 0/0; `Recipe.differences` still shows them. That equal normal
forms mean the same, and unequal ones do not, is tested by running recipes.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

from pytest_moe_routing.routing.recipe import Recipe

#: An epsilon above this changes weights that bfloat16 can tell apart.
_NEGLIGIBLE = 1e-4


@lru_cache(maxsize=1 << 16)
def normal_form(recipe: Recipe, num_experts: int) -> Recipe:
    """The one recipe that stands for all that mean the same for this many experts."""
    return Recipe(
        top_k=recipe.top_k,
        **_choice(recipe, num_experts),
        **_weight(recipe, num_experts),
    )


def same(wanted: Recipe, got: Recipe, num_experts: int) -> bool:
    """Whether both recipes give every token the same experts, with the same weights."""
    return normal_form(wanted, num_experts) == normal_form(got, num_experts)


def _choice(recipe: Recipe, num_experts: int) -> dict[str, Any]:
    """The fields that decide which experts are chosen."""
    grouped, size = recipe.grouped, num_experts // recipe.n_group
    # The k best experts lie in the k groups of the best maxima.
    if recipe.group_score == "max" and recipe.top_k <= recipe.topk_group:
        grouped = False
    groups: dict[str, Any] = {}
    ranks_sums = False
    if grouped:
        groups = {name: getattr(recipe, name) for name in ("n_group", "topk_group", "group_score")}
        # Groups of one have no second expert: all sums are -inf, and the first groups are kept.
        ranks_sums = recipe.group_score == "top2_sum" and size > 1
    # A constant set: all experts, or all of the groups that are kept whatever the logits are.
    kept = recipe.topk_group if grouped and size == 1 else num_experts
    if recipe.top_k == kept:
        return {"score": "identity", **groups}
    # Scores keep the order of logits, but neither that of sums nor that of biased scores.
    matters = recipe.bias or ranks_sums
    return {"score": recipe.score if matters else "identity", "bias": recipe.bias, **groups}


def _weight(recipe: Recipe, num_experts: int) -> dict[str, Any]:
    """The fields that decide the weights of the chosen."""
    weigh_by, normalize, epsilon = recipe.weigh_by, recipe.normalize, 0.0
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
