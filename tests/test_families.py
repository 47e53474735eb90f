"""Families that no oracle runs here, read by hand from vllm 0.33.0, sglang 0.5.23; special configs."""

from __future__ import annotations

import pytest
from configs import read

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.routing import recipe_of

NUMBERS = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "hidden_act": "silu",
}
GROUPED = {**NUMBERS, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5}
BIASED = {"score_function": "sigmoid", "moe_router_enable_expert_bias": True}
GROUPS = "sigmoid -> + bias to choose -> best 4 of 8 groups by top2_sum -> top 4 -> / sum -> x 2.5"

DENSE_SIZE = {
    "hidden_size": 2048,
    "intermediate_size": 768,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "hidden_act": "silu",
}
XVERSE = {
    "hidden_size": 2048,
    "intermediate_size": 768,
    "num_experts": 64,
    "moe_top_k": 4,
    "num_shared_experts": 2,
    "hidden_act": "silu",
}

ERNIE = {
    "hidden_size": 2560,
    "moe_intermediate_size": 1536,
    "moe_num_experts": 64,
    "moe_k": 6,
    "moe_num_shared_experts": 2,
    "hidden_act": "silu",
    "moe_use_aux_free": True,
}

ROUTERS = [
    ("BailingMoeV2_5ForCausalLM", {**GROUPED, **BIASED}, GROUPS, "float32"),
    ("BailingMoeV3ForCausalLM", GROUPED, GROUPS, "float32"),
    ("Param2MoEForCausalLM", {**GROUPED, **BIASED}, GROUPS, "float32"),
    (
        "InternS1ProForConditionalGeneration",
        {**NUMBERS, "router_n_groups": 2},
        "softmax -> top 2 of each of 2 groups -> / sum",
        "bfloat16",
    ),
    (
        "InternS1ProForConditionalGeneration",
        {**NUMBERS, "router_n_groups": -1},
        "softmax -> top 4 -> / sum",
        "bfloat16",
    ),
    (
        "PanguUltraMoEForCausalLM",
        {**NUMBERS, "routed_scaling_factor": 2.5, "router_enable_expert_bias": True},
        "sigmoid -> + bias to choose -> top 4 -> / sum -> x 2.5",
        "bfloat16",
    ),
    (
        "PanguUltraMoEForCausalLM",
        {**NUMBERS, "routed_scaling_factor": 2.5},
        "sigmoid -> top 4 -> / sum -> x 2.5",
        "bfloat16",
    ),
    ("AliceAIForCausalLM", NUMBERS, "sigmoid -> + bias to choose -> top 4 -> / sum", "bfloat16"),
    (
        "K2HorizonForCausalLM",
        {
            **NUMBERS,
            "router_score_func": "sigmoid",
            "moe_gate_bias": True,
            "router_scaling_factor": 2.0,
        },
        "sigmoid -> + bias to choose -> top 4 -> / sum -> x 2",
        "bfloat16",
    ),
    (
        "Step5ForCausalLM",
        {
            **{k: v for k, v in NUMBERS.items() if k != "norm_topk_prob"},
            "moe_router_scaling_factor": 3.0,
            "use_moe_router_bias": True,
            "norm_expert_weight": True,
        },
        "sigmoid -> + bias to choose -> top 4 -> / sum -> x 3",
        "float32",
    ),
    (
        "DeepseekV41ForCausalLM",
        {**NUMBERS, "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "n_shared_experts": 1},
        "sqrtsoftplus -> + bias to choose -> top 4 -> / sum -> x 1.5",
        "float32",
    ),
    ("DeepseekForCausalLM", NUMBERS, "softmax -> top 4 -> / sum", "bfloat16"),
    ("SDARMoeForCausalLM", NUMBERS, "softmax -> top 4 -> / sum", "bfloat16"),
    ("SDARMoeForCausalLM", {**NUMBERS, "norm_topk_prob": False}, "softmax -> top 4", "bfloat16"),
    ("IQuestQ1ForCausalLM", DENSE_SIZE, "softmax -> top 4 -> / sum", "float32"),
    ("MiniCPMForCausalLM", DENSE_SIZE, "softmax -> top 4 -> / sum", "bfloat16"),
    ("XverseMoeForCausalLM", XVERSE, "softmax -> top 4", "bfloat16"),
    (
        "XverseMoeForCausalLM",
        {**XVERSE, "norm_topk_prob": True},
        "softmax -> top 4 -> / sum",
        "bfloat16",
    ),
    ("LLaDA2MoeModelLM", {**GROUPED, **BIASED}, GROUPS, "float32"),
    (
        "Ernie4_5_MoeForCausalLM",
        ERNIE,
        "softmax -> + bias to choose -> top 6 -> / sum",
        "float32",
    ),
    (
        "GigaChat35ForCausalLM",
        {**GROUPED, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
        GROUPS,
        "float32",
    ),
    ("InternS2MobiusForConditionalGeneration", NUMBERS, "softmax -> top 4 -> / sum", "bfloat16"),
    (
        "MistralLarge3ForCausalLM",
        {
            **NUMBERS,
            "model_type": "deepseek_v3",
            "n_group": 1,
            "topk_group": 1,
            "scoring_func": "softmax",
            "routed_scaling_factor": 1.0,
            "llama_4_scaling": {"beta": 0.1},
        },
        "softmax -> top 4 -> / sum",
        "bfloat16",
    ),
    (
        "LagunaForCausalLM",
        {**NUMBERS, "moe_router_score_func": "sqrtsoftplus", "moe_routed_scaling_factor": 1.0},
        "sqrtsoftplus -> + bias to choose -> top 4 -> / sum",
        "float32",
    ),
]


@pytest.mark.parametrize(("architecture", "config", "recipe", "logits"), ROUTERS)
def test_routers(tmp_path, architecture, config, recipe, logits):
    spec = read(tmp_path, {"architectures": [architecture], **config})
    assert str(recipe_of(spec.router)) == recipe
    assert spec.router.logits_dtype == logits
    assert (spec.unproven, spec.router.not_expressible) == ((), None)


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("BailingMoeV2_5ForCausalLM", GROUPED),
        ("Param2MoEForCausalLM", {**GROUPED, "score_function": "softmax"}),
        ("LLaDA2MoeModelLM", {**GROUPED, **BIASED, "expert_capacity": 16}),
        ("GigaChat35ForCausalLM", GROUPED),
        ("Ernie4_5_MoeForCausalLM", {**ERNIE, "moe_use_aux_free": False}),
    ],
)
def test_what_is_not_known_of_them_is_not_judged(tmp_path, architecture, config):
    spec = read(tmp_path, {"architectures": [architecture], **config})
    assert spec.unproven or spec.router.not_expressible


