"""What a failure of the comparator says: each reason and each diagnosis, made by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from strategies import DEEPSEEK

from pytest_moe_routing.compare import assert_routing, compare_routing
from pytest_moe_routing.logits import make_case
from pytest_moe_routing.reference import routing as reference
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing.recipe import Recipe

UNGROUPED = replace(DEEPSEEK, n_group=1, topk_group=1)
TWO_GROUPS = Recipe(score="identity", n_group=2, group_score="top2_sum")
EIGHT = Recipe(top_k=3, score="identity", n_group=4, topk_group=2, group_score="max")


@pytest.mark.parametrize(
    ("recipe", "logits", "got", "problem", "because"),
    [
        (
            TWO_GROUPS,
            [3, 0, 2, 2],
            [0],
            "experts [0] instead of [2]",
            "experts 0 lie in group 0, which is not kept; the kept group is 1 (scores 4), and group 0 has "
            "3; their selection scores are higher, but count only within kept groups",
        ),
        (
            TWO_GROUPS,
            [-2, -2, -3, -9],
            [2],
            "experts [2] instead of [0]",
            "experts 2 lie in group 1, which is not kept; the kept group is 0 (scores -4), and group 1 has "
            "-12",
        ),
        (
            EIGHT,
            [3, 4, 1, 8, 5, 0, 9, 2],
            [6, 0, 4],
            "experts [0, 4] instead of [3, 7]",
            "experts 0 4 lie in groups 0 2, which are not kept; the kept groups are 1 3 (scores 8 9), and "
            "groups 0 2 have 4 5; their selection scores are higher, but count only within kept "
            "groups",
        ),
        (
            TWO_GROUPS,
            [1, 2, 2, 1],
            [2],
            "experts [2] instead of [1]",
            "experts 2 lie in group 1, which is not kept; the kept group is 0 (scores 3), and group 1 has "
            "3; groups 0 and 1 have the same inputs: the lower index must win",
        ),
        (
            Recipe(top_k=2, score="identity"),
            [1, 3, 1, 0],
            [1, 2],
            "experts [2] instead of [0]",
            "2 is chosen over 0, which has the same logit: the lower index must win",
        ),
        (
            Recipe(score="sigmoid", bias=True),
            [2, 2, 0, 0],
            [1],
            "experts [1] instead of [0]",
            "1 is chosen over 0, which has the same logit and bias: the lower index must win",
        ),
        (
            Recipe(score="sigmoid"),
            [0, 0.5, 1, 0],
            [1],
            "experts [1] instead of [2]",
            "1 is chosen over 2, whose selection score is 0.109 higher; rounding explains at most 3e-06",
        ),
    ],
)
def test_the_message_proves_that_experts_are_wrong(recipe, logits, got, problem, because):
    logits = torch.tensor([logits], dtype=torch.float32)
    bias = torch.zeros(logits.shape[1]) if recipe.bias else None
    text = compare_routing(torch.tensor([got]), None, logits, recipe, bias).message()
    assert f"  token 0: {problem}\n    because {because}\n    wanted " in text


def test_no_weight_is_allowed_that_the_recipe_cannot_give():
    recipe = Recipe(top_k=2, score="sigmoid", normalize="sum")
    logits, weights = torch.full((1, 2), -112.0), torch.tensor([[-1e-9, 0.5]])
    found = compare_routing(torch.tensor([[0, 1]]), weights, logits, recipe)
    assert "expert 0 weighs -1e-09, allowed 0 to 1\n" in found.message()


@pytest.mark.parametrize(("factor", "told"), [(1.015, True), (1.005, False)])
def test_a_factor_that_all_weights_share_is_told_where_it_is_more_than_a_percent(factor, told):
    recipe = Recipe(top_k=2, score="sigmoid")
    logits = torch.tensor([[0.0, 1.0, -1.0]])
    found = compare_routing(
        torch.tensor([[1, 0]]), factor * logits[:, [1, 0]].sigmoid(), logits, recipe
    )
    assert (f"; all weights are {factor} times the wanted ones" in found.message()) is told
    assert not found.ok


def test_only_experts_outside_of_the_kept_groups_are_said_to_lie_there():
    """Expert 2 is kept's third best and wrong as well, but it lies in the kept group."""
    recipe = Recipe(top_k=2, score="identity", n_group=2, group_score="top2_sum")
    logits = torch.tensor([[4.0, 3, 1, 2, 2, 0]])
    message = compare_routing(torch.tensor([[2, 3]]), None, logits, recipe).message()
    assert "experts [2, 3] instead of [0, 1]" in message
    assert "because experts 3 lie in group 1, which is not kept; the kept group is 0" in message


