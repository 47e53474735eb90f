"""Values that model.yaml has no key for, which vLLM's and SGLang's MoE blocks read from a config.

blocks.yaml and configs.yaml repeat them by architecture. They are compared with published configs,
with transformers' config classes, and with each other: each was read in another framework's code.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import pytest_moe_routing
from pytest_moe_routing.reference.quantization import find_format
from pytest_moe_routing.schemes import storage_of

TARGETS = Path(pytest_moe_routing.__file__).parent / "targets"
FILES = {"vllm": TARGETS / "vllm" / "blocks.yaml", "sglang": TARGETS / "sglang" / "configs.yaml"}

#: From config.json: arcee-ai/Trinity-Nano-Preview, deepseek-ai/DeepSeek-R1, DeepSeek-V2-Lite and
#: DeepSeek-V4-Flash.
PUBLISHED = {
    "AfmoeForCausalLM": {"n_group": 1, "topk_group": 1},
    "DeepseekV2ForCausalLM": {"topk_method": "greedy", "scoring_func": "softmax"},
    "DeepseekV3ForCausalLM": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "DeepseekV4ForCausalLM": {
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "swiglu_limit": 10.0,
        "num_hash_layers": 3,
    },
}
#: transformers' config classes, by architecture.
CLASSES = {
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "LagunaForCausalLM": "laguna",
    "LongcatFlashForCausalLM": "longcat_flash",
    "MiMoV2FlashForCausalLM": "mimo_v2_flash",
    "MiniMaxM3ForCausalLM": "minimax_m3_vl_text",
    "NemotronHForCausalLM": "nemotron_h",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
}
#: What is no value of a config: sizes of what is built, the name of an activation in vLLM, and
#: limits and kinds of layers, which are lists of the length that the block which is built needs.
OWN = {
    "hidden_act",
    "max_position_embeddings",
    "mlp_layer_types",
    "moe_intermediate_size",
    "moe_layer_end_index",
    "moe_layer_start_index",
    "moe_shared_expert_intermediate_size",
    "shared_expert_intermediate_size",
    "swiglu_limits",
    "swiglu_limits_shared",
}


def read(name):
    return yaml.safe_load(FILES[name].read_text("utf-8"))


def rows(name):
    """What a file has of each architecture."""
    data = read(name)
    if name == "sglang":
        return data["published"]
    return {a: row["published"] for a, row in data["blocks"].items() if "published" in row}


@pytest.mark.parametrize("architecture", PUBLISHED)
def test_values_are_those_of_published_configs(architecture):
    config, compared = PUBLISHED[architecture], 0
    for row in filter(None, (rows(name).get(architecture) for name in FILES)):
        shared = row.keys() & config.keys()
        assert shared
        assert {key: row[key] for key in shared} == {key: config[key] for key in shared}
        compared += 1
    assert compared


@pytest.mark.parametrize("name", FILES)
def test_values_are_those_of_config_classes(name):
    transformers = pytest.importorskip("transformers")
    compared = set()
    for architecture, model_type in CLASSES.items():
        made = transformers.CONFIG_MAPPING[model_type]()
        for key, value in rows(name).get(architecture, {}).items():
            if hasattr(made, key) and key not in OWN:
                assert getattr(made, key) == value, (architecture, key)
                compared.add((architecture, key))
    expected = {
        "vllm": {
            ("NemotronHForCausalLM", "mlp_hidden_act"),
        },
        "sglang": {("MiMoV2FlashForCausalLM", "n_group"), ("NemotronHForCausalLM", "mlp_bias")},
    }
    assert expected[name] <= compared


def test_the_product_of_longcats_router_has_a_bias_where_transformers_has_one():
    longcat = pytest.importorskip("transformers.models.longcat_flash.modeling_longcat_flash")
    config = longcat.LongcatFlashConfig(hidden_size=8, n_routed_experts=4)
    has_bias = longcat.LongcatFlashTopkRouter(config).classifier.bias is not None
    assert rows("sglang")["LongcatFlashForCausalLM"]["router_bias"] is has_bias


def test_both_frameworks_are_told_the_same():
    vllm, sglang = rows("vllm"), rows("sglang")
    compared = 0
    for architecture in vllm.keys() & sglang.keys():
        for key in vllm[architecture].keys() & sglang[architecture].keys() - OWN:
            values = vllm[architecture][key], sglang[architecture][key]
            # null gives no attribute: the framework has a default of its own.
            if None not in values:
                assert values[0] == values[1], (architecture, key)
                compared += 1
    assert compared > 6


def test_blocks_of_scales_are_those_of_the_formats():
    schemes = read("sglang")["schemes"]
    blocks = {name: list(find_format(storage_of(name).weight).block) for name in schemes}
    configs = {name: row["config"] for name, row in schemes.items() if row["config"]}
    arguments = {name: row.get("arguments", {}) for name, row in configs.items()}
    assert arguments["fp8_block"]["weight_block_size"] == blocks["fp8_block"] == [128, 128]
    assert arguments["mxfp8"]["weight_block_size"] == blocks["mxfp8"] == [1, 32]
    assert arguments["nvfp4"]["group_size"] == blocks["nvfp4"][1] == 16
    assert arguments["mxfp8"]["use_mxfp8"] is True
    kimi = schemes["mxfp4"]["architectures"]["KimiK3ForConditionalGeneration"]
    for name, row in (("mxfp4", kimi), ("mxint4", schemes["mxint4"])):
        group = row["in_checkpoint"]["config_groups"]["group_0"]["weights"]["group_size"]
        assert group == blocks[name][1] == 32
