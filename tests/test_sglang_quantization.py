"""Quantization methods of SGLang with mistakes put into them, each found by the question about it."""

from __future__ import annotations

import pytest
from sglang_targets import opened
from wheels import unpack, wheels_since

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.formats import unlike_formats
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
)


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    wheels = wheels_since("0.5.18", "sglang")
    root = unpack(wheels[-1], tmp_path_factory.mktemp("sglang")) if wheels else None
    for file, right, wrong in MISTAKES if root else ():
        path = root / "sglang/srt/layers/quantization" / file
        path.write_text(path.read_text().replace(right, wrong))
    yield from opened(root)


def test_a_size_that_is_another_dimension_of_the_weights(target):
    """The checkpoint is compressed-tensors'; SGLang's own FP8 method hands on the right size."""
    [unlike] = unlike_formats(target, "fp8_block", [MODELS["qwen3-30b-a3b"]]).unlike
    text = "intermediate_size arrives as 256, the layer has 512"
    assert list(sentences(unlike.record.findings)) == [text]


def test_a_factor_that_only_the_code_of_some_models_applies(target):
    """In 0.5.18, that is so of the code of Ling and Ring as released."""
    is_old = target.version() == "0.5.18"
    scheme, wrong = ("nvfp4", "ring-mini-sparse-2.0") if is_old else ("mxfp4", "glm-4.5")
    models = [MODELS["moonlight-16b-a3b"], MODELS[wrong]]
    text = "routed_scaling_factor is applied nowhere; the layer applies it once"
    found = [
        call
        for call in other_calls(target, scheme, models).wrong
        if text in sentences(call.findings)
    ]
    assert found
    assert {model for call in found for model in call.models} == {MODELS[wrong]}