def routed(logits, recipe, bias, /, **other):
    """Experts and weights of another recipe."""
    recipe = replace(recipe, **other)
    got = route(logits, recipe, bias if recipe.bias else None)
    return got.topk_ids, got.topk_weights


def in_torch(logits, recipe, bias, mask):
    """What routers in torch do that mask with a number: `torch.topk` leaves ties open."""
    keys = logits.sigmoid() + bias
    best = keys.unflatten(1, (8, 32)).topk(2).values.sum(2).topk(4).indices
    excluded = torch.ones(len(keys), 8).scatter(1, best, 0).repeat_interleave(32, 1)
    ids = torch.where(excluded == 1, mask, keys).topk(8).indices
    return ids, reference.weigh(logits, recipe, ids)


def scored_in_bfloat16(logits, recipe, bias, weighed_in=torch.bfloat16):
    scores = logits.sigmoid().bfloat16()
    ids = reference.choose(scores.float() + bias, recipe)
    weights = scores.gather(1, ids).to(weighed_in)
    return ids, (weights / weights.sum(1, keepdim=True)).float() * recipe.scale


def rounded_weights(logits, recipe, bias, scale):
    ids, weights = routed(logits, recipe, bias, scale=recipe.scale / scale)
    return ids, weights.bfloat16().float() * scale


RANKED = "groups are ranked by their best expert, not by the sum of their two best"
MASKED = "experts of excluded groups take part, with a number such as 0 for their keys"
#: What is made of the logits, from which pattern, and what the message says of it.
DIAGNOSES = {
    "scale lost": (routed, {"scale": 1.0}, "plain", "the routed scaling factor is missing"),
    "scale twice": (routed, {"scale": 6.25}, "plain", "the routed scaling factor is applied twice"),
    "biased weights": (
        routed,
        {"weigh_by": "selection"},
        "plain",
        "router weights are those of score + bias",
    ),
    "negative sums": (
        routed,
        {"weigh_by": "selection"},
        "bias-below-minus-1",
        "router weights are those of score + bias",
    ),
    "no epsilon": (
        routed,
        {"epsilon": 0.0},
        "below-minus-100",
        "all chosen scores underflow to 0, and 0/0 is NaN without the recipe's epsilon",
    ),
    "logits": (
        lambda logits, recipe, bias: routed(logits.bfloat16(), recipe, bias),
        {},
        "plain",
        "router logits are rounded to bfloat16",
    ),
    "scores": (
        scored_in_bfloat16,
        {"weighed_in": torch.float32},
        "plain",
        "scores are rounded to bfloat16",
    ),
    "scores and weights": (
        scored_in_bfloat16,
        {},
        "plain",
        "scores and weights are computed in bfloat16",
    ),
    "weights": (rounded_weights, {"scale": 1.0}, "plain", "router weights are rounded to bfloat16"),
    "weights, then scaled": (
        rounded_weights,
        {"scale": 2.5},
        "plain",
        "router weights are rounded to bfloat16",
    ),
    "bias ignored": (routed, {"bias": False}, "plain", "the router's correction bias is ignored"),
    "groups ignored": (
        routed,
        {"n_group": 1, "topk_group": 1},
        "plain",
        "the group limit is ignored",
    ),
    "group score": (routed, {"group_score": "max"}, "plain", RANKED),
    # With its bias rounded to bfloat16, all keys would be alike and any choice explained.
    "not a rounded bias": (routed, {"group_score": "max"}, "deep-negative-high-bias", RANKED),
    "mask 0": (routed, {"mask": 0.0}, "bias-below-minus-1", MASKED),
    "mask -1": (routed, {"mask": -1.0}, "bias-below-minus-1", MASKED),
    "mask 0 in torch": (in_torch, {"mask": 0.0}, "bias-below-minus-1", MASKED),
    "mask and group score": (
        routed,
        {"mask": 0.0, "group_score": "max"},
        "bias-below-minus-1",
        f"{RANKED}; {MASKED}",
    ),
    "two mistakes": (
        routed,
        {"group_score": "max", "scale": 1.0},
        "plain",
        f"{RANKED} (explains the experts alone)",
        "the routed scaling factor is missing (explains the weights alone)",
    ),
    "another": (routed, {"weigh_by": "softmax"}, "plain"),
}


