"""Scales of entry points that are given a router's choice, whatever a call has of them."""

from __future__ import annotations

import torch

from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.targets.given_weights import scales_of


def test_a_list_with_too_few_scales_is_read_as_far_as_it_goes():
    """The scales that a call lacks are what `test_other_experts` reports."""
    entry = given_experts("cutlass_fused_moe")
    for scales in ([], [torch.ones(2)], None):
        found = scales_of(entry, "nvfp4", {"quant_scales": scales})
        assert [*found] == ["fc1 quantization"][: len(scales or ())]
