"""What a child is asked of models that it cannot tell apart."""

from __future__ import annotations

from dataclasses import replace

from pytest_moe_routing.data import packaged_directory
from pytest_moe_routing.models import load_named
from pytest_moe_routing.oracle.swept_configs import as_model
from pytest_moe_routing.targets.vllm.questions import of_case, of_gates

MODEL = load_named("deepseek-r1", packaged_directory())
SAME = replace(MODEL, model="another", hf_repo="a/b", checkpoints=("bf16",), num_layers=3)
BIASED = replace(MODEL, router=replace(MODEL.router, correction_bias="bfloat16"))


def test_models_that_differ_in_nothing_that_is_read_have_one_question():
    assert of_case(MODEL, "bf16") == of_case(SAME, "bf16")
    assert of_gates(MODEL, "Default", "bf16") == of_gates(SAME, "Default", "bf16")


def test_all_else_makes_another_one():
    assert of_case(MODEL, "bf16") != of_case(BIASED, "bf16")
    assert of_gates(MODEL, "Default", "bf16") == of_gates(BIASED, "Default", "bf16")


def test_what_no_repository_has_is_told():
    swept = as_model(MODEL.router, MODEL.experts)
    published = replace(swept, hf_repo=MODEL.hf_repo)
    assert of_case(swept, "bf16") != of_case(published, "bf16")
