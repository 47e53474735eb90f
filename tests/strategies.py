"""Recipes and inputs: DeepSeek's, which has every step, and hypothesis's."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import torch
from hypothesis import strategies as st

from pytest_moe_routing.logits import bell, integers
from pytest_moe_routing.routing.recipe import NORMALIZATIONS, SCORES, Recipe

DEEPSEEK = Recipe(
    top_k=8,
    score="sigmoid",
    bias=True,
    n_group=8,
    topk_group=4,
    normalize="sum",
    epsilon=1e-20,
    scale=2.5,
)


@st.composite
def recipes(draw, *, mistaken=False):
    """(recipe, number of experts) that fit each other.

    A `mistaken` recipe may mask excluded groups with a number, weigh by selection scores, or round
    its scores to bfloat16.
    """
    experts = draw(st.sampled_from([8, 12, 16, 24]))
    n_group = draw(st.sampled_from([g for g in (1, 2, 4) if experts % g == 0]))
    topk_group = draw(st.integers(1, n_group))
    per_group = topk_group == n_group and draw(st.booleans())
    step = n_group if per_group else 1
    recipe = Recipe(
        top_k=step * draw(st.integers(1, min(6, experts // n_group * topk_group) // step)),
        score=draw(st.sampled_from(SCORES)),
        weigh_by=draw(st.sampled_from(("", *SCORES))),
        bias=draw(st.booleans()),
        n_group=n_group,
        topk_group=topk_group,
        per_group=per_group,
        group_score=draw(st.sampled_from(("top2_sum", "max"))),
        normalize=draw(st.sampled_from(NORMALIZATIONS)),
        epsilon=draw(st.sampled_from((0.0, 1e-20))),
        scale=draw(st.sampled_from((1.0, 1.5, 2.5))),
        weight_on=draw(st.sampled_from(("output", "input"))),
    )
    if mistaken:
        recipe = replace(
            recipe,
            mask=draw(st.sampled_from((-inf, -1.0, 0.0))),
            weigh_by=draw(st.sampled_from((recipe.weigh_by, "selection"))),
            score_dtype=draw(st.sampled_from(("float32", "bfloat16"))),
        )
    return recipe, experts


seeds = st.integers(0, 2**31 - 1)


def inputs(recipe, num_experts, seed, num_tokens=4, coarse=False):
    """Logits and bias; `coarse` ones are small integers, full of ties."""
    if coarse:
        logits = (integers(num_tokens, num_experts, seed=seed, bits=2) - 2).to(torch.float32)
        bias = (integers(num_experts, seed=seed + 1, bits=1) - 1).to(torch.float32)
    else:
        logits = bell(num_tokens, num_experts, seed=seed)
        bias = bell(num_experts, seed=seed + 1) / 2
    return logits, bias if recipe.bias else None
