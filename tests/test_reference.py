"""The interpreter of recipes: against an oracle of loops, against the algebra's laws, at the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from oracles import route_all
from strategies import inputs, recipes, seeds

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.logits import PATTERNS, make_case
from pytest_moe_routing.reference.routing import route, stable_topk
from pytest_moe_routing.routing.recipe import Recipe

GROUPED = Recipe(
    top_k=4, score="sigmoid", bias=True, n_group=4, topk_group=2, normalize="sum", scale=2.5
)
PLAIN = Recipe(top_k=4)


@settings(max_examples=600, deadline=None)
@given(recipes(mistaken=True), seeds, st.booleans())
def test_equals_the_loop_oracle(recipe_and_experts, seed, coarse):
    recipe, experts = recipe_and_experts
    logits, bias = inputs(recipe, experts, seed, coarse=coarse)
    # Numbers of both signs may sum to zero: IEEE's business, tested below, and an exception in
    # plain Python.
    signed = recipe.weigh_by in ("identity", "selection")
    assume(not (coarse and signed and recipe.normalize == "sum"))
    got = route(logits, recipe, bias, dtype=torch.float64)
    ids, weights = route_all(logits, recipe, bias)
    assert got.topk_ids.tolist() == ids
    wanted = torch.tensor(weights, dtype=torch.float64)
    assert torch.allclose(got.topk_weights, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [n for n in PATTERNS if n != "not-finite"])
def test_equals_the_loop_oracle_on_adversarial_logits(name):
    case = make_case(name, GROUPED, num_tokens=32, num_experts=64)
    got = route(case.logits, GROUPED, case.bias, dtype=torch.float64)
    ids, _ = route_all(case.logits.double(), GROUPED, case.bias.double())
    assert got.topk_ids.tolist() == ids


@settings(max_examples=100, deadline=None)
@given(recipes(), seeds, st.sampled_from((0.25, -3.0, 64.0)))
def test_a_constant_added_to_the_bias_changes_nothing(recipe_and_experts, seed, shift):
    recipe, experts = recipe_and_experts
    recipe = replace(recipe, bias=True)
    logits, bias = inputs(recipe, experts, seed)
    plain = route(logits, recipe, bias, dtype=torch.float64)
    shifted = route(logits, recipe, bias.double() + shift, dtype=torch.float64)
    assert torch.equal(plain.topk_ids, shifted.topk_ids)
    assert torch.equal(plain.topk_weights, shifted.topk_weights)


@settings(max_examples=100, deadline=None)
@given(recipes(), seeds)
def test_the_bias_chooses_and_never_weighs(recipe_and_experts, seed):
    recipe, experts = recipe_and_experts
    recipe = replace(recipe, bias=True, n_group=1, topk_group=1)
    logits, _ = inputs(recipe, experts, seed)
    unbiased = route(logits[:1], replace(recipe, bias=False), dtype=torch.float64)
    # Raise exactly the experts that are chosen anyway: the same set, hence the same weights.
    bias = torch.zeros(experts, dtype=torch.float64)
    bias[unbiased.topk_ids[0]] = 4.0
    biased = route(logits[:1], recipe, bias, dtype=torch.float64)
    assert torch.equal(biased.dense(experts), unbiased.dense(experts))


@settings(max_examples=100, deadline=None)
@given(recipes(), seeds)
def test_scale_is_linear(recipe_and_experts, seed):
    recipe, experts = recipe_and_experts
    logits, bias = inputs(recipe, experts, seed)
    once = route(logits, replace(recipe, scale=1.0), bias, dtype=torch.float64)
    twice = route(logits, replace(recipe, scale=2.0), bias, dtype=torch.float64)
    assert torch.equal(twice.topk_weights, 2 * once.topk_weights)


@settings(max_examples=100, deadline=None)
@given(recipes(), seeds)
def test_void_groups_change_nothing(recipe_and_experts, seed):
    recipe, experts = recipe_and_experts
    logits, bias = inputs(recipe, experts, seed, coarse=True)
    void = route(logits, replace(recipe, topk_group=recipe.n_group, per_group=False), bias)
    none = route(logits, replace(recipe, n_group=1, topk_group=1), bias)
    assert torch.equal(void.topk_ids, none.topk_ids)


@settings(max_examples=100, deadline=None)
@given(recipes(), seeds)
def test_a_limit_by_best_expert_is_void_when_top_k_fits_the_groups(recipe_and_experts, seed):
    recipe, experts = recipe_and_experts
    recipe = replace(recipe, group_score="max", per_group=False)
    recipe = replace(recipe, top_k=min(recipe.top_k, recipe.topk_group))
    logits, bias = inputs(recipe, experts, seed)
    limited = route(logits, recipe, bias)
    free = route(logits, replace(recipe, n_group=1, topk_group=1), bias)
    assert torch.equal(limited.topk_ids, free.topk_ids)


def test_softmax_then_top_k_then_sum_is_top_k_then_softmax():
    logits = make_case("plain", PLAIN, num_tokens=64, num_experts=32).logits
    first = route(logits, replace(PLAIN, normalize="sum"), dtype=torch.float64)
    second = route(
        logits,
        replace(PLAIN, score="identity", weigh_by="identity", normalize="softmax"),
        dtype=torch.float64,
    )
    assert torch.equal(first.topk_ids, second.topk_ids)
    assert torch.allclose(first.topk_weights, second.topk_weights, rtol=1e-12)


def test_top_1_normalized_by_sum_weighs_1():
    case = make_case("plain", GROUPED, num_tokens=64, num_experts=32)
    got = route(case.logits, replace(GROUPED, top_k=1, scale=1.0), case.bias)
    assert torch.equal(got.topk_weights, torch.ones(64, 1))


@pytest.mark.parametrize(
    "recipe", [PLAIN, GROUPED, Recipe(top_k=4, score="identity", normalize="softmax")], ids=str
)
def test_rows_that_are_not_finite_give_distinct_experts_in_range(recipe):
    case = make_case("not-finite", recipe, num_tokens=40, num_experts=32)
    ids = route(case.logits, recipe, case.bias).topk_ids
    assert 0 <= int(ids.min()) <= int(ids.max()) < 32
    assert all(len(set(row)) == 4 for row in ids.tolist())


def test_documented_results_without_finite_logits():
    nan, inf = torch.nan, torch.inf
    logits = torch.tensor([[0.0, nan, 2, nan], [-inf] * 4, [1.0] * 4, [-inf, inf, 0, -inf]])
    ids = route(logits, Recipe(top_k=3, score="sigmoid")).topk_ids.tolist()
    assert ids == [[1, 3, 2], [0, 1, 2], [0, 1, 2], [1, 2, 0]]


def test_excluded_groups_are_no_candidates_even_below_minus_infinity():
    recipe = Recipe(top_k=2, score="identity", n_group=2, topk_group=1, group_score="max")
    logits = torch.tensor([[-torch.inf, 5.0, 4.0, 4.0], [1.0, 1.0, 2.0, -torch.inf]])
    assert route(logits, recipe).topk_ids.tolist() == [[1, 0], [2, 3]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_of_any_dtype_are_read_exactly(dtype):
    logits = make_case("plain", PLAIN, num_tokens=16, num_experts=32).logits.to(dtype)
    assert torch.equal(route(logits, PLAIN).topk_weights, route(logits.float(), PLAIN).topk_weights)


def test_weights_that_sum_to_zero_follow_ieee_and_an_epsilon_saves_them():
    logits = torch.full((1, 8), -200.0)
    recipe = Recipe(top_k=2, score="sigmoid", normalize="sum")
    assert route(logits, recipe).topk_weights.isnan().all()
    saved = route(logits, replace(recipe, epsilon=1e-20)).topk_weights
    assert torch.equal(saved, torch.zeros(1, 2))


def test_weights_are_rounded_to_their_dtype():
    logits = make_case("plain", PLAIN, num_tokens=16, num_experts=32).logits
    rounded = route(logits, replace(PLAIN, weight_dtype="bfloat16")).topk_weights
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(rounded, route(logits, PLAIN).topk_weights)


def test_a_bias_rounded_to_bfloat16_chooses_other_experts():
    case = make_case("narrow-bias", GROUPED, num_tokens=64, num_experts=32)
    rounded = route(case.logits, replace(GROUPED, bias_dtype="bfloat16"), case.bias)
    assert not torch.equal(rounded.topk_ids, route(case.logits, GROUPED, case.bias).topk_ids)


@settings(max_examples=200, deadline=None)
@given(seeds, st.integers(1, 12), st.integers(1, 12))
def test_stable_topk_is_a_stable_sort(seed, columns, k):
    logits, _ = inputs(PLAIN, columns, seed, num_tokens=8, coarse=True)
    k = min(k, columns)
    wanted = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    assert torch.equal(stable_topk(logits, k), wanted)


def test_no_tokens():
    got = route(torch.zeros(0, 32), GROUPED, torch.zeros(32))
    assert got.topk_ids.shape == got.topk_weights.shape == (0, 4)


@pytest.mark.parametrize(
    ("logits", "bias", "recipe", "message"),
    [
        (torch.zeros(4), None, PLAIN, "expected floating [num_tokens, num_experts]"),
        (torch.zeros(2, 8, dtype=torch.int32), None, PLAIN, "found torch.int32"),
        (torch.zeros(2, 8), torch.zeros(8), PLAIN, "bias: found one, but"),
        (torch.zeros(2, 8), None, GROUPED, "bias: found none, but"),
        (torch.zeros(2, 8), torch.zeros(7), GROUPED, "expected floating [8]"),
        (torch.zeros(2, 9), torch.zeros(9), GROUPED, "does not divide 9"),
        (torch.zeros(2, 3), None, PLAIN, "expected at most 3 experts"),
    ],
)
def test_misuse_is_one_clear_error(logits, bias, recipe, message):
    with pytest.raises(RecipeError) as caught:
        route(logits, recipe, bias)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"score": "tanh"}, "Recipe.score: found 'tanh', expected one of identity"),
        ({"top_k": 0}, "expected top_k >= 1"),
        ({"n_group": 2, "topk_group": 3}, "topk_group <= n_group"),
    ],
)
def test_impossible_recipes_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(**fields)
