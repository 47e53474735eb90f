"""What is known of entry points that are given a router's choice, and of their scales."""

from __future__ import annotations

import pytest
import torch

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.flashinfer.signatures import parameters
from pytest_moe_routing.targets.given_weights import scales_of


def test_a_list_with_too_few_scales_is_read_as_far_as_it_goes():
    """The scales that a call lacks are what `test_other_experts` reports."""
    entry = given_experts("cutlass_fused_moe")
    for scales in ([], [torch.ones(2)], None):
        found = scales_of(entry, "nvfp4", {"quant_scales": scales})
        assert [*found] == ["fc1 quantization"][: len(scales or ())]


def test_every_argument_of_cutedsl_is_one_of_the_entry_point():
    entry = given_experts("cute_dsl_fused_moe_nvfp4")
    known = {p.partition("=")[0] for p in parameters(entry.function, FlashInfer.of().release)}
    single = {entry.ids, entry.weights, entry.hidden, entry.scale, entry.experts, entry.activation}
    named = {*entry.numbers, *entry.modes, *entry.parameters.values(), *entry.situ.values()}
    assert (
        single | named | {*entry.matrices.values(), *entry.scales["nvfp4"], entry.output} <= known
    )
    assert entry.offset in known
    assert not given_experts("cutlass_fused_moe").offset
    assert {*entry.absent} <= {*entry.numbers}
    assert {*entry.factors} <= {*entry.scales["nvfp4"].values()}
    assert {*entry.orders} == {*entry.scales} == {*entry.devices}


@pytest.mark.parametrize(
    ("release", "device", "of"),
    [
        ("0.7.0.post1", "10.0", 256),
        ("0.7.1", "10.0", 128),
        ("0.7.1", "10.3", 128),
        ("0.7.2.post1", "10.7", 256),
    ],
)
def test_what_hidden_sizes_are_multiples_of_for_cutedsl(release, device, of):
    limits = given_experts("cute_dsl_fused_moe_nvfp4").sizes["hidden size"]
    assert max(limit.of for limit in limits if limit.holds(release, device)) == of
