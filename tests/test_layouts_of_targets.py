"""How SGLang prepares weights: what lies otherwise than its call says is found."""

from __future__ import annotations

import pytest
from wheels import run_on, wheels_since

WHEELS = wheels_since("0.5.23", "sglang")
HALVES = "gemm1_weights and gemm1_weights_scale: gate and up halves are swapped"
#: What is found when SGLang is broken; see `broken_layouts.py`.
FOUND = {
    "nothing bf16": [],
    "nothing mxfp4": [],
    "blocks not made": ["weight_layout says BlockMajorK, the weights are MajorK"],
    "halves not swapped": [HALVES],
    "loaded swapped": [HALVES],
    "not shuffled": ["gemm2_weights: rows are not shuffled"],
    "layout says blocks": ["weight_layout says BlockMajorK, the weights are MajorK"],
    "not interleaved": ["gemm1_weights: gate and up rows do not alternate"],
    "scales of activations swizzled": [
        "hidden_states_scale: it lies in 128x4 tiles, the kernel reads rows in their order"
    ],
    "scales of weights not in tiles": [
        "gemm2_weights_scale: it lies in rows in their order, the kernel reads 128x4 tiles"
    ],
    "swapped in another format": ["gemm1_weights: gate and up halves are swapped"],
    "scales of another format": [
        "output2_scale_scalar arrives as w1_scale * a1_scale, the layer has w2_scale * a2_scale"
    ],
}


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no SGLang whose preparation is edited")
    return run_on(f"sglang@{WHEELS[-1]}", "broken_layouts.py")


@pytest.mark.parametrize("what", FOUND)
def test_what_lies_in_another_order_is_found(broken, what):
    answered, *told = broken[what]
    assert answered == 1
    assert [sentences for _, *sentences in told] == ([FOUND[what]] if FOUND[what] else [])
