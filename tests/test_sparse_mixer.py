"""The reference of Phi-3.5-MoE's router, against transformers' own."""

from __future__ import annotations

import pytest
import torch

from pytest_moe_routing.logits import make_case
from pytest_moe_routing.reference.sparse_mixer import JITTER, sparse_mixer
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets.mixers import UNTIED, mixer_problem

phimoe = pytest.importorskip("transformers.models.phimoe.modeling_phimoe")


@pytest.fixture(params=UNTIED)
def logits(request):
    recipe = Recipe(top_k=2, score="softmax")
    return make_case(request.param, recipe, num_tokens=64, num_experts=16).logits


@pytest.mark.parametrize("jitter", [JITTER, 0.2])
def test_it_routes_as_transformers_does(logits, jitter):
    wanted, experts = phimoe.sparsemixer(logits, jitter, False)
    weights, ids = sparse_mixer(logits, jitter)
    assert torch.equal(ids, experts)
    torch.testing.assert_close(weights, wanted)


def test_the_reference_is_right(logits):
    assert mixer_problem(*sparse_mixer(logits), logits) is None


def test_another_jitter_is_named_with_a_token():
    logits = torch.tensor([[3.0, 0.1, 2.0, 1.9], [1.0, 2.9, 3.0, -1.0]])
    problem = mixer_problem(*sparse_mixer(logits, 0.02), logits)
    assert "1 of 2 tokens; token 1: " in problem
    assert problem.count(" weighs ") == 4