def test_another_selection_than_the_familys_is_rejected(tmp_path):
    config = {"architectures": ["MistralLarge3ForCausalLM"], **GROUPED, "topk_method": "noaux_tc"}
    with pytest.raises(ModelError, match='topk_method: found "noaux_tc", expected one of null'):
        read(tmp_path, config)


def test_layers_of_puzzle_models_differ(tmp_path):
    """NemotronHPuzzle gives each block its own numbers (vllm 0.33.0 nemotron_h.py)."""
    moe = {"block_type": "moe", "n_routed_experts": 128, "num_experts_per_tok": 6}
    mamba = {"block_type": "mamba"}
    config = {
        "architectures": ["NemotronHPuzzleForCausalLM"],
        "hidden_size": 2688,
        "moe_intermediate_size": 1856,
        "block_configs": [mamba, moe, mamba, {**moe, "num_experts_per_tok": 2}, moe],
    }
    spec = read(tmp_path, config)
    assert (spec.num_layers, spec.router.top_k, spec.router.num_experts) == (5, 6, 128)
    assert [group.as_dict() for group in spec.layers] == [
        {"layers": "0, 2", "kind": "dense"},
        {"layers": "3", "kind": "moe", "router": {"top_k": 2}},
    ]


def test_a_list_of_equal_values_contradicts_nothing(tmp_path):
    """HunYuan writes one number of shared experts for each layer."""
    config = {
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "intermediate_size": 3072,
        "num_experts": 64,
        "moe_topk": [8] * 32,
        "num_shared_expert": [1] * 32,
        "num_hidden_layers": 32,
    }
    spec = read(tmp_path, config)
    assert spec.experts.shared_experts == 1
    assert not any("shared" in note for note in spec.notes)
