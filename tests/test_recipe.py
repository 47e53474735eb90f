"""Recipes in words: every step that a message has to name, and none that does nothing."""

from __future__ import annotations

import pytest

from pytest_moe_routing.routing import Recipe

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
