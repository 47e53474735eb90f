"""Quantization methods of SGLang with mistakes put into them, each found by the question about it."""

from __future__ import annotations

import pytest
from sglang_targets import opened
from wheels import unpack, wheels_since

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.formats import unlike_formats
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.other_experts import other_calls
from pytest_moe_routing.report.text import sentences

MODELS = load_models(packaged_directory())
#: A method's file, and what is put in the place of what. A file of 0.5.18 may lack it.
MISTAKES = (
    # The hidden size, which is handed on as the experts' intermediate size.
    (
        "compressed_tensors/schemes/compressed_tensors_w8a8_fp8_moe.py",
        "intermediate_size=layer.w2_weight.shape[2],",
        "intermediate_size=layer.w2_weight.shape[1],",
    ),
    # Who applies the scaling factor: the code of DeepSeek's models makes up for it.
    (
        "mxfp4_flashinfer_cutlass_moe.py",
        "    fuse_routed_scaling_factor_in_topk = True",
        "    fuse_routed_scaling_factor_in_topk = False",
    ),
    (
        "compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4_moe.py",
        "intermediate_size_per_partition=layer.intermediate_size_per_partition,",
        "intermediate_size_per_partition=layer.hidden_size,",
    ),
    # What its other kernel is given.
    (
        "compressed_tensors/schemes/compressed_tensors_w4a4_nvfp4_moe.py",
        "layer.g1_alphas,\n                    layer.w2_input_scale_quant,",
        "layer.g2_alphas,\n                    layer.w2_input_scale_quant,",
    ),
    (
        "compressed_tensors/schemes/compressed_tensors_w4a4_mxint4_moe.py",
        "intermediate_size=self.moe_runner_config.intermediate_size_per_partition,",
        "intermediate_size=self.moe_runner_config.hidden_size,",
    ),
    (
        "unquant.py",
        "apply_routed_scaling_factor=not layer.should_fuse_routed_scaling_factor_in_topk",
        "apply_routed_scaling_factor=layer.should_fuse_routed_scaling_factor_in_topk",
    ),
    # Of the method for TRT-LLM's kernel with one scale per tensor.
    (
        "modelopt_quant.py",
        "local_num_experts=layer.num_local_experts,\n                intermediate_size=",
        "local_num_experts=layer.num_experts,\n                intermediate_size=",
    ),
    # Of gpt-oss' method on Hopper.
    ("mxfp4.py", "swiglu_alpha=layer.swiglu_alpha,", "swiglu_alpha=layer.swiglu_beta,"),
)
SIZE = "intermediate_size arrives as 256, the layer has 512"
NOWHERE = "routed_scaling_factor is applied nowhere; the layer applies it once"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    wheels = wheels_since("0.5.18", "sglang")
    root = unpack(wheels[-1], tmp_path_factory.mktemp("sglang")) if wheels else None
    for file, right, wrong in MISTAKES if root else ():
        path = root / "sglang/srt/layers/quantization" / file
        path.write_text(path.read_text().replace(right, wrong))
    yield from opened(root)


def told(findings):
    return list(sentences(findings))


def test_a_size_that_is_another_dimension_of_the_weights(target):
    """The checkpoint is compressed-tensors'; SGLang's own FP8 method hands on the right size."""
    [unlike] = unlike_formats(target, "fp8_block", [MODELS["qwen3-30b-a3b"]]).unlike
    assert told(unlike.record.findings) == [SIZE]


def test_what_a_format_of_nvfp4_hands_on(target):
    found = unlike_formats(target, "nvfp4", [MODELS["qwen3-30b-a3b"]])
    [unlike], [call] = found.unlike, found.calls
    assert told(unlike.record.findings) == [SIZE]
    text = "quant_scales arrives as fc2 dequantization, the layer has fc1 dequantization"
    assert told(call.findings) == [text]


def test_a_size_of_a_kernel_that_routes(target):
    assert SIZE in told(judge(target, MODELS["deepseek-r1"], "mxint4").findings)


def test_a_number_of_experts_of_a_kernel_that_routes(target):
    found = told(judge(target, MODELS["qwen3-30b-a3b"], "fp8_per_tensor").findings)
    assert found == ["local_num_experts arrives as 128, the layer has 64"]


def test_a_factor_that_nobody_applies(target):
    call, *_ = target.other_experts(MODELS["glm-4.5"], "bf16")
    assert told(call.findings) == [NOWHERE]


def test_a_parameter_of_an_activation_on_hopper(target):
    call, *_ = target.other_experts(MODELS["gpt-oss-20b"], "mxfp4")
    assert (call.device, told(call.findings)) == (
        "Hopper",
        ["swiglu_alpha arrives as 1, the layer has 1.702"],
    )


def test_a_factor_that_only_the_code_of_some_models_applies(target):
    """In 0.5.18, that is so of the code of Ling and Ring as released."""
    is_old = target.version() == "0.5.18"
    scheme, wrong = ("nvfp4", "ring-mini-sparse-2.0") if is_old else ("mxfp4", "glm-4.5")
    calls = other_calls(target, scheme, [MODELS["moonlight-16b-a3b"], MODELS[wrong]]).wrong
    found = [call for call in calls if NOWHERE in told(call.findings)]
    assert found
    assert {model for call in found for model in call.models} == {MODELS[wrong]}