@pytest.mark.parametrize("name", DIAGNOSES)
def test_what_explains_all_that_is_wrong_is_named(name):
    make_wrong, how, pattern, *wanted = DIAGNOSES[name]
    case = make_case(pattern, DEEPSEEK, num_tokens=64, num_experts=256)
    got = make_wrong(case.logits, DEEPSEEK, case.bias, **how)
    found = compare_routing(*got, case.logits, DEEPSEEK, case.bias)
    assert list(found.diagnosis) == wanted
    lines = found.message().splitlines()
    assert [line for line in lines if "diagnosis" in line] == [f"  diagnosis  {x}" for x in wanted]
    assert not wanted or lines[-1].startswith("  diagnosis")


def test_weights_that_are_normalized_and_should_not_be_are_named_for_any_two_experts():
    recipe = Recipe(top_k=2, score="softmax")
    case = make_case("plain", recipe, num_tokens=8, num_experts=16)
    got = routed(case.logits, recipe, None, normalize="sum")
    found = compare_routing(*got, case.logits, recipe)
    assert found.diagnosis == ("router weights are normalized, and should not be",)


def test_excluded_groups_with_0_for_their_keys_win_over_negative_keys_alone():
    """Of the kept experts some have positive keys, which another number than 0 would beat."""
    case = make_case("all-negative", DEEPSEEK, num_tokens=16, num_experts=32)
    bias = case.bias - 0.125
    keys = case.logits.sigmoid() + bias
    best = reference.group_scores(keys, DEEPSEEK).topk(4).indices
    out = torch.ones(16, 8, dtype=torch.bool).scatter(1, best, False).repeat_interleave(4, 1)
    ids = reference.stable_topk(keys.masked_fill(out, 0.0), 8)
    assert (keys.gather(1, ids) > 0).any()
    assert out.gather(1, ids).any()
    weights = reference.weigh(case.logits, DEEPSEEK, ids)
    found = compare_routing(ids, weights, case.logits, DEEPSEEK, bias)
    assert found.diagnosis == (MASKED,)


def test_one_token_that_a_mistake_does_not_explain_rules_it_out():
    case = make_case("plain", DEEPSEEK, num_tokens=64, num_experts=256)
    ids, weights = routed(case.logits, DEEPSEEK, case.bias, scale=1.0)
    weights[63] *= 2.5
    assert not compare_routing(ids, weights, case.logits, DEEPSEEK, case.bias).diagnosis


def test_numbers_are_no_underflow():
    """Where the sum may be 0, without an epsilon any weight would be as right as NaN."""
    case = make_case("below-minus-100", DEEPSEEK, num_tokens=8, num_experts=256)
    ids = route(case.logits, DEEPSEEK, case.bias).topk_ids
    found = compare_routing(ids, torch.full((8, 8), 0.3125), case.logits, DEEPSEEK, case.bias)
    assert len(found.differences) == 8
    assert not found.diagnosis


def test_a_right_routing_needs_no_diagnosis(monkeypatch):
    monkeypatch.setattr("pytest_moe_routing.compare.routing.diagnose", None)
    case = make_case("plain", DEEPSEEK, num_tokens=8, num_experts=256)
    got = route(case.logits, DEEPSEEK, case.bias)
    assert_routing(got.topk_ids, got.topk_weights, case.logits, DEEPSEEK, case.bias)


@pytest.mark.parametrize("pattern", ["deep-negative-high-bias", "below-minus-100"])
def test_tiny_weights_are_told_apart(pattern):
    """float32's sigmoid has no absolute error, beside which biased weights would pass."""
    case = make_case(pattern, UNGROUPED, num_tokens=16, num_experts=256)
    got = routed(case.logits, UNGROUPED, case.bias, weigh_by="selection")
    assert len(compare_routing(*got, case.logits, UNGROUPED, case.bias).differences) == 16
