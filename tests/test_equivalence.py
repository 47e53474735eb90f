"""Meaning is computed: recipes that mean the same are told from those that do not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import strategies
import torch
from hypothesis import given, settings

from pytest_moe_routing.compare.equivalence import counterexample
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.logits import bell, integers
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.exact import exact_calls, same_calls
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.report import text
from pytest_moe_routing.routing import (
    METHODS,
    Recipe,
    RoutingMethodType,
    normal_form,
    recipe_of,
    same,
)
from pytest_moe_routing.routing.recipe import NORMALIZATIONS, SCORES, WEIGHTS

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
            METHODS[T.DeepSeekV3].bind(top_k=8, bias=True, routed_scaling_factor=2.5),
            METHODS[T.MiniMax2].bind(top_k=8, bias=True, routed_scaling_factor=2.5),
        ),
        (Recipe(top_k=1, normalize="sum"), Recipe(top_k=1, score="sigmoid", normalize="sum")),
        (GROUPED, replace(GROUPED, epsilon=1e-20, bias_dtype="bfloat16", weight_dtype="bfloat16")),
        (replace(GROUPED, topk_group=8), replace(GROUPED, n_group=1, topk_group=1)),
        (
            replace(GROUPED, group_score="max", top_k=4),
            replace(GROUPED, n_group=1, topk_group=1, top_k=4),
        ),
        (replace(GROUPED, bias=False), replace(GROUPED, bias=False, mask=-1.0)),
        (replace(GROUPED, bias=False), replace(GROUPED, bias=False, mask=0.0)),
        (replace(GROUPED, bias=False), replace(GROUPED, bias=False, weigh_by="selection")),
        (replace(GROUPED, topk_group=8), replace(GROUPED, topk_group=8, mask=0.0)),
        (GROUPED, replace(GROUPED, score_dtype="bfloat16", normalize_dtype="bfloat16")),
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
    {"mask": -1.0},
    {"mask": 0.0},
    {"weigh_by": "selection"},
    {"normalize": "none"},
    {"normalize": "softmax"},
    {"scale": 1.0},
    {"scale": 2.500001},
    {"weight_on": "input"},
]


def check_by_hand(one, other, num_experts):
    """The token, routed by both recipes from scratch, gives what is said, and that differs.

    Their normal forms are run: groups that exclude nothing would still have to divide its experts.
    """
    example = counterexample(one, other, num_experts)
    assert example.num_experts <= num_experts
    one, other = normal_form(one, num_experts), normal_form(other, num_experts)
    logits = torch.tensor([example.logits], dtype=torch.float64)
    bias = torch.tensor(example.bias, dtype=torch.float64)
    for recipe, said in ((one, example.wanted), (other, example.got)):
        got = route(logits, recipe, bias if recipe.bias else None, dtype=torch.float64)
        row = dict(zip(got.topk_ids[0].tolist(), got.topk_weights[0].tolist(), strict=True))
        assert row == pytest.approx(said, rel=1e-7)
    assert example.sides == (one.weight_on, other.weight_on)
    assert example.wanted != pytest.approx(example.got, rel=1e-8) or (
        example.sides[0] != example.sides[1] and set(example.wanted.values()) != {1.0}
    )
    assert all(value % 0.5 == 0 for value in (*example.logits, *example.bias))


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_every_field_is_told_apart(change):
    other = replace(GROUPED, **change)
    for one, two in ((GROUPED, other), (other, GROUPED)):
        assert not same(one, two, 256)
        check_by_hand(one, two, 256)


#: Worked out by hand: what is changed, and the token that shows it.
SMALLEST = [
    (
        {"scale": 1.0},
        ["a token of 8 experts", "logits   all 0", "bias     all 0"],
        ["wanted   0-7: 0.375", "got      0-7: 0.125"],
    ),
    (
        {"bias": False},
        ["a token of 9 experts", "logits   all 0", "bias     6: -0.5  others 0"],
        ["wanted   0-5 7-8: 0.375", "got      0-7: 0.375"],
    ),
    (
        {"weight_on": "input"},
        ["a token of 8 experts", "logits   all 0", "bias     all 0"],
        ["wanted   0-7: 0.375  on the expert output", "got      0-7: 0.375  on the expert input"],
    ),
]


@pytest.mark.parametrize(("change", "token", "weights"), SMALLEST, ids=str)
def test_the_smallest_token(change, token, weights):
    step = Recipe(top_k=8, score="sigmoid", bias=True, normalize="sum", scale=3.0)
    found = counterexample(step, replace(step, **change), 288)
    assert text.token(found.as_dict()) == [*token, *weights]


def test_the_smallest_token_of_groups():
    """8 groups of two: by their best, expert 0's group is kept; by their sums, it is not."""
    example = counterexample(GROUPED, replace(GROUPED, group_score="max"), 256)
    assert example.num_experts == 16
    assert example.logits == (0.5, *[0.0] * 15)
    assert example.bias == (0.0, -0.5, *[0.0] * 14)


