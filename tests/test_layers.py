"""Layers that differ: in model.yaml, in a ModelSpec, and read from a config."""

from __future__ import annotations

import json

import pytest
from configs import R1, read

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import LayerGroup, dump_model, load_model, load_models

YAML = """\
model: Layered
hf_repo: someone/Layered
architecture: SomeForCausalLM
router:
  num_experts: 8
  top_k: 2
  scoring_func: sigmoid
  correction_bias: null
  renormalize: true
  logits_dtype: float32
experts: {hidden_size: 64, intermediate_size: 32, activation: silu, gated: true}
num_layers: 6
layers:
  - {layers: "0", kind: dense}
  - {layers: "2, 4-5", router: {top_k: 4}, experts: {activation_limit: 7.0}}
checkpoints: [nvfp4]
sources: ["made up for this test"]
"""


def load(tmp_path, text, id_="layered"):
    path = tmp_path / id_ / "model.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return load_model(path)


def test_groups_are_read(tmp_path):
    spec = load(tmp_path, YAML)
    dense, other = spec.layers
    assert (dense.kind, dense.indices) == ("dense", (0,))
    assert (other.kind, other.indices) == ("moe", (2, 4, 5))
    assert str(dense) == "layer 0 is dense"
    assert str(other) == "layers 2, 4-5 are different: top_k 4, activation_limit 7.0"


def test_variants_are_whole_models(tmp_path):
    spec = load(tmp_path, YAML)
    variants = spec.variants()
    assert list(variants) == ["", "2, 4-5"]
    usual, other = variants.values()
    assert (usual.router, usual.experts, usual.layers) == (spec.router, spec.experts, ())
    assert (other.router.top_k, other.router.num_experts) == (4, 8)
    assert (other.experts.activation_limit, usual.experts.activation_limit) == (7.0, None)
    assert other.id == spec.id


def test_groups_are_inherited_and_replaced(tmp_path):
    base = load(tmp_path, YAML)
    like = "model: Like\nhf_repo: a/Like\narchitecture: X\nlike: layered\ncheckpoints: [nvfp4]\n"
    like += 'sources: ["made up for this test"]\n'
    assert load(tmp_path, like, "like").layers == base.layers
    own = load(tmp_path, like + 'layers: [{layers: "1", kind: hash_moe}]\n', "like")
    assert own.layers == (LayerGroup(layers="1", kind="hash_moe"),)
    assert load(tmp_path, like + "layers: []\n", "like").layers == ()


def test_groups_are_plain_data(tmp_path):
    data = json.loads(json.dumps(load(tmp_path, YAML).as_dict()))
    assert data["num_layers"] == 6
    assert data["layers"] == [
        {"layers": "0", "kind": "dense"},
        {
            "layers": "2, 4-5",
            "kind": "moe",
            "router": {"top_k": 4},
            "experts": {"activation_limit": 7.0},
        },
    ]


