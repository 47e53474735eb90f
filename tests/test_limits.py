"""The largest that kernels take, and one more, which they do not: read off FlashInfer's sources.

The kernels' own limits are in `trtllm_fused_moe_routing_*.cu` and RoutingCustomPolicy.cuh, those of
launchers in trtllm_fused_moe_kernel_launcher.cu. Releases in MOE_WHEELS are compared as packages.
"""

from __future__ import annotations

import pytest
from wheels import wheels_since

from pytest_moe_routing.flashinfer import FlashInfer, KernelCall, known_releases
from pytest_moe_routing.flashinfer.drift import examine
from pytest_moe_routing.flashinfer.operators import compare_operators
from pytest_moe_routing.flashinfer.package import Package

NEWEST = known_releases()[-1]
#: Launchers that ask for no multiple of 4 experts take all that the kernels take.
PLAIN = {"scheme": "nvfp4", "num_experts": 64, "top_k": 1, "logits_dtype": "bfloat16"}
#: What DeepSeekV3 needs in every release: float32 logits, and a bias.
GROUPED = {
    "scheme": "nvfp4",
    "method": "DeepSeekV3",
    "num_experts": 64,
    "top_k": 1,
    "logits_dtype": "float32",
    "bias": "zeros",
    "bias_dtype": "bfloat16",
    "n_group": 1,
    "topk_group": 1,
}
FLAT = {**GROUPED, "n_group": 0, "topk_group": 0}
WITH_10 = {**PLAIN, "top_k": 10}

#: Release, call, what changes, the largest (or least) that is taken, what is not, and what happens then.
LIMITS = [
    (NEWEST, {**PLAIN, "method": "Llama4"}, "num_experts", 128, 129, "error"),
    (NEWEST, {**PLAIN, "method": "Llama4"}, "top_k", 1, 2, "error"),
    *(
        (release, {**PLAIN, "method": method}, name, most, most + 1, effect)
        for release, effect in (("0.6.11", "garbage"), ("0.6.15", "garbage"), ("0.6.16", "error"))
        for method in ("Default", "TopK", "SigmoidRenorm", "Sigmoid")
        for name, most in (("num_experts", 256), ("top_k", 8))
    ),
    # Beyond 32, the launcher rejects what the kernel would leave unwritten.
    ("0.6.15", {**PLAIN, "scheme": "fp8_block", "method": "Sigmoid"}, "top_k", 8, 33, "error"),
    (NEWEST, {**PLAIN, "method": "TopKSigmoid"}, "num_experts", 256, 257, "error"),
    *(
        (release, {**PLAIN, "method": "Renormalize"}, name, most, most + 1, "error")
        for release in ("0.6.7", "0.6.8", NEWEST)
        for name, most in (("num_experts", 2048), ("top_k", 32))
    ),
    ("0.5.3", {**PLAIN, "method": "Renormalize"}, "num_experts", 128, 129, "garbage"),
    ("0.6.5", {**PLAIN, "method": "Renormalize"}, "num_experts", 128, 129, "garbage"),
    ("0.5.3", {**WITH_10, "method": "Renormalize"}, "num_experts", 512, 513, "error"),
    ("0.6.5", {**WITH_10, "method": "Renormalize"}, "num_experts", 512, 513, "error"),
    ("0.6.5", {**WITH_10, "method": "Renormalize"}, "top_k", 10, 11, "error"),
    ("0.4.1", {**PLAIN, "method": "Renormalize"}, "top_k", 8, 9, "error"),
    # DeepSeekV3 without groups.
    *(
        (release, {**FLAT, "method": method}, name, most, most + 1, effect)
        for release, effect in (("0.6.8", "garbage"), ("0.6.15", "garbage"), ("0.6.16", "error"))
        for method in ("DeepSeekV3", "MiniMax2")
        for name, most in (("num_experts", 1024), ("top_k", 32))
    ),
    ("0.6.7", GROUPED, "num_experts", 32, 31, "error"),
    ("0.6.0", GROUPED, "num_experts", 8, 7, "error"),
    ("0.6.0", GROUPED, "num_experts", 384, 385, "error"),
    ("0.6.5", GROUPED, "num_experts", 512, 513, "error"),
    ("0.6.5", {**GROUPED, "num_experts": 384}, "top_k", 8, 9, "error"),
    ("0.6.5", {**GROUPED, "num_experts": 385}, "top_k", 22, 23, "error"),
    (NEWEST, {**GROUPED, "scheme": "fp8_block", "num_experts": 384}, "top_k", 8, 9, "error"),
    (NEWEST, {**GROUPED, "scheme": "fp8_block", "num_experts": 388}, "top_k", 22, 23, "error"),
    (NEWEST, {**GROUPED, "scheme": "fp8_block"}, "n_group", 1, 0, "error"),
    # Groups.
    (NEWEST, {**GROUPED, "num_experts": 72, "topk_group": 4}, "n_group", 8, 9, "error"),
    (NEWEST, {**GROUPED, "n_group": 4}, "num_experts", 128, 132, "error"),
    (NEWEST, {**GROUPED, "n_group": 8}, "topk_group", 4, 5, "error"),
    (NEWEST, {**GROUPED, "n_group": 2}, "topk_group", 1, 0, "garbage"),
    ("0.6.3", {**GROUPED, "n_group": 8}, "topk_group", 3, 0, "garbage"),
    # The kernel compares it with MaxNumTopGroups = 4, whether or not there are groups.
    ("0.4.0", FLAT, "topk_group", 4, 5, "error"),
    *((release, GROUPED, "topk_group", 4, 5, "error") for release in ("0.6.0", "0.6.5")),
    *(
        (
            "0.6.0",
            {**GROUPED, "num_experts": 48, "n_group": n},
            "topk_group",
            kept,
            fewer,
            "garbage",
        )
        for n, kept, fewer in ((2, 2, 1), (3, 3, 2), (4, 4, 3), (8, 4, 3))
    ),
]


def effect(release, call):
    violations = FlashInfer.of(release).violations(KernelCall(**call))
    return violations[0].rule.effect if violations else "runs"


@pytest.mark.parametrize(("release", "call", "name", "taken", "beyond", "then"), LIMITS)
def test_a_limit_is_taken_and_nothing_beyond(release, call, name, taken, beyond, then):
    assert effect(release, {**call, name: taken}) == "runs"
    assert effect(release, {**call, name: beyond}) == then


def test_without_groups_their_number_is_not_read():
    assert effect(NEWEST, {**GROUPED, "topk_group": 0}) == "runs"


@pytest.mark.parametrize(("num_experts", "noted"), [(384, 0), (385, 1)])
def test_the_fourth_128_experts_lose_two_slots(num_experts, noted):
    """RoutingKernelTopK.cuh, the second loop of reduceTopK, from 0.5.0 to 0.6.6."""
    call = KernelCall(**{**WITH_10, "method": "Renormalize", "num_experts": num_experts})
    assert len(FlashInfer.of("0.6.5").notes(call)) == noted


@pytest.mark.parametrize(
    "wheel", wheels_since("0.5.3", "flashinfer_python") or [None], ids=lambda w: w and w.name
)
def test_released_packages_say_what_we_say(wheel):
    if wheel is None:
        pytest.skip("MOE_WHEELS has no flashinfer_python")
    package = Package.of(wheel)
    # Calls of operators are about the package alone: test_operators.py has them.
    own = compare_operators(package).differences
    assert [line for line in examine(package).differences if line not in own] == []
