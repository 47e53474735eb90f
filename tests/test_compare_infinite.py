"""Logits that are infinite, of a router with groups: what is wrong is told, as of any others."""

from __future__ import annotations

import math

import pytest
import torch

from pytest_moe_routing.compare import compare_routing
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing import Recipe


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("score", ["identity", "sqrtsoftplus", "sigmoid"])
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_experts_of_groups(score, group_score, value):
    recipe = Recipe(score=score, top_k=2, n_group=4, topk_group=2, group_score=group_score)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(32, 16, generator=generator)
    logits[torch.rand(32, 16, generator=generator) < 0.2] = value
    right = route(logits, recipe, None).topk_ids
    assert compare_routing(right, None, logits, recipe, precision="float32").ok
    # The lowest of all that is not chosen: no group that holds it is better than another.
    wrong = right.clone()
    wrong[:, 0] = logits.scatter(1, right, math.inf).nan_to_num(posinf=1e9).argmin(1)
    found = compare_routing(wrong, None, logits, recipe, precision="float32")
    assert not found.ok
    assert "experts" in str(found)
