"""Published-like configs, damaged: never a verdict that rests on a guess.

A damage may leave the meaning as it was (then router and experts are those of the whole config), or
be visible: an error, an open question, a scheme that is not known, a router that is not expressible,
a default that is marked, or another meaning that the config itself states.
"""

from __future__ import annotations

import json

from configs import R1, read
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.oracle.judge import open_questions

KIMI = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "num_hidden_layers": 61,
    "first_k_dense_replace": 1,
}
QWEN = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 4096,
    "moe_intermediate_size": 1536,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "hidden_act": "silu",
    "num_hidden_layers": 94,
}
MINIMAX = {
    "architectures": ["MiniMaxM2ForCausalLM"],
    "model_type": "minimax_m2",
    "hidden_size": 3072,
    "intermediate_size": 1536,
    "num_local_experts": 256,
    "num_experts_per_tok": 8,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "hidden_act": "silu",
    "num_hidden_layers": 62,
}
GPT_OSS = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "swiglu_limit": 7.0,
    "hidden_act": "silu",
    "num_hidden_layers": 36,
    "quantization_config": {"quant_method": "mxfp4"},
}
STEP = {
    "architectures": ["Step3p5ForCausalLM"],
    "model_type": "step3p5",
    "hidden_size": 4096,
    "moe_intermediate_size": 1280,
    "moe_num_experts": 288,
    "moe_top_k": 8,
    "moe_router_scaling_factor": 3.0,
    "use_moe_router_bias": True,
    "swiglu_limits": [0, 0, 0, 7.0],
    "hidden_act": "silu",
    "num_hidden_layers": 4,
}
CONFIGS = [R1, KIMI, QWEN, MINIMAX, GPT_OSS, STEP]
#: Keys that name the model, lay out its layers or state its checkpoint.
NAMES = ("architectures", "model_type")

configs = st.sampled_from(CONFIGS)
fuzz = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150
)


def attempt(tmp_path, config):
    try:
        return read(tmp_path, config)
    except ModelError as error:
        assert "\n" not in str(error)
        return None


def meaning(spec):
    return spec.router, spec.experts, spec.layers, spec.checkpoints


def is_open(spec):
    """Whether no verdict is given on the router."""
    return bool(open_questions(spec) or spec.router.not_expressible)


@fuzz
@given(config=configs, data=st.data())
def test_a_dropped_key_is_an_error_or_a_marked_default(tmp_path, config, data):
    key = data.draw(st.sampled_from([k for k in config if k not in NAMES]))
    spec = attempt(tmp_path, {k: v for k, v in config.items() if k != key})
    whole = read(tmp_path, config)
    if spec is None or is_open(spec):
        return
    changed = {
        name
        for name, value in {**vars(spec.router), **vars(spec.experts)}.items()
        if value != {**vars(whole.router), **vars(whole.experts)}[name]
    }
    if key not in ("quantization_config", "swiglu_limits", "num_hidden_layers", "n_group"):
        assert changed <= {*spec.defaulted}
    marked = set(spec.defaulted) - set(whole.defaulted)
    note = next((n for n in spec.notes if n.startswith("not in the config")), "")
    assert all(name in note for name in marked)


@fuzz
@given(config=configs, data=st.data())
def test_a_misspelt_key_is_never_a_silent_default(tmp_path, config, data):
    whole = read(tmp_path, config)
    key = data.draw(
        st.sampled_from([k for k in config if k in whole.raw_config and k not in NAMES])
    )
    at = data.draw(st.integers(1, len(key) - 1))
    letter = data.draw(st.sampled_from(["", "x", key[at] * 2]))
    misspelt = key[:at] + letter + key[at + 1 :]
    if misspelt in config:
        return
    spec = attempt(tmp_path, {misspelt if k == key else k: v for k, v in config.items()})
    if spec is None or meaning(spec) == meaning(whole):
        return
    assert is_open(spec) or any(misspelt[:40] in note for note in spec.notes), (
        misspelt,
        spec.notes,
    )
    if set(spec.defaulted) - set(whole.defaulted):
        assert spec.unproven, (misspelt, spec.notes)


@fuzz
@given(config=configs, data=st.data())
def test_a_contradiction_is_taken_or_open(tmp_path, config, data):
    """Another value under a key that is there: it counts, or the model is not judged."""
    whole = read(tmp_path, config)
    change = data.draw(
        st.sampled_from(
            [
                {"scoring_func": "softmax"},
                {"norm_topk_prob": False},
                {"n_group": 2, "topk_group": 1},
                {"topk_method": "greedy"},
                {"use_routing_bias": False},
                {"use_moe_router_bias": False},
                {"moe_router_logit_softcapping": 3.0},
                {"approximate_experts": {"0": [1]}},
                {"swiglu_limit": 3.0},
                {"num_hash_layers": 2},
                {"moe_apply_router_weight_on_input": True},
            ]
        )
    )
    spec = attempt(tmp_path, {**config, **change})
    if spec is None or is_open(spec):
        return
    if meaning(spec) != meaning(whole):
        return
    # The config already stated that, or it is what the family computes, or a note names the key.
    stated = all(config.get(key) == value for key, value in change.items())
    stated |= change == {"scoring_func": spec.router.scoring_func}
    stated |= change == {"topk_method": "greedy"} and spec.router.correction_bias is None
    assert stated or any(key in note for key in change for note in spec.notes)


@fuzz
@given(config=configs)
def test_nesting_changes_nothing_and_wrappers_must_be_known(tmp_path, config):
    whole = read(tmp_path, config)
    bare = read(tmp_path, {"text_config": config})
    assert meaning(bare) == meaning(whole)
    assert not open_questions(bare)
    wrapped = read(
        tmp_path, {"architectures": ["SomeVLForConditionalGeneration"], "text_config": config}
    )
    assert open_questions(wrapped)


@fuzz
@given(
    config=configs,
    name=st.from_regex(r"[A-Z][A-Za-z0-9]{2,12}For(CausalLM|Everything)", fullmatch=True),
)
def test_an_unknown_architecture_is_never_judged(tmp_path, config, name):
    spec = attempt(tmp_path, {**config, "architectures": [name]})
    assert spec is None or open_questions(spec)


@fuzz
@given(
    config=configs,
    quantization=st.recursive(
        st.none()
        | st.booleans()
        | st.integers(0, 32)
        | st.sampled_from(
            [
                "fp8",
                "modelopt",
                "compressed-tensors",
                "NVFP4",
                "FP8",
                "float",
                "group",
                "Linear",
                "re:.*experts.*",
                "MIXED_PRECISION",
                "auto-round",
                "mx_fp",
            ]
        ),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "quant_method",
                        "quant_algo",
                        "moe_quant_algo",
                        "config_groups",
                        "g",
                        "targets",
                        "weights",
                        "type",
                        "num_bits",
                        "strategy",
                        "group_size",
                        "ignore",
                        "bits",
                        "quantized_layers",
                        "model.layers.3.mlp.experts",
                        "data_type",
                        "input_activations",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=14,
    ),
)
def test_any_quantization_leaves_the_router_as_it_is(tmp_path, config, quantization):
    whole = read(tmp_path, config)
    spec = attempt(tmp_path, {**config, "quantization_config": quantization})
    if spec is not None:
        assert spec.router == whole.router
        assert bool(spec.checkpoints) != bool(spec.unknown_scheme)
        json.dumps(spec.as_dict())
