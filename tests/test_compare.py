"""The comparator: honest rounding is never flagged, anything else always is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import DEEPSEEK, inputs, recipes, seeds

from pytest_moe_routing.compare import PRECISIONS, assert_routing, compare_routing
from pytest_moe_routing.compare.routing import agrees
from pytest_moe_routing.compare.rows import Rows
from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.logits import PATTERNS, bell, make_case
from pytest_moe_routing.reference import routing as reference
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing.recipe import Recipe

NAMES = "topk_ids", "topk_weights"
MINIMAX = replace(DEEPSEEK, n_group=1, topk_group=1)
RECIPES = {
    "deepseek": DEEPSEEK,
    "minimax": MINIMAX,
    "default": Recipe(top_k=8),
    "deepseek-v4": Recipe(top_k=6, score="sqrtsoftplus", bias=True, normalize="sum"),
    "renormalize": Recipe(top_k=8, score="identity", normalize="softmax"),
    "llama4": Recipe(top_k=1, score="identity", weigh_by="sigmoid"),
}


def hardware_route(logits, recipe, bias, seed=0):
    """A kernel with FlashInfer's sigmoid error: every expert's score off by up to 2.5e-4.

    Equal logits of a token get equal errors, as in any deterministic kernel.
    """
    logits = logits.float()
    scores = reference.score(logits, recipe.score)
    noise = bell(4096, seed=seed).clamp(-2, 2) / 2 * PRECISIONS["flashinfer"].sigmoid

    def sigmoid(x):
        place = (x * 4096).round().to(torch.int64) % 4096
        return (x.sigmoid() + noise[place]).clamp(0, 1)

    if recipe.score == "sigmoid":
        scores = sigmoid(logits)
    keys = reference.choosing_keys(scores, recipe, bias)
    ids = reference.choose(keys, recipe)
    weights = scores.gather(1, ids)
    if recipe.weigh_by == "sigmoid" and recipe.score != "sigmoid":
        weights = sigmoid(weights)
    if recipe.normalize == "sum":
        weights = weights / (weights.sum(1, keepdim=True) + recipe.epsilon)
    elif recipe.normalize == "softmax":
        weights = weights.softmax(1)
    return ids, (weights * recipe.scale).bfloat16()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", RECIPES)
def test_float32_is_never_flagged(name, pattern):
    recipe = RECIPES[name]
    case = make_case(pattern, recipe, num_tokens=64, num_experts=256)
    got = route(case.logits, recipe, case.bias)
    assert_routing(got.topk_ids, got.topk_weights, case.logits, recipe, case.bias)


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if p != "not-finite"])
@pytest.mark.parametrize("name", RECIPES)
def test_the_kernels_own_errors_are_never_flagged(name, pattern):
    recipe = RECIPES[name]
    case = make_case(pattern, recipe, num_tokens=64, num_experts=256)
    ids, weights = hardware_route(case.logits, recipe, case.bias)
    assert_routing(ids, weights, case.logits, recipe, case.bias, precision="flashinfer")


def test_the_kernels_errors_do_change_experts():
    """So the tolerance is needed, and the noise above is no noise for show."""
    case = make_case("near-ties", MINIMAX, num_tokens=64, num_experts=256)
    ids, _ = hardware_route(case.logits, MINIMAX, case.bias)
    found = compare_routing(ids, None, case.logits, MINIMAX, case.bias, precision="flashinfer")
    assert found.ok
    assert found.ambiguous > 32
    assert not compare_routing(ids, None, case.logits, MINIMAX, case.bias).ok


@settings(max_examples=150, deadline=None)
@given(recipes(mistaken=True), seeds, st.booleans())
def test_float32_of_any_recipe_is_never_flagged(recipe_and_experts, seed, coarse):
    recipe, experts = recipe_and_experts
    # A sum of raw logits may cancel to next to nothing, and then bounds nothing.
    if recipe.weigh_by == "identity" and recipe.normalize == "sum":
        recipe = replace(recipe, normalize="softmax")
    logits, bias = inputs(recipe, experts, seed, coarse=coarse)
    got = route(logits, recipe, bias)
    assert_routing(got.topk_ids, got.topk_weights, logits, recipe, bias)


MUTANTS = {
    "bias ignored": ({"bias": False}, "narrow-bias"),
    "groups ignored": ({"n_group": 1, "topk_group": 1}, "plain"),
    "one group too many": ({"topk_group": 5}, "plain"),
    "group score": ({"group_score": "max"}, "plain"),
    "not normalized": ({"normalize": "none"}, "plain"),
    "softmax of the chosen": ({"normalize": "softmax"}, "plain"),
    "scale lost": ({"scale": 1.0}, "plain"),
    "scale twice": ({"scale": 6.25}, "plain"),
    "other score": ({"score": "softmax", "weigh_by": "softmax"}, "plain"),
    "weighs another score": ({"weigh_by": "softmax"}, "plain"),
    "bias in bfloat16": ({"bias_dtype": "bfloat16"}, "narrow-bias"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("precision", ["float32", "flashinfer"])
def test_every_mutation_is_caught(mutant, precision):
    change, pattern = MUTANTS[mutant]
    case = make_case(pattern, DEEPSEEK, num_tokens=64, num_experts=256)
    wrong = replace(DEEPSEEK, **change)
    got = route(case.logits, wrong, case.bias if wrong.bias else None)
    found = compare_routing(
        got.topk_ids, got.topk_weights, case.logits, DEEPSEEK, case.bias, precision=precision
    )
    assert not found.ok


def test_logits_rounded_to_bfloat16_are_caught():
    case = make_case("near-ties", MINIMAX, num_tokens=64, num_experts=256)
    got = route(case.logits.bfloat16(), MINIMAX, case.bias)
    found = compare_routing(got.topk_ids, None, case.logits, MINIMAX, case.bias)
    assert len(found.differences) == 64


@pytest.mark.parametrize("mask", [0.0, -1.0])
def test_groups_masked_with_a_number_are_caught(mask):
    """vllm PR 13474 and flashinfer PR 2168: a bias below -1 loses to the excluded groups."""
    case = make_case("bias-below-minus-1", DEEPSEEK, num_tokens=64, num_experts=256)
    ids = route(case.logits, replace(DEEPSEEK, mask=mask), case.bias).topk_ids
    found = compare_routing(ids, None, case.logits, DEEPSEEK, case.bias, precision="flashinfer")
    assert len(found.differences) >= 60


@pytest.mark.parametrize("mask", [0.0, -1.0])
def test_a_kernel_that_masks_with_a_number_is_judged_by_it(mask):
    """Where its recipe says so, the right routing is the wrong one."""
    recipe = replace(DEEPSEEK, mask=mask)
    case = make_case("bias-below-minus-1", recipe, num_tokens=64, num_experts=256)
    masked, right = (route(case.logits, r, case.bias) for r in (recipe, DEEPSEEK))
    assert_routing(masked.topk_ids, masked.topk_weights, case.logits, recipe, case.bias)
    found = compare_routing(right.topk_ids, None, case.logits, recipe, case.bias)
    assert len(found.differences) >= 60
    assert " is chosen over " in found.message()


def test_a_mask_gives_no_right_to_experts_below_it():
    """Key 2 > mask 0 > key -1: an excluded expert beats a kept one, and not the reverse."""
    recipe = Recipe(top_k=2, score="identity", n_group=2, group_score="max", mask=0.0)
    logits = torch.tensor([[2.0, -1.0, 1.0, 1.5]])
    for ids, ok in (([0, 2], True), ([0, 3], True), ([0, 1], False), ([2, 3], False)):
        assert compare_routing(torch.tensor([ids]), None, logits, recipe).ok == ok
    text = compare_routing(torch.tensor([[0, 1]]), None, logits, recipe).message()
    assert "1 is chosen over 2, whose selection score is 1 higher" in text


@pytest.mark.parametrize("is_wanted", [True, False])
def test_as_many_experts_of_each_group_are_not_the_best_of_all(is_wanted):
    each = Recipe(top_k=8, n_group=8, topk_group=8, per_group=True, normalize="sum")
    wanted, other = (each, Recipe(top_k=8, normalize="sum"))[:: 1 if is_wanted else -1]
    case = make_case("plain", wanted, num_tokens=64, num_experts=512)
    right, wrong = (route(case.logits, recipe).topk_ids for recipe in (wanted, other))
    assert compare_routing(right, None, case.logits, wanted).ok
    found = compare_routing(wrong, None, case.logits, wanted)
    assert len(found.differences) > 50
    if is_wanted:
        assert "of a group that contributes fewer than 1" in found.message()


@pytest.mark.parametrize("pattern", ["ties-at-k", "saturated", "ties-at-groups"])
@pytest.mark.parametrize("precision", ["float32", "flashinfer"])
def test_the_higher_index_of_a_tie_is_caught(pattern, precision):
    recipe = (
        replace(DEEPSEEK, bias=False)
        if pattern == "ties-at-groups"
        else replace(MINIMAX, bias=False)
    )
    logits = make_case(pattern, recipe, num_tokens=32, num_experts=256).logits
    if pattern == "saturated":
        logits = logits.round()
    mirrored = route(logits.flip(1), recipe)
    found = compare_routing(255 - mirrored.topk_ids, None, logits, recipe, precision=precision)
    assert len(found.differences) == 32


def test_an_expert_just_beyond_the_margin_is_caught_and_one_within_is_not():
    recipe = Recipe(top_k=1, score="sigmoid")
    error = PRECISIONS["flashinfer"].sigmoid
    for gap, ok in ((1.9 * error, True), (2.2 * error, False)):
        logits = torch.logit(torch.tensor([[0.5, 0.5 + gap, 0.1, 0.1]], dtype=torch.float64))
        found = compare_routing(torch.tensor([[0]]), None, logits, recipe, precision="flashinfer")
        assert found.ok == ok


#: By precision: distances of two experts' scores that errors explain, and that they do not; and
#: relative errors of a weight. float32 has 24 bits: 2e-6 are 34 half steps of 2**-24, for an
#: exponential, a sum and a division. bfloat16 has 8 bits: rounding is within 2**-8, and is the next
#: number beyond; transformers rounds twice. The sigmoid of `tanh.approx.f32` is within 2.5e-4; that of an H200 was measured
#: within 3.9e-6 (docs/gpu-evidence), of which three times are allowed on either expert.
ALLOWED = {
    "float64": (1e-15, 1e-13, 1e-15, 1e-13),
    "float32": (1e-7, 3e-6, 5e-7, 7e-6),
    "bfloat16-weights": (1e-7, 3e-6, 0.99 * 2**-7, 1.5 * 2**-7),
    "vllm-grouped": (1e-7, 3e-6, 5e-7, 7e-6),
    "flashinfer": (4.8e-4, 5.3e-4, 0.99 * 2**-8, 1.5 * 2**-8),
    "flashinfer-sm90": (2.2e-5, 3.2e-5, 0.99 * 2**-8, 1.5 * 2**-8),
}


@pytest.mark.parametrize("precision", ALLOWED)
def test_each_precision_allows_its_own_errors_and_no_more(precision):
    recipe = Recipe(top_k=1, score="sigmoid")
    near, far, rounded, wrong = ALLOWED[precision]
    for gap, ok in ((near, True), (far, False)):
        logits = torch.logit(torch.tensor([[0.5, 0.5 + gap, 0.1, 0.1]], dtype=torch.float64))
        found = compare_routing(torch.tensor([[0]]), None, logits, recipe, precision=precision)
        assert found.ok == ok
    # Weights that the sigmoid's error cannot explain: of a score that is 1.
    logits = torch.tensor([[64.0, 0.0]], dtype=torch.float64)
    for error, ok in ((rounded, True), (wrong, False)):
        for side in (-1, 1):
            weights = torch.tensor([[1.0 + side * error]], dtype=torch.float64)
            found = compare_routing(
                torch.tensor([[0]]), weights, logits, recipe, precision=precision
            )
            assert found.ok == ok, (error, side)


def test_weights_of_a_kernel_that_rounds_are_bfloat16_before_or_after_they_are_scaled():
    """2.5 times 0.76 lies between 1.8984375 and 1.90625 of bfloat16; 0.76 itself, near 0.7617."""
    recipe = Recipe(top_k=1, score="sigmoid", scale=2.5, weight_dtype="bfloat16")
    logits = torch.logit(torch.tensor([[0.76, 0.1]], dtype=torch.float64))
    for weight, ok in (
        (1.8984375, True),
        (1.90625, True),
        (2.5 * 0.76171875, True),
        (1.905, False),
    ):
        weights = torch.tensor([[weight]], dtype=torch.float64)
        assert compare_routing(torch.tensor([[0]]), weights, logits, recipe).ok == ok, weight


@pytest.mark.parametrize(("share", "ok"), [(0.0, True), (1.0, True), (4.0, False)])
def test_a_weight_that_underflows_may_be_zero_before_it_is_scaled(share, ok):
    """Kernels flush subnormal numbers: a third of 2**-125 is one, and scaled by 16 it is none."""
    recipe = Recipe(top_k=4, score="sigmoid", normalize="sum", scale=16.0)
    logits = torch.logit(torch.tensor([[1, 1, 1, 2.0**-125]], dtype=torch.float64))
    weights = 16 / 3 * torch.tensor([[1, 1, 1, share * 2.0**-125]], dtype=torch.float64)
    assert compare_routing(torch.arange(4).view(1, 4), weights, logits, recipe).ok == ok


@pytest.mark.parametrize(
    ("precision", "gap", "ok"),
    [("float32", 1.5e-7, False), ("vllm-grouped", 1.5e-7, True), ("vllm-grouped", 2.5e-7, False)],
)
def test_a_sigmoid_made_of_tanh_is_off_by_as_much_however_small_it_is(precision, gap, ok):
    """vLLM's is within 1e-7, on either expert; a quotient's error is relative."""
    logits = torch.logit(torch.tensor([[1e-8, 1e-8 + gap, 1e-9]], dtype=torch.float64))
    recipe = Recipe(top_k=1, score="sigmoid")
    found = compare_routing(torch.tensor([[0]]), None, logits, recipe, precision=precision)
    assert found.ok == ok


def test_a_group_surely_below_enough_others_is_not_admissible():
    """Of three groups of which one is kept, the first two tie, and the third ties with the second.

    The third lies surely below the first, so that it is never kept.
    """
    recipe = Recipe(top_k=1, score="sigmoid", n_group=3, topk_group=1, group_score="max")
    scores = torch.tensor([[0.5004, 0.1, 0.5001, 0.1, 0.4998, 0.1]], dtype=torch.float64)
    for expert, ok in ((0, True), (2, True), (4, False)):
        found = compare_routing(
            torch.tensor([[expert]]), None, scores.logit(), recipe, precision="flashinfer"
        )
        assert found.ok == ok, expert


def test_the_worst_tokens_are_shown_first():
    """Of twelve wrong tokens eight are shown, from the last, which is the most wrong, on."""
    recipe = Recipe(top_k=1, score="sigmoid")
    gap = torch.arange(1, 13, dtype=torch.float64).unsqueeze(1) / 32
    logits = torch.cat([torch.full_like(gap, 0.5), 0.5 + gap], 1).logit()
    found = compare_routing(torch.zeros(12, 1, dtype=torch.int64), None, logits, recipe)
    assert [difference.token for difference in found.differences] == [*range(11, -1, -1)]
    assert "  token 11: " in found.message()
    assert "  token 3: " not in found.message()


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ([0, 1, 1], "expert 1 is chosen 2 times"),
        ([0, 1, 8], "expert 8 is not one of 8"),
        ([-1, 0, 1], "expert -1"),
    ],
)
def test_repeated_and_foreign_experts_are_caught_even_in_rows_of_nan(row, text):
    logits = torch.full((1, 8), torch.nan)
    found = compare_routing(torch.tensor([row]), None, logits, Recipe(top_k=3))
    assert text in found.message()


def test_order_within_a_row_is_not_compared_but_weights_follow_their_expert():
    case = make_case("plain", DEEPSEEK, num_tokens=16, num_experts=256)
    got = route(case.logits, DEEPSEEK, case.bias)
    flipped = got.topk_ids.flip(1), got.topk_weights.flip(1)
    assert_routing(*flipped, case.logits, DEEPSEEK, case.bias)
    swapped = compare_routing(flipped[0], got.topk_weights, case.logits, DEEPSEEK, case.bias)
    assert len(swapped.differences) == 16


def test_nan_weights_are_wrong_where_the_reference_has_numbers():
    case = make_case("plain", DEEPSEEK, num_tokens=4, num_experts=256)
    got = route(case.logits, DEEPSEEK, case.bias)
    weights = got.topk_weights.clone()
    weights[2, 3] = torch.nan
    found = compare_routing(got.topk_ids, weights, case.logits, DEEPSEEK, case.bias)
    assert [d.token for d in found.differences] == [2]


def test_the_message_leads_to_the_cause():
    case = make_case("plain", DEEPSEEK, num_tokens=40, num_experts=256)
    got = route(case.logits, replace(DEEPSEEK, scale=1.0), case.bias)
    with pytest.raises(AssertionError) as caught:
        assert_routing(got.topk_ids, got.topk_weights, case.logits, DEEPSEEK, case.bias)
    text = str(caught.value)
    assert "40/40 tokens (100.0 %) are routed wrongly" in text
    assert "all weights are 0.4 times the wanted ones" in text
    assert "recipe     sigmoid -> + bias to choose -> best 4 of 8 groups" in text
    assert "... and 32 more tokens" in text
    few = [rows[:8] for rows in (got.topk_ids, got.topk_weights, case.logits)]
    with pytest.raises(AssertionError) as caught:
        assert_routing(*few, DEEPSEEK, case.bias)
    assert "8/8 tokens" in str(caught.value)
    assert "more tokens" not in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "weights", "text"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), None, "topk_ids: found torch.int64 [4, 3]"),
        (torch.zeros(4, 8), None, "expected integer [4, 8]"),
        (torch.zeros(4, 8, dtype=torch.int32), torch.zeros(8, 4), "topk_weights: found"),
    ],
)
def test_misuse_is_an_error_not_a_difference(ids, weights, text):
    case = make_case("plain", DEEPSEEK, num_tokens=4, num_experts=256)
    with pytest.raises(RecipeError) as caught:
        compare_routing(ids, weights, case.logits, DEEPSEEK, case.bias)
    assert text in str(caught.value)


def test_an_unknown_precision_is_misuse():
    with pytest.raises(RecipeError, match=r"expected float64, float32, .*flashinfer"):
        compare_routing(
            torch.zeros(1, 1).long(), None, torch.zeros(1, 2), Recipe(), precision="half"
        )


@pytest.mark.parametrize(("epsilon", "ok"), [(0.0, True), (1e-20, False)])
def test_nan_is_allowed_exactly_where_zero_may_be_divided_by_zero(epsilon, ok):
    """flashinfer PR 3803: with an epsilon in the recipe, NaN weights are a defect."""
    recipe = replace(MINIMAX, epsilon=epsilon)
    case = make_case("below-minus-100", recipe, num_tokens=8, num_experts=64)
    ids = route(case.logits, recipe, case.bias).topk_ids
    found = compare_routing(ids, torch.full((8, 8), torch.nan), case.logits, recipe, case.bias)
    assert found.ok == ok


@pytest.mark.parametrize(
    "pattern", ["plain", "near-ties", "ties-at-k", "ties-at-groups", "saturated"]
)
@pytest.mark.parametrize("name", RECIPES)
def test_choices_of_all_tokens_at_once_are_told_as_of_each(name, pattern):
    """Half of the tokens swap their last expert for any other."""
    recipe = RECIPES[name]
    case = make_case(pattern, recipe, num_tokens=40, num_experts=64)
    rows = Rows(case.logits, recipe, case.bias, PRECISIONS["float32"])
    rows.lower_index = False
    ids, tokens = rows.ids.clone(), torch.arange(40)
    for token in range(0, 40, 2):
        rest = [e for e in range(64) if e not in ids[token].tolist()]
        ids[token, -1] = rest[7 * token % len(rest)]
    each = [rows.beaten(token, ids[token]) is None for token in tokens.tolist()]
    assert rows.are_close(tokens, ids).tolist() == each
    assert rows.are_close(tokens[3:9], ids).tolist() == each[3:9]
    assert any(each)
    assert pattern != "plain" or not all(each)
    # The order of equal inputs is not looked at.
    rows.lower_index = True
    assert not rows.are_close(tokens, ids).any()


@pytest.mark.parametrize("group_score", ["top2_sum", "max"])
def test_choices_among_groups_that_tie_are_told_at_once_as_of_each(group_score):
    """Every set of 3 of 4 groups, with any experts of 2 or 3 of them, in keys of two values."""
    recipe = Recipe(top_k=4, n_group=4, topk_group=3, group_score=group_score)
    choices = torch.combinations(torch.arange(12), 4)
    logits = (torch.arange(12) % 5 < 2).float().expand(len(choices), -1)
    rows = Rows(logits, recipe, None, PRECISIONS["float32"])
    rows.lower_index = False
    each = [rows.beaten(n, ids) is None for n, ids in enumerate(choices)]
    assert rows.are_close(torch.arange(len(choices)), choices).tolist() == each
    assert 0 < sum(each) < len(each)


@pytest.mark.parametrize("fields", [{"mask": 0.0}, {"topk_group": 8, "per_group": True}])
def test_choices_that_groups_do_not_bound_are_told_of_each_token_alone(fields):
    recipe = replace(DEEPSEEK, **fields)
    case = make_case("plain", recipe, num_tokens=4, num_experts=256)
    rows = Rows(case.logits, recipe, case.bias, PRECISIONS["float32"])
    rows.lower_index = False
    assert not rows.are_close(torch.arange(4), rows.ids).any()


@pytest.mark.parametrize(
    ("pattern", "recipe", "num_experts"),
    [("ties-at-k", MINIMAX, 64), ("ties-at-groups", DEEPSEEK, 256)],
)
def test_ambiguous_tokens_are_compared_at_once(monkeypatch, pattern, recipe, num_experts):
    case = make_case(pattern, recipe, num_tokens=16, num_experts=num_experts)
    routing = route(case.logits.flip(1), recipe, case.bias.flip(0), dtype=torch.float64)
    monkeypatch.setattr(Rows, "beaten", lambda *_: pytest.fail("asked about one token"))
    ids = num_experts - 1 - routing.topk_ids
    answer = ids, routing.topk_weights, case.logits, recipe, case.bias
    found = compare_routing(*answer, lower_index=False)
    assert found.ok
    assert found.ambiguous > 0
    assert agrees(*answer, precision="float32", lower_index=False)


@pytest.mark.parametrize("lower_index", [False, True])
@pytest.mark.parametrize("precision", ["float32", "flashinfer"])
def test_whether_a_routing_agrees_is_told_as_by_the_comparison(precision, lower_index):
    case = make_case("ties-at-groups", DEEPSEEK, num_tokens=8, num_experts=256)
    ids, weights = (getattr(route(case.logits, DEEPSEEK, case.bias), n) for n in NAMES)
    low = 255 - route(case.logits.flip(1), DEEPSEEK, case.bias.flip(0)).topk_ids
    outside, repeated, other = ids.clone(), ids.clone(), ids.clone()
    outside[0, 0], repeated[1, 0], other[2, 0] = 256, ids[1, 1], case.logits[2].argmin()
    heavy, light = weights.clone(), weights.bfloat16()
    heavy[3, 0] *= 1.01
    verdicts = []
    for got in [
        *((ids, weights), (low, weights), (outside, weights), (repeated, weights)),
        *((other, weights), (ids, heavy), (ids, light)),
    ]:
        answer = *got, case.logits, DEEPSEEK, case.bias
        found = compare_routing(*answer, precision=precision, lower_index=lower_index)
        verdicts.append(found.ok)
        assert agrees(*answer, precision=precision, lower_index=lower_index) == found.ok
    assert verdicts == [
        *(True, not lower_index, False, False, False, False, precision == "flashinfer"),
    ]


def test_what_cannot_be_compared_does_not_agree_either():
    case = make_case("plain", DEEPSEEK, num_tokens=8, num_experts=256)
    answer = torch.zeros(8, 3).long(), torch.ones(8, 3), case.logits, DEEPSEEK, case.bias
    with pytest.raises(RecipeError, match="topk_ids"):
        agrees(*answer, precision="float32", lower_index=False)