MISTAKES = {
    "no list": (
        ('layers:\n  - {layers: "0", kind: dense}\n  - ', "layers: "),
        "layers: found a mapping",
    ),
    "no mapping": (('{layers: "0", kind: dense}', "0"), ":14: layers[0]: found '0'"),
    "unknown key": (
        ("router: {top_k", "routers: {top_k"),
        ":15: layers[1].routers: unknown key",
    ),
    "unknown key within": (("{top_k", "{topk"), "router.topk: unknown key; did you mean top_k?"),
    "wrong value": (("top_k: 4", "top_k: x"), ":15: router.top_k: found 'x'"),
    "wrong kind": (
        ("kind: dense", "kind: sparse"),
        "layers[0].kind: found 'sparse', expected one of",
    ),
    "no range": (('"0"', '"first"'), "layers[0].layers: found 'first', expected ascending ranges"),
    "descending": (('"2, 4-5"', '"4-5, 2"'), "expected ascending ranges"),
    "endless": (('"2, 4-5"', '"2-9999"'), "expected ascending ranges"),
    "twice": (('"2, 4-5"', '"0-5"'), "layers: found layer 0 twice"),
    "too many": (('"2, 4-5"', '"2-6"'), "found layer 6, expected layers below num_layers (6)"),
    "no difference": (("kind: dense", "kind: moe"), "something in which these layers differ"),
    "dense with a router": (('{layers: "2, 4-5",', '{layers: "2", kind: dense,'), "found dense"),
    "impossible": (
        ("top_k: 4", "top_k: 9"),
        "found top_k 9 in layers 2, 4-5, expected at most num",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes(tmp_path, mistake):
    (old, new), expected = MISTAKES[mistake]
    assert old in YAML
    with pytest.raises(ModelError) as caught:
        load(tmp_path, YAML.replace(old, new))
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


# -- activations and their parameters -------------------------------------------------------------


@pytest.mark.parametrize(
    ("experts", "expected"),
    [
        ("activation: swigluoai", "experts.activation_alpha: found nothing, expected a number"),
        ("activation: swigluoai, activation_alpha: 1.7", "activation_beta: found nothing"),
        ("activation: swiglustep", "activation_limit: found nothing"),
        ("activation: silu, activation_alpha: 1.7", "activation_alpha: found 1.7, expected none"),
        ("activation: silu, activation_beta: 1.0", "activation_beta: found 1, expected none"),
        ("activation: silu, activation_limit: 0", "activation_limit: found '0', expected a number"),
    ],
)
def test_parameters_of_activations(tmp_path, experts, expected):
    with pytest.raises(ModelError) as caught:
        load(tmp_path, YAML.replace("activation: silu", experts))
    assert expected in str(caught.value)


# -- read from a config ---------------------------------------------------------------------------

STEP = {
    "architectures": ["Step3p5ForCausalLM"],
    "num_hidden_layers": 8,
    "moe_layers_enum": "3,4,5,6,7",
    "swiglu_limits": [0, 0, 0, 0, 0, 0, 7.0, 7.0],
}
QWEN = {"architectures": ["Qwen3MoeForCausalLM"], "num_hidden_layers": 6}


def groups(tmp_path, config):
    return [group.as_dict() for group in read(tmp_path, config).layers]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mlp_only_layers": [0, 1, 2, 3, 4, 5]}, "no experts: each of its 6 layers is dense"),
        ({"decoder_sparse_step": 4096}, "no experts: each of its 6 layers is dense"),
    ],
)
def test_there_are_layers_with_experts(tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        read(tmp_path, {**QWEN, **change})


#: Keys by the least number that each may have.
LEAST = {
    1: [
        *("num_hidden_layers", "n_layers", "num_layers", "n_layer", "decoder_sparse_step"),
        *("interleave_moe_layer_step", "moe_layer_interval", "moe_layer_freq"),
        "expert_layer_period",
    ],
    0: [
        *("expert_layer_offset", "first_k_dense_replace", "num_dense_layers"),
        *("moe_layer_num_skipped", "moe_layer_start_index", "num_hash_layers"),
    ],
    -1: ["moe_layer_end_index"],
}


@pytest.mark.parametrize(("key", "least"), [(key, n) for n, keys in LEAST.items() for key in keys])
def test_numbers_of_layers(tmp_path, key, least):
    config = {**QWEN, key: least}
    if least != 1:
        assert read(tmp_path, config).num_layers == 6
    expected = rf"{key}: found {{}}, expected an integer >= {least} and <= 4096 or null$"
    for value, shown in ((least - 1, least - 1), ("2", '"2"'), (True, "true"), (1.5, "1.5")):
        with pytest.raises(ModelError, match=expected.format(shown)):
            read(tmp_path, {**config, key: value})
    assert read(tmp_path, {"num_layers": 6, **config, key: None}).router


@pytest.mark.parametrize(
    ("key", "least"),
    [
        *[(key, 1) for key in ("hidden_size", "moe_intermediate_size", "num_experts_per_tok")],
        *[(key, 1) for key in ("n_routed_experts", "n_group", "topk_group")],
        ("n_shared_experts", 0),
    ],
)
def test_other_counts(tmp_path, key, least):
    for value in (least - 1, -(2**40)):
        with pytest.raises(
            ModelError, match=rf"{key}: found {value}, expected an integer >= {least}|no exp"
        ):
            read(tmp_path, {**R1, key: value})


def test_clamps_of_single_layers(tmp_path):
    spec = read(tmp_path, STEP)
    assert spec.experts.activation == "silu"
    assert spec.experts.activation_limit is None
    assert [group.as_dict() for group in spec.layers] == [
        {"layers": "0-2", "kind": "dense"},
        {
            "layers": "6-7",
            "kind": "moe",
            "experts": {"activation_limit": 7.0, "activation": "swiglustep"},
        },
    ]


def test_a_clamp_of_all_layers_is_the_models(tmp_path):
    spec = read(tmp_path, {**STEP, "swiglu_limits": [7.0] * 8})
    assert (spec.experts.activation, spec.experts.activation_limit) == ("swiglustep", 7.0)
    assert [group.kind for group in spec.layers] == ["dense"]


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ([0, 7.0], "swiglu_limits: found 2 values that differ"),
        ([0, 0, 0, 0, "x", 7.0, 0, 0], 'swiglu_limits.4: found "x", expected a number'),
        ([-7.0] * 8, "swiglu_limits: found -7.0, expected a number >= 1e-06"),
    ],
)
def test_limits_that_cannot_be(tmp_path, limits, expected):
    with pytest.raises(ModelError) as caught:
        read(tmp_path, {**STEP, "swiglu_limits": limits})
    assert expected in str(caught.value)


