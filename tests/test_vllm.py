"""The adapter against a real vLLM (`tox -e vllm` installs one); skipped without."""

from __future__ import annotations

import pytest

from pytest_moe_routing.backends import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.targets import judge, load_target

pytest.importorskip("vllm")
MODELS = load_models(packaged_directory())


@pytest.fixture(scope="module")
def target():
    return load_target("vllm", FlashInfer.of("0.7.0"))


@pytest.mark.parametrize(
    ("model", "method", "router"),
    [
        ("deepseek-r1", "DeepSeekV3", "GroupedTopKRouter"),
        ("nemotron-3-nano", "DeepSeekV3", "GroupedTopKRouter"),
        ("minimax-m2", "MiniMax2", "FusedTopKBiasRouter"),
        ("llama-4-scout", "Llama4", "CustomRoutingRouter"),
    ],
)
def test_the_real_routers_classify(target, model, method, router):
    found = target.classify(MODELS[model])
    assert found.method == method
    assert found.path[0].startswith(router)


def test_the_real_gates_answer_and_know_no(target):
    gates = {g.name: g for g in target.gates(MODELS["deepseek-r1"], "fp8_block", "DeepSeekV3")}
    assert all(gate.ok for gate in gates.values())
    refused = target.gates(MODELS["deepseek-r1"], "fp8_block", "Llama4")
    assert [g.name for g in refused if not g.ok] == ["routing method", "is_supported_config"]


def test_the_activation_is_named_with_the_layout_of_the_checkpoint(target):
    assert judge(target, MODELS["minimax-m3"], "nvfp4").verdict == "exact"
    gates = {g.name: g.ok for g in target.gates(MODELS["gpt-oss-20b"], "nvfp4", "Renormalize")}
    assert not gates["activation"]


def test_the_real_platform_is_back_after_asking(target):
    from vllm.model_executor.layers.fused_moe.experts import trtllm_fp8_moe

    target.gates(MODELS["deepseek-r1"], "fp8_block", "DeepSeekV3")
    assert type(trtllm_fp8_moe.current_platform).__name__ != "_Blackwell"


def test_the_router_weight_of_llama4_is_on_the_wrong_side_of_nvfp4(target):
    """A finding: docs/findings.md. When vLLM stops accepting this, the test says so."""
    assert judge(target, MODELS["llama-4-scout"], "nvfp4").verdict == "wrong"
    assert judge(target, MODELS["llama-4-scout"], "fp8_per_tensor").verdict == "exact"
