"""Recipes in words: every step that a message has to name, and none that does nothing."""

from __future__ import annotations

import pytest
import torch

from pytest_moe_routing.logits import bell
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing import METHODS, Recipe

WORDS = {
    "softmax -> top 1": {},
    "top 1": {"score": "identity"},
    "top 1 -> sigmoid": {"score": "identity", "weigh_by": "sigmoid"},
    "sigmoid -> + bias to choose -> top 8": {"score": "sigmoid", "bias": True, "top_k": 8},
    "sigmoid -> + bias to choose -> top 1 -> weigh with the bias": {
        "score": "sigmoid",
        "bias": True,
        "weigh_by": "selection",
    },
    "softmax -> best 4 of 8 groups by max -> top 1": {
        "n_group": 8,
        "topk_group": 4,
        "group_score": "max",
    },
    "softmax -> best 1 of 2 groups by top2_sum -> mask the others with -1 -> top 1": {
        "n_group": 2,
        "mask": -1.0,
    },
    "softmax -> top 2 of each of 4 groups -> / sum": {
        "top_k": 8,
        "n_group": 4,
        "topk_group": 4,
        "per_group": True,
        "normalize": "sum",
    },
    # Groups that exclude nothing are no step, whatever the others would be masked with.
    "softmax -> top 2": {"top_k": 2, "n_group": 4, "topk_group": 4, "mask": -1.0},
    "softmax -> top 1 -> / sum": {"normalize": "sum"},
    "top 1 -> softmax of the chosen": {"score": "identity", "normalize": "softmax"},
    "softmax -> top 1 -> x 2.5": {"scale": 2.5},
    "softmax -> top 1 -> weight on the expert input": {"weight_on": "input"},
}


@pytest.mark.parametrize("words", WORDS)
def test_a_recipe_in_words(words):
    assert str(Recipe(**WORDS[words])) == words


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_weights_of_flashinfers_methods_are_bfloat16_numbers(method):
    """Its kernels write `topk_weights` in bfloat16, whatever the dtype of the logits is."""
    recipe = METHODS[method].bind(top_k=3, routed_scaling_factor=2.3)
    weights = route(bell(8, 16, seed=1), recipe).topk_weights
    assert torch.equal(weights, weights.to(torch.bfloat16).to(weights.dtype))
    float32 = route(bell(8, 16, seed=1), Recipe(top_k=3)).topk_weights
    assert not torch.equal(float32, float32.to(torch.bfloat16).to(float32.dtype))