def test_top_k_by_layer(tmp_path):
    """Nemotron's puzzle models choose another number of experts in each layer; dense ones none."""
    spec = read(
        tmp_path, {**QWEN, "num_experts_per_tok": [0, 8, 8, 4, 8, 4], "mlp_only_layers": [0]}
    )
    assert spec.router.top_k == 8
    assert [group.as_dict() for group in spec.layers] == [
        {"layers": "0", "kind": "dense"},
        {"layers": "3, 5", "kind": "moe", "router": {"top_k": 4}},
    ]
    with pytest.raises(ModelError, match=r"num_experts_per_tok.0: found 0, expected an integer"):
        read(tmp_path, {**QWEN, "num_experts_per_tok": [0, 8, 8, 4, 8, 4]})


@pytest.mark.parametrize(
    ("change", "dense"),
    [
        ({"first_k_dense_replace": 2}, "0-1"),
        ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, "0-1, 3, 5"),
        ({"moe_layer_freq": [0, 1, 1, 0, 1, 0]}, "0, 3, 5"),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [1]}, "0-2, 4"),
        ({"interleave_moe_layer_step": 2}, "0, 2, 4"),
        ({"moe_layers": [1, 3, 5]}, "0, 2, 4"),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, "0, 2, 4"),
        ({"expert_layer_period": 2}, "1, 3, 5"),
        ({"moe_layer_start_index": 2, "moe_layer_end_index": 4}, "0-1, 5"),
        ({"hybrid_override_pattern": "MEM*ME"}, "0, 2-4"),
        ({"layers_block_type": ["mamba", "moe", "mamba", "attention", "mamba", "moe"]}, "0, 2-4"),
        ({"mlp_layer_types": ["dense", "sparse", "moe", "dense", "sparse", "moe"]}, "0, 3"),
    ],
)
def test_dense_layers(tmp_path, change, dense):
    """Rules of transformers 5.19.0: qwen3_moe, llama4, jamba, ernie4_5_moe, nemotron_h, axk2."""
    assert groups(tmp_path, {**QWEN, **change}) == [{"layers": dense, "kind": "dense"}]