def test_a_mask_matters_where_keys_can_lie_below_it():
    unbiased = replace(GROUPED, bias=False)
    # All 128 experts of the kept groups are not enough: 2 of the others are taken, lowest first.
    few = replace(unbiased, top_k=130, mask=-1.0)
    assert same(few, replace(few, mask=0.0), 256)
    raw = replace(unbiased, score="identity", weigh_by="sigmoid")
    assert not same(raw, replace(raw, mask=0.0), 256)


def test_the_smallest_token_of_a_mask():
    """Groups of two: expert 8 is kept with expert 9, and loses to an excluded expert at -1."""
    example = counterexample(GROUPED, replace(GROUPED, mask=-1.0), 256)
    assert example.bias == (*[0.0] * 8, -2.0, 2.5, *[0.0] * 6)
    assert (set(example.wanted), set(example.got)) == ({*range(6), 8, 9}, {*range(7), 9})


def test_a_weight_that_is_always_1_is_the_same_on_either_side():
    top1 = Recipe(top_k=1, normalize="sum")
    assert same(top1, replace(top1, weight_on="input"), 16)
    assert not same(replace(top1, scale=2.0), replace(top1, scale=2.0, weight_on="input"), 16)
    assert not same(Recipe(top_k=1), Recipe(top_k=1, weight_on="input"), 16)


def test_an_epsilon_matters_where_it_is_no_guard():
    plain = Recipe(top_k=4, score="sigmoid", normalize="sum")
    assert same(plain, replace(plain, epsilon=1e-6), 16)
    assert not same(plain, replace(plain, epsilon=0.01), 16)
    check_by_hand(plain, replace(plain, epsilon=0.01), 16)


