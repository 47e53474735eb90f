"""Meaning is computed: recipes that mean the same are told from those that do not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pytest_moe_routing.backends import FlashInfer, exact_calls, same_calls
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.logits import make
from pytest_moe_routing.models import load_models
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing import METHODS, Recipe, RoutingMethodType, recipe_of
from pytest_moe_routing.routing.equivalence import counterexample, same

T = RoutingMethodType
MODELS = load_models(packaged_directory())
GROUPED = Recipe(
    top_k=8, score="sigmoid", bias=True, n_group=8, topk_group=4, normalize="sum", scale=2.5
)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Recipe(top_k=8, normalize="sum"), METHODS[T.Renormalize].bind(top_k=8)),
        (METHODS[T.RenormalizeNaive].bind(top_k=4), METHODS[T.Renormalize].bind(top_k=4)),
        (METHODS[T.Sigmoid].bind(top_k=4), METHODS[T.TopKSigmoid].bind(top_k=4)),
        (METHODS[T.Llama4].bind(top_k=1), METHODS[T.Sigmoid].bind(top_k=1)),
        (
            METHODS[T.DeepSeekV3].bind(top_k=8, bias=True, scale=2.5),
            METHODS[T.MiniMax2].bind(top_k=8, bias=True, scale=2.5),
        ),
        (Recipe(top_k=1, normalize="sum"), Recipe(top_k=1, score="sigmoid", normalize="sum")),
        (GROUPED, replace(GROUPED, epsilon=1e-20, bias_dtype="bfloat16", weight_dtype="bfloat16")),
        (replace(GROUPED, topk_group=8), replace(GROUPED, n_group=1, topk_group=1)),
        (
            replace(GROUPED, group_score="max", top_k=4),
            replace(GROUPED, n_group=1, topk_group=1, top_k=4),
        ),
    ],
    ids=str,
)
def test_the_same_in_other_words(one, other):
    assert same(one, other, 256)
    assert same(other, one, 256)


CHANGES = [
    {"top_k": 7},
    {"score": "softmax", "weigh_by": "softmax"},
    {"score": "identity", "weigh_by": "sigmoid"},
    {"weigh_by": "softmax"},
    {"bias": False},
    {"n_group": 1, "topk_group": 1},
    {"topk_group": 3},
    {"n_group": 16},
    {"group_score": "max"},
    {"normalize": "none"},
    {"normalize": "softmax"},
    {"scale": 1.0},
    {"scale": 2.5000001},
    {"weight_on": "input"},
]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_field_is_told_apart(change):
    other = replace(GROUPED, **change)
    example = counterexample(GROUPED, other, 256)
    assert example is not None
    assert counterexample(other, GROUPED, 256) is not None


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_counterexample_can_be_checked_by_hand(change):
    """The token it names, routed by both recipes from scratch, gives what it says."""
    other = replace(GROUPED, **change)
    example = counterexample(GROUPED, other, 256)
    inputs = make(example.pattern, replace(GROUPED, bias=True), num_tokens=16, num_experts=256)
    for recipe, said in ((GROUPED, example.wanted), (other, example.got)):
        got = route(
            inputs.logits, recipe, inputs.bias if recipe.bias else None, dtype=torch.float64
        )
        row = dict(
            zip(
                got.topk_ids[example.token].tolist(),
                got.topk_weights[example.token].tolist(),
                strict=True,
            )
        )
        assert row == said
    assert all(example.logits[e] == inputs.logits[example.token, e].item() for e in example.logits)
    assert "wanted" in "\n".join(example.lines())


#: Worked out by hand from the methods' definitions, for the newest known release.
EXACT = {
    "deepseek-r1": {"DeepSeekV3"},
    "minimax-m2": {"DeepSeekV3", "MiniMax2"},
    "step-3.7-flash": {"DeepSeekV3", "MiniMax2"},
    "nemotron-3-nano": {"DeepSeekV3", "MiniMax2"},
    "nemotron-3-super": {"DeepSeekV3", "MiniMax2"},
}


@pytest.mark.parametrize("model", EXACT)
def test_the_methods_that_mean_what_a_model_means(model):
    found = {c.method for c in exact_calls(MODELS[model], "nvfp4", FlashInfer.of("0.7.2.post1"))}
    assert found == EXACT[model]


def test_llama4_can_be_expressed_where_the_weight_goes_on_the_input():
    flashinfer = FlashInfer.of("0.7.2.post1")
    scout = MODELS["llama-4-scout"]
    on_input = {c.method for c in exact_calls(scout, "fp8_per_tensor", flashinfer)}
    assert on_input == {"Llama4", "Sigmoid", "TopKSigmoid"}
    assert exact_calls(scout, "nvfp4", flashinfer) == []


def test_every_model_means_what_its_recipe_says_and_no_neighbour():
    """No two of the models' routers are taken for each other, but where they are the same."""
    recipes = {model: recipe_of(spec.router) for model, spec in MODELS.items()}
    assert same(recipes["llama-4-scout"], recipes["llama-4-maverick"], 128)
    assert not same(recipes["minimax-m2"], recipes["step-3.7-flash"], 256)
    assert not same(recipes["nemotron-3-nano"], recipes["deepseek-r1"], 256)


def test_a_router_that_is_not_expressible_equals_nothing():
    gemma = MODELS["gemma-4-26b-a4b"].router
    assert gemma.not_expressible
    assert same_calls(gemma, "nvfp4", FlashInfer.of("0.7.2.post1")) == []
    plain = replace(gemma, not_expressible=None)
    assert same_calls(plain, "nvfp4", FlashInfer.of("0.7.2.post1")) != []
