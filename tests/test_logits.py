"""The generator gives the same bits everywhere, and each pattern is what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.logits import PATTERNS, bell, distinct, integers, make_case
from pytest_moe_routing.reference.routing import group_scores, route
from pytest_moe_routing.routing.recipe import Recipe

DEEPSEEK = Recipe(top_k=8, score="sigmoid", bias=True, n_group=8, topk_group=4, normalize="sum")


def python_hash(index, seed):
    """The generator once more, in plain Python integers."""
    x = index
    for salt in (seed & 0xFFFFFFFF, seed >> 32):
        x = (x + salt * 0x9E3779B1) & 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x735A2D97) & 0xFFFFFFFF
        x ^= x >> 15
    return x


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**40 + 17])
def test_integers_are_those_of_plain_python(seed):
    assert integers(50, seed=seed, bits=32).tolist() == [python_hash(i, seed) for i in range(50)]


def test_frozen_numbers():
    """If these change, every golden changes."""
    assert integers(4, seed=1, bits=32).tolist() == [1478163802, 2069059041, 4229407639, 4200978919]
    assert bell(3, seed=7).tolist() == [-0.994354248046875, 2.4693603515625, -1.53466796875]


def test_bell_is_centred_and_as_wide_as_said():
    numbers = bell(1000, 100, seed=5)
    assert abs(numbers.mean().item()) < 0.01
    assert abs(numbers.std().item() - (4 / 3) ** 0.5) < 0.01
    assert numbers.abs().max() <= 4
    assert torch.equal(numbers * 2**15, (numbers * 2**15).round())


def test_distinct_rows_are_permutations():
    rows = distinct(20, 64, seed=3)
    assert torch.equal(rows.sort(1).values, torch.arange(64).expand(20, -1))
    assert len({tuple(row) for row in rows.tolist()}) == 20


@pytest.mark.parametrize("name", PATTERNS)
def test_patterns_fit_the_recipe_and_repeat_exactly(name):
    one, two = (make_case(name, DEEPSEEK, num_tokens=10, num_experts=64) for _ in range(2))
    assert one.logits.shape == (10, 64)
    assert one.logits.dtype == one.bias.dtype == torch.float32
    assert torch.equal(one.logits.nan_to_num(99), two.logits.nan_to_num(99))
    assert torch.equal(one.bias, two.bias)
    assert make_case(name, replace(DEEPSEEK, bias=False), num_tokens=2, num_experts=64).bias is None


def test_each_pattern_is_what_it_says():
    def case(name):
        return make_case(name, DEEPSEEK, num_tokens=64, num_experts=256)

    assert case("all-negative").logits.max() < 0
    assert case("below-minus-100").logits.max() < -100
    assert case("saturated").logits.min() > 17
    assert (case("saturated").logits.sigmoid() == 1).float().mean() > 0.99
    assert case("bias-below-minus-1").bias.max() + 1 < -1
    narrow = case("narrow-bias").bias
    assert len(narrow.bfloat16().unique()) < 20 < len(narrow.unique())
    near = case("near-ties").logits
    assert near.min() >= 1  # below 2, bfloat16's steps are 2**-7
    assert near.max() < 2
    for name in ("plain", "all-negative", "below-minus-100"):
        # A quarter: a score's largest slope, so that a bias is worth at most one unit of a logit.
        least, most = case(name).bias.aminmax()
        assert -0.25 <= least < -0.24 < 0.24 < most <= 0.25
    assert len(near[0].unique()) == 256
    assert len(near[0].bfloat16().unique()) < 16
    assert (
        (route(case("hot-expert").logits, DEEPSEEK, case("hot-expert").bias).topk_ids == 255)
        .any(1)
        .all()
    )
    tied = case("ties-at-k").logits.sort(1, descending=True).values
    assert torch.equal(tied[:, 7], tied[:, 8])
    groups = group_scores(case("ties-at-groups").logits.sigmoid(), DEEPSEEK)
    assert (groups == groups[:, :1]).all()
    kinds = case("not-finite").logits
    assert kinds.isnan().any()
    assert (kinds == torch.inf).any()
    assert (kinds == -torch.inf).all(1).any()


def test_unknown_pattern():
    with pytest.raises(RecipeError, match="no logits pattern 'plane'; patterns: plain"):
        make_case("plane", DEEPSEEK, num_tokens=1, num_experts=64)