def all_recipes(num_experts, *masks):
    """Every recipe of a few experts, but for factors; with masks, grouped ones alone."""
    divisors = [g for g in range(1, num_experts + 1) if num_experts % g == 0]
    groups = [(1, 1, "max")] + [
        (n, t, s) for n in divisors[1:] for t in range(1, n + 1) for s in ("max", "top2_sum")
    ]
    axes = itertools.product(
        groups, SCORES, WEIGHTS, (False, True), NORMALIZATIONS, ("output", "input")
    )
    for (n, t, s), score, weigh_by, bias, normalize, side in axes:
        recipe = Recipe(
            score=score,
            weigh_by=weigh_by,
            bias=bias,
            n_group=n,
            topk_group=t,
            group_score=s,
            normalize=normalize,
            weight_on=side,
        )
        if not masks:
            for top_k in range(1, num_experts // n * t + 1):
                yield replace(recipe, top_k=top_k)
        elif t < n < num_experts:
            for top_k, mask in itertools.product(range(1, num_experts + 1), masks):
                yield replace(recipe, top_k=top_k, mask=mask)


def run(recipe, logits, biases):
    """(weights by expert, which are chosen) of all tokens with all biases, flat, in float64."""
    weights, chosen = [], []
    for bias in biases:
        routing = route(logits, recipe, bias if recipe.bias else None, dtype=torch.float64)
        weights.append(routing.dense(logits.shape[1]))
        chosen.append(torch.zeros_like(weights[-1]).scatter(1, routing.topk_ids, 1.0))
    return torch.cat(weights).flatten(), torch.cat(chosen).flatten()


def witnesses(num_experts):
    """Wide, narrow, all negative and saturated logits, and ties; wide and narrow biases."""
    plain = bell(48, num_experts, seed=1)
    ties = integers(24, num_experts, seed=2, bits=2) * 0.5 + 0.5
    logits = torch.cat([plain * 3, plain / 2, plain - 8, plain + 16, ties]).to(torch.float64)
    biases = bell(num_experts, seed=4), bell(num_experts, seed=8) / 8 - 2
    return logits, (*biases, bell(num_experts, seed=5) / 2 - 1)


@pytest.mark.parametrize(
    ("num_experts", "every", "masks"),
    [(1, 1, ()), (2, 1, ()), (3, 1, ()), (4, 1, ()), (6, 7, ()), (4, 3, (-1.0, 0.0))],
    ids=str,
)
def test_normal_forms_are_equal_exactly_where_meanings_are(num_experts, every, masks):
    """Every recipe does what its normal form does; no two normal forms do the same."""
    logits, biases = witnesses(num_experts)
    forms = {}
    for recipe in itertools.islice(all_recipes(num_experts, *masks), 0, None, every):
        form = normal_form(recipe, num_experts)
        assert normal_form(form, num_experts) == form
        if form not in forms:
            forms[form] = run(form, logits, biases)
        if recipe == form or recipe.weight_on == "input":
            continue
        weights, chosen = run(recipe, logits, biases)
        assert torch.equal(chosen, forms[form][1]), (recipe, form)
        assert torch.allclose(weights, forms[form][0], rtol=1e-9, atol=0), (recipe, form)
    listed = list(forms.items())
    weights = torch.stack([w for _, (w, _) in listed])
    for i, (form, (weight, chosen)) in enumerate(listed):
        # A few tokens tell most apart.
        near = torch.isclose(weight[:120], weights[i + 1 :, :120], rtol=1e-7, atol=0).all(1)
        for j in (near.nonzero().flatten() + i + 1).tolist():
            other, (its_weight, its_chosen) = listed[j]
            alike = torch.equal(chosen, its_chosen) and torch.allclose(
                weight, its_weight, rtol=1e-7, atol=0
            )
            sides = form.weight_on != other.weight_on and not weight[chosen == 1].eq(1).all()
            assert not alike or sides, (form, other)


@settings(deadline=None, max_examples=60)
@given(strategies.recipes(mistaken=True), strategies.recipes(mistaken=True))
def test_what_differs_has_a_token_and_what_is_the_same_has_none(one, other):
    (one, num_experts), (other, its_experts) = one, other
    other = other if its_experts == num_experts else replace(one, weigh_by=other.weigh_by)
    if same(one, other, num_experts):
        assert counterexample(one, other, num_experts) is None
    else:
        check_by_hand(one, other, num_experts)


@pytest.mark.parametrize(("num_experts", "every"), [(4, 97), (8, 601)])
def test_neighbours_that_differ_have_a_token(num_experts, every):
    """One field changed at a time."""
    changes = [
        *({"score": score} for score in SCORES),
        *({"weigh_by": score} for score in SCORES),
        *({"normalize": normalize} for normalize in NORMALIZATIONS),
        {"bias": True},
        {"group_score": "top2_sum"},
        {"n_group": 1, "topk_group": 1},
        {"n_group": 4, "topk_group": 2},
        {"scale": 1.5},
        {"weight_on": "input"},
    ]
    found = 0
    for recipe in itertools.islice(all_recipes(num_experts), 0, None, every):
        for change in changes:
            other = replace(recipe, **change)
            fits = other.top_k <= num_experts // other.n_group * other.topk_group
            if fits and not same(recipe, other, num_experts):
                check_by_hand(recipe, other, num_experts)
                found += 1
    assert found > 100


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
    found = {
        c.method for c in exact_calls(MODELS[model], "nvfp4", FlashInfer.of(known_releases()[-1]))
    }
    assert found == EXACT[model]


def test_llama4_can_be_expressed_where_the_weight_goes_on_the_input():
    flashinfer = FlashInfer.of(known_releases()[-1])
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
    assert same_calls(gemma, "nvfp4", FlashInfer.of(known_releases()[-1])) == []
    plain = replace(gemma, not_expressible=None)
    assert same_calls(plain, "nvfp4", FlashInfer.of(known_releases()[-1])) != []
