"""The layer under test of the GPU suite, on simulated kernels."""

from __future__ import annotations

from dataclasses import replace

import torch

from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.kernels.library import simulated
from pytest_moe_routing.suite.fused import Fused

FLASHINFER = FlashInfer.of()
CALL = KernelCall("bf16", "Renormalize", 8, 2, "float32")


def layer():
    return Fused(simulated("simulator", FLASHINFER), FLASHINFER, CALL, "bf16")


def test_chosen_experts_are_found_without_replay():
    """Shards of one expert each tell what the replay buffer tells."""
    fused = layer()
    problem = fused.problem(5)
    ids, _ = fused.rows(problem)
    assert fused.replays
    assert torch.equal(fused.located(problem), ids)


def test_equal_shares_are_equal():
    """Without them, an expert's share of a token is often a fiftieth of another's."""
    call = replace(CALL, scheme="fp8_per_tensor", num_experts=16, top_k=4)
    ratios = []
    for even in (False, True):
        fused = replace(layer(), call=call, scheme="fp8_per_tensor", even=even)
        problem = fused.problem(33)
        _, found = fused.rows(problem)
        shares = found.rows.double().norm(dim=-1) * found.weights
        ratios.append(float((shares.amax(1) / shares.amin(1)).median()))
        assert problem.routing.topk_weights.shape == (33, 4)
    assert ratios[1] < 5 < 50 < ratios[0]


def test_a_slot_of_several_shards_has_no_expert():
    """A kernel that takes every slot for its own says nothing about what it chose."""
    fused = layer()
    problem = fused.problem(3)

    def greedy(arguments):
        permuted, weights, place = fused.launch(arguments)
        return [permuted[:1], weights, torch.zeros_like(place)]

    assert (fused.located(problem, greedy) == -1).all()
