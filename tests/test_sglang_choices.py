"""Blocks of SGLang's models that give experts another choice, or other experts, than the model has."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from sglang_targets import opened
from told import code_sentences
from wheels import unpack, wheels_since

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.finding import Kind
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.targets.sglang.probe.router_case import give_bias

MODELS = load_models(packaged_directory())
LOGITS = "topk_output = self.topk(hidden_states, router_logits"
#: One mistake for each file of models.
MISTAKES = {
    "mixtral.py": (LOGITS, f"{LOGITS}.tanh()"),
    "qwen3_moe.py": (LOGITS, f"{LOGITS}.flip(0)"),
    "gemma4_causal.py": ("per_expert_scale[topk_ids]", "per_expert_scale[:1]"),
    "phimoe.py": ("multiplier_o = masked_gates", "multiplier_o = 2 * masked_gates"),
    "cohere2_moe.py": ("if renormalize:\n        topk_weights", "if True:\n        topk_weights"),
    "dbrx.py": ("renormalize=True", "renormalize=False"),
    "deepseek.py": ("MoeRunnerConfig(inplace", 'MoeRunnerConfig(activation="gelu", inplace'),
    "nemotron_h.py": ("activation=config.mlp_hidden_act", 'activation="silu"'),
    "ernie45_moe_vl.py": ("score_correction_bias[0]", "score_correction_bias[1]"),
    "gpt_oss.py": ("gemm1_clamp_limit=self", "gemm1_clamp_limit=2 * self"),
}
FOUND = {
    "mixtral-8x7b": "the block routes otherwise: ",
    "qwen3-30b-a3b": "the block routes otherwise: ",
    "gemma-4-26b-a4b": "Gemma4MoE.__init__ routes otherwise: 64 of 64 tokens",
    "phi-3.5-moe": "phimoe_routing_function routes otherwise: 64 of 64 tokens",
    "north-mini-code": "cohere2_sigmoid_topk routes otherwise: router weights are normalized",
    "dbrx-instruct": "renormalize: the model has softmax",
    "deepseek-moe-16b": "activation: the model has silu, the model code asks for gelu",
    "nemotron-3-nano": "activation: the model has relu2, the model code asks for silu",
    "ernie-4.5-vl-28b-a3b": "the block routes otherwise: TopK has row 1 of e_score_correction_bias",
    # Its decoder layer replaces the TopK of Qwen3's block.
    "intern-s1-pro": "InternS1ProTextDecoderLayer._custom_routing_function routes otherwise: 64/64",
    "gpt-oss-20b": "activation_limit: the model has 7, the model code asks for 14",
}
WHEELS = wheels_since("0.5.18", "sglang")


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    root = unpack(WHEELS[-1], tmp_path_factory.mktemp("sglang")) if WHEELS else None
    for file, (right, mistake) in MISTAKES.items() if root is not None else ():
        path = root / "sglang/srt/models" / file
        text = path.read_text()
        assert right in text, file
        path.write_text(text.replace(right, mistake))
    yield from opened(root)


@pytest.fixture(scope="module")
def right():
    yield from opened(WHEELS[-1] if WHEELS else None)


@pytest.mark.parametrize("name", FOUND)
def test_a_mistake_in_a_block_is_found(wrong, name):
    judged = compare_request(MODELS[name], wrong.layer_request(MODELS[name]))
    assert any(FOUND[name] in line for line in code_sentences(judged)), code_sentences(judged)


@pytest.mark.parametrize("name", FOUND)
def test_a_block_without_a_mistake_is_right(right, name):
    findings = compare_request(MODELS[name], right.layer_request(MODELS[name])).findings
    # SGLang's code of Gemma 4 asks for gelu in place of its approximation: docs/findings.md, 45.
    assert [finding for finding in findings if finding.kind is not Kind.NEARLY] == []


def test_what_the_code_of_models_does_wrong(right):
    found = {
        name: code_sentences(compare_request(MODELS[name], right.layer_request(MODELS[name])))
        for name in ("longcat-flash", "grok-1")
    }
    assert "the token itself, added, weighs 0.00306702 instead of 0.0184139" in str(found)
    assert "fused_moe_router_shim routes otherwise" in str(found)


@pytest.mark.parametrize("name", ["dbrx-instruct", "trinity-mini", "deepseek-vl2-tiny"])
def test_experts_that_are_called_as_a_function_reach_no_kernel(right, name):
    judged = judge(right, MODELS[name], "bf16")
    assert judged.verdict in (Verdict.MISSED, Verdict.FALLBACK)
    assert judged.by_choice
    assert "calls SGLang's own Triton kernel" in str(judged.gates)


def test_a_bias_that_a_routing_function_was_given_is_filled():
    bias = torch.nn.Parameter(torch.zeros(4))
    config = SimpleNamespace(
        correction_bias=None, custom_routing_function=partial(print, expert_bias=bias)
    )
    give_bias(config, torch.arange(4.0))
    assert bias.tolist() == [0, 1, 2, 3]


def test_the_routing_function_of_a_decoder_layer_is_judged(tmp_path):
    if not WHEELS:
        pytest.skip("no wheel of SGLang 0.5.18 or later")
    root = unpack(WHEELS[-1], tmp_path)
    path = root / "sglang/srt/models/interns1pro.py"
    path.write_text(path.read_text().replace("        if renormalize:", "        if False:"))
    for target in opened(root):
        model = MODELS["intern-s1-pro"]
        judged = code_sentences(compare_request(model, target.layer_request(model)))
        assert any("router weights are not normalized" in line for line in judged), judged
