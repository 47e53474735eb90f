"""Weights of entry points that are given a router's choice, whatever a call has of their scales."""

from __future__ import annotations

import torch

from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.targets.given_weights import orders_of_given, scales_of
from pytest_moe_routing.targets.marked_checkpoint import MarkedCheckpoint


def test_a_list_with_too_few_scales_is_read_as_far_as_it_goes():
    checkpoint, entry = MarkedCheckpoint(), given_experts("cutlass_fused_moe")
    like = torch.empty(64, 16, dtype=torch.uint8)
    for name, part in (("w13_weight", "w1"), ("w13_weight", "w3"), ("w2_weight", "w2")):
        checkpoint.make(name, part, 2, like)
    weights = torch.zeros(2, 128, 16, dtype=torch.uint8)
    arguments = {
        "fc1_expert_weights": weights,
        "fc2_expert_weights": weights[:, :64],
        "fc1_expert_biases": None,
        "fc2_expert_biases": None,
        "quant_scales": [torch.ones(2)],
    }
    for stored in ("nvfp4", "mxfp4"):
        # The scales that a call lacks are what `test_other_experts` reports.
        wrong = orders_of_given(entry, stored, arguments, checkpoint, gated=True)
        assert [each["name"] for each in wrong] == ["fc1_expert_weights", "fc2_expert_weights"]
        assert len(scales_of(entry, stored, arguments)) <= 1