@pytest.mark.parametrize(
    "change", [{"num_hash_layers": 3}, {"mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * 3}]
)
def test_layers_routed_by_a_table(tmp_path, change):
    config = {"architectures": ["DeepseekV4ForCausalLM"], "num_hidden_layers": 6, **change}
    assert groups(tmp_path, config) == [{"layers": "0-2", "kind": "hash_moe"}]
    assert list(read(tmp_path, config).variants()) == [""]


# -- what the experts compute ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "limit", "alpha", "beta", "bias"),
    [
        ({"model_type": "gpt_oss", "swiglu_limit": 5.0}, 5.0, 1.702, 1.0, True),
        ({"model_type": "minimax_m3_vl_text", "swiglu_alpha": 1.5}, 7.0, 1.5, 1.0, False),
        ({"model_type": "glm5_next_text"}, 10.0, None, None, False),
        ({"model_type": "hy_v4"}, 10.0, None, None, False),
        ({"model_type": "hy_v4", "swiglu_limit": 0}, None, None, None, False),
        ({"model_type": "deepseek_v4", "swiglu_limit": 7}, 7.0, None, None, False),
        (
            {
                "model_type": "kimi_linear",
                "hidden_act": "situ",
                "activation_situ_beta": 4.0,
                "activation_situ_linear_beta": 25.0,
            },
            None,
            4.0,
            25.0,
            False,
        ),
        ({"model_type": "kimi_linear", "activation_situ_beta": 4.0}, None, None, None, False),
        # transformers' code of DeepSeek-V3 has no clamp.
        ({**R1, "swiglu_limit": 10.0}, None, None, None, False),
    ],
)
def test_parameters_of_the_experts(tmp_path, config, limit, alpha, beta, bias):
    experts = read(tmp_path, config).experts
    found = (experts.activation_limit, experts.activation_alpha, experts.activation_beta)
    assert (*found, experts.bias) == (limit, alpha, beta, bias)


# -- what the config states, kept -----------------------------------------------------------------


def test_names_and_raw_keys_are_kept(tmp_path):
    outer = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "model_type": "kimi_k25",
        "torch_dtype": "bfloat16",
    }
    spec = read(tmp_path, {**outer, "text_config": {**R1, "num_hidden_layers": 61}})
    assert spec.architectures == ("KimiK25ForConditionalGeneration", "DeepseekV3ForCausalLM")
    assert spec.model_types == ("kimi_k25", "deepseek_v3")
    assert spec.raw_config["scoring_func"] == "sigmoid"
    assert spec.raw_config["norm_topk_prob"] is True
    assert spec.raw_config["first_k_dense_replace"] == 3
    assert "torch_dtype" not in spec.raw_config
    assert "num_hidden_layers" not in spec.raw_config
    assert spec.num_layers == 61


def test_an_imported_model_is_written_and_read_back(tmp_path):
    spec = read(tmp_path, {**STEP, "torch_dtype": "float16", "moe_odd": {"a": [1e-20, None]}})
    again = load(tmp_path, dump_model(spec), "some-model")
    assert again == spec
    assert again.raw_config["moe_odd"] == {"a": [1e-20, None]}
    assert again.dtype == "float16"


@pytest.mark.parametrize("key", ["torch_dtype", "dtype"])
def test_the_dtype_of_the_activations(tmp_path, key):
    config = {k: v for k, v in R1.items() if k != "torch_dtype"}
    assert read(tmp_path, config).dtype == "bfloat16"
    assert read(tmp_path, {**config, key: "torch.float16"}).dtype == "float16"
    with pytest.raises(ModelError, match=rf'{key}: found "float8", expected one of float32'):
        read(tmp_path, {**config, key: "float8"})


# -- the packaged models --------------------------------------------------------------------------


def test_packaged_models_with_clamps():
    """By hand from the published configs and, where none was seen, the classes' defaults."""
    zoo = load_models(packaged_directory())
    clamped = {m.id: m.experts.activation_limit for m in zoo.values() if m.experts.activation_limit}
    assert clamped == {
        "deepseek-v4-flash": 10.0,
        "deepseek-v4-flash-nvfp4": 10.0,
        "deepseek-v4-pro": 10.0,
        "glm-5.3-flash": 10.0,
        "gpt-oss-120b": 7.0,
        "gpt-oss-20b": 7.0,
        "hy4-preview": 10.0,
        "minimax-m3": 7.0,
    }
    for step in ("step-3.5-flash", "step-3.7-flash"):
        assert zoo[step].variants()["43-44"].experts.activation_limit == 7.0
        assert zoo[step].experts.activation == "silu"
    assert [m.id for m in zoo.values() if m.experts.bias] == ["gpt-oss-120b", "gpt-oss-20b"]
    hashed = [m.id for m in zoo.values() if any(g.kind == "hash_moe" for g in m.layers)]
    assert hashed == ["deepseek-v4-flash", "deepseek-v4-flash-nvfp4", "deepseek-v4-pro"]


def test_many_layers_are_counted_and_not_listed():
    group = LayerGroup(layers="0, 2, 4, 6, 8, 10, 12, 14-15, 17-19, 21", kind="dense")
    assert str(group) == "layers 0, 2, 4, 6, 8, 10, 12, 14-15 and 4 others are dense"
