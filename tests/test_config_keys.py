"""Keys that a family does not read: they are named, and none of them changes a verdict unseen."""

from __future__ import annotations

import json

import pytest
from configs import R1, read, without
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing.errors import ModelError, Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import read_config
from pytest_moe_routing.models.huggingface.config_keys import in_checkpoint, key_rows, row_of
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.targets import load_target

GLM = {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "hidden_size": 2048,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 64,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 1,
    "topk_group": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.8,
    "hidden_act": "silu",
}


def reason(tmp_path, change, base=GLM):
    return read(tmp_path, {**base, **change}).router.not_expressible


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"router_logit_softcapping": 30.0}, "the router's logits are soft-capped"),
        ({"router_temperature": 0.5}, "the router's logits are divided by a temperature"),
        ({"num_experts_per_layer": [64, 32]}, "layers may have other numbers of experts"),
        ({"moe_apply_router_weight_on_input": True}, "weight multiplies the experts' input"),
        ({"expert_swiglu_limit_list": [0, 0, 4]}, "the experts clamp"),
        ({"swiglu_limit": 7.0}, "the experts clamp"),
        ({"approximate_experts": {"0": [3]}}, "pruned experts are replaced"),
        ({"per_expert_scale": True}, "each expert's weight is multiplied"),
        ({"zero_expert_num": 8}, "experts that compute nothing"),
        ({"num_hash_layers": 3}, "a table of token ids"),
        ({"router_bias": True}, "the router has a further bias"),
        ({"moe_bias": True}, "the experts' projections have a bias"),
        ({"capacity_factor": 1.25}, "experts have a capacity"),
    ],
)
def test_keys_that_change_the_meaning(tmp_path, change, expected):
    (key,) = change
    assert reason(tmp_path, {}) is None
    found = reason(tmp_path, change)
    assert expected in found
    assert f"({key})" in found
    # The key decides the verdict: no note may state that it is not read.
    assert not any("not read" in note for note in read(tmp_path, {**GLM, **change}).notes)


@pytest.mark.parametrize(
    "change",
    [
        {"router_logit_softcapping": 0.0},
        {"router_temperature": 1.0},
        {"router_logit_softcapping": None},
        {"moe_apply_router_weight_on_input": False},
        {"expert_swiglu_limit_list": [0, 0, 0]},
        {"approximate_experts": {}},
        {"zero_expert_num": 0, "topk_method": "noaux_tc"},
    ],
)
def test_neutral_values_change_nothing(tmp_path, change):
    spec = read(tmp_path, {**GLM, **change})
    assert spec.router.not_expressible is None
    assert spec.notes == read(tmp_path, GLM).notes


@pytest.mark.parametrize(
    ("key", "off", "on"),
    [
        ("router_logit_softcapping", (None, 0, 0.0, False), (1, 30.0, True)),
        ("zero_expert_num", (None, 0, False), (1, 8, True)),
        ("router_temperature", (None, 1, 1.0, True), (0, 0.5, False)),
        ("moe_apply_router_weight_on_input", (None, False, 0), (True, 1)),
    ],
)
def test_flags_are_numbers(tmp_path, key, off, on):
    """As in Python: `if softcap:` and `softcap > 0` are off with false, and x / true is x."""
    assert [reason(tmp_path, {key: value}) for value in off] == [None] * len(off)
    assert all(reason(tmp_path, {key: value}) for value in on)


def test_several_reasons_are_all_stated(tmp_path):
    found = reason(tmp_path, {"router_logit_softcapping": 30.0, "swiglu_limit": 7.0})
    assert found == (
        "the router's logits are soft-capped (router_logit_softcapping); "
        "the experts clamp their gate and linear halves (swiglu_limit)"
    )


def test_a_family_that_reads_a_key_is_not_in_doubt(tmp_path):
    gpt = {"model_type": "gpt_oss", "swiglu_limit": 7.0}
    assert read(tmp_path, gpt).router.not_expressible is None
    laguna = {"model_type": "laguna", "moe_apply_router_weight_on_input": True}
    assert read(tmp_path, laguna).router.not_expressible is None
    assert read(tmp_path, laguna).router.weight_on == "input"


@pytest.mark.parametrize(
    "key",
    [
        *("moe_odd", "router_kind", "use_expert_mixing", "route_odd", "topk_scheme", "swiglu_kind"),
        *("weight_scaling", "post_scale", "final_score_func", "act_clamp", "selection_kind"),
        *("gate_kind", "odd_gating", "normalize_weights", "odd_limit", "expert_softcap_kind"),
        *("glu_alpha", "act_beta", "activation_limit", "mlp_alpha", "silu_scale", "alpha"),
        *("gelu_clip", "activation_params", "hidden_act_alpha", "up_beta", "clip_value"),
    ],
)
def test_a_model_with_an_unread_key_about_routing_is_not_judged(tmp_path, key):
    spec = read(tmp_path, {**GLM, key: 2})
    assert spec.unproven == (f"about experts or routing, and not read: {key}",)
    assert not any(key in note for note in spec.notes)
    with pytest.raises(Unsupported, match=f"not read: {key}"):
        judge(load_target("builtin", FlashInfer.of(None)), spec, "bf16")
    assert not read(tmp_path, {**GLM, key: None}).unproven  # a null states nothing


@pytest.mark.parametrize("value", [1536, [1536] * 4])
def test_a_key_that_repeats_what_was_read_is_no_doubt(tmp_path, value):
    """HunYuan and MiniMax-M3 state the experts' size twice; their code reads intermediate_size."""
    config = {
        "architectures": ["HunYuanMoEV1ForCausalLM"],
        "hidden_size": 2048,
        "intermediate_size": 1536,
        "num_experts": 64,
        "moe_topk": 4,
        "hidden_act": "silu",
    }
    assert not read(tmp_path, {**config, "moe_intermediate_size": value}).unproven
    (doubt,) = read(tmp_path, {**config, "moe_intermediate_size": 768}).unproven
    assert doubt == "about experts or routing, and not read: moe_intermediate_size"


@pytest.mark.parametrize(
    ("architecture", "change", "doubt"),
    [
        # As zai-org/GLM-5.2 has it; vllm 0.33.0 computes the logits in this dtype.
        ("GlmMoeDsaForCausalLM", {"moe_router_dtype": "float32"}, ""),
        ("GlmMoeDsaForCausalLM", {"moe_router_dtype": "bfloat16"}, "moe_router_dtype is "),
        ("DeepseekV3ForCausalLM", {"moe_router_dtype": "float32"}, "not read: moe_router_dtype"),
        ("LagunaForCausalLM", {"gating": True}, ""),
        ("Ernie4_5_MoeForCausalLM", {"moe_norm_min": 1e-12}, ""),
        ("Ernie4_5_MoeForCausalLM", {"moe_norm_min": 0.1}, "moe_norm_min is 0.1: "),
    ],
)
def test_keys_of_published_configs_are_read(tmp_path, architecture, change, doubt):
    config = {**GLM, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    config = {**config, "architectures": [architecture], "model_type": "x", **change}
    found = read(tmp_path, config).unproven
    assert len(found) == bool(doubt)
    assert doubt in "".join(found)


def test_keys_that_are_not_known_are_named(tmp_path):
    assert "not known, and not read: frobnicate" in read(tmp_path, {**GLM, "frobnicate": 1}).notes


def test_long_lists_are_cut(tmp_path):
    config = {**GLM, "dtype": "bfloat16", **{f"moe_{i}": 1 for i in range(40)}}
    (doubt,) = read(tmp_path, config).unproven
    assert doubt.endswith("moe_10, moe_11 and 28 more")


def test_routing_keys_beside_the_text_config_are_named(tmp_path):
    same = GLM["num_experts_per_tok"]
    config = {"num_experts_per_tok": same, "hidden_size": 3, "text_config": GLM}
    notes = read(tmp_path, config).notes
    assert "outside the text model's config, and not read: num_experts_per_tok" in notes


@pytest.mark.parametrize("key", ["hidden_dropout", "rope_theta", "router_aux_loss_coef", "_x"])
def test_harmless_keys_are_not_named(tmp_path, key):
    assert read(tmp_path, {**GLM, key: 1}).notes == read(tmp_path, GLM).notes


# -- defaults -------------------------------------------------------------------------------------


def test_defaults_are_marked(tmp_path):
    config = {k: v for k, v in R1.items() if k not in ("n_group", "topk_group", "norm_topk_prob")}
    spec = read(tmp_path, config)
    assert spec.defaulted == ("renormalize", "n_group", "topk_group")
    expected = "not in the config, and defaults of the class: renormalize true, n_group 8, topk_gro"
    assert any(note.startswith(expected) for note in spec.notes)
    assert read(tmp_path, R1).defaulted == ()


@pytest.mark.parametrize(
    ("key", "misspelt"),
    [
        ("routed_scaling_factor", "routed_scaling_facto"),
        ("n_group", "n_groups"),
        ("topk_group", "topk_groups"),
        ("norm_topk_prob", "norm_topk_probs"),
        ("num_experts_per_tok", "num_expert_per_tok"),
    ],
)
def test_a_misspelt_key_is_doubted(tmp_path, key, misspelt):
    """A value under a key that nothing reads must not be replaced by a default unseen."""
    config = {misspelt if k == key else k: v for k, v in R1.items()}
    spec = read(tmp_path, config)
    (doubt,) = spec.unproven
    assert f"{misspelt} is not read (did you mean " in doubt
    (doubt,) = read(tmp_path, {**R1, misspelt: 1}).unproven  # the right key is there as well
    assert doubt == f"about experts or routing, and not read: {misspelt}"


def test_how_near_a_misspelt_key_is(tmp_path):
    """A name about routing, or of no meaning, may be farther than one about something else."""
    [doubt] = read(tmp_path, {**without("norm_topk_prob"), "norm_topk_p": True}).unproven
    assert doubt.startswith("norm_topk_p is not read (did you mean norm_topk_prob?), and renorm")
    config = without("hidden_act")
    [doubt] = read(tmp_path, {**config, "hidn_act": "gelu"}).unproven
    assert doubt.startswith("hidn_act is not read (did you mean hidden_act?), and activation is")
    assert not read(tmp_path, {**config, "hidden_act_fn": "gelu"}).unproven
    assert not read(tmp_path, {**R1, "hidn_act": "gelu"}).unproven  # the right key is there


@pytest.mark.parametrize(
    ("config", "doubt"),
    [
        ({**R1, "topk_method": "greedy"}, 'topk_method is "greedy": transformers has a bias with'),
        (
            without("topk_method"),
            "topk_method is not in the config: transformers has a bias anyway",
        ),
        ({**R1, "topk_method": None}, "topk_method is null: transformers has a bias anyway"),
        (without("scoring_func"), "scoring_func is not in the config: transformers computes a"),
    ],
)
def test_a_key_that_frameworks_read_differently_is_doubted(tmp_path, config, doubt):
    """transformers saves DeepSeek-V3 without these keys, which vLLM and SGLang read."""
    assert read(tmp_path, config).unproven[0].startswith(doubt)
    assert not read(tmp_path, R1).unproven
    glm = {**config, "architectures": ["Glm4MoeForCausalLM"]}
    assert not any("scoring_func" in doubt for doubt in read(tmp_path, glm).unproven)


#: What github ai-dynamo/aiconfigurator @821eb9a6 has of moonshotai/Kimi-K2-Thinking's config.
K2_THINKING = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
    "torch_dtype": "bfloat16",
}


def test_a_copy_that_lost_its_routing_keys_is_doubted(tmp_path):
    """Frameworks read such a copy differently, so that it is judged for none.

    vllm 0.33.0 (transformers_utils/config.py:141) and sglang 0.5.23 (utils/hf_transformers/common.py)
    read kimi_k2 with the config class of DeepSeek-V3, which has groups and neither of the two keys.
    """
    spec = read(tmp_path, K2_THINKING)
    assert {"n_group", "topk_group", "renormalize"} <= set(spec.defaulted)
    assert [doubt.partition(":")[0] for doubt in spec.unproven] == [
        "topk_method is not in the config",
        "scoring_func is not in the config",
    ]
    stated = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1}
    whole = read(tmp_path, {**K2_THINKING, **stated, "norm_topk_prob": True})
    assert (whole.unproven, whole.router.n_group, whole.router.routed_scaling_factor) == (
        (),
        1,
        2.827,
    )


# -- what the config states and the code of transformers does not read -------------------------------


@pytest.mark.parametrize(
    ("model_type", "change", "contradicted"),
    [
        ("deepseek_v2", {"norm_topk_prob": True}, {"renormalize": True}),
        ("deepseek_v3", {"scoring_func": "softmax"}, {"scoring_func": "softmax"}),
        ("minimax_m2", {"scoring_func": "softmax"}, {"scoring_func": "softmax"}),
        ("hy_v3", {"route_norm": False}, {"renormalize": False}),
        ("lfm2_moe", {"hidden_act": "gelu"}, {"activation": "gelu"}),
        # No contradictions: the same value, none, a method's name where a function is meant, and
        # what gpt-oss publishes.
        ("deepseek_v2", {"norm_topk_prob": False}, {}),
        ("deepseek_v2", {"norm_topk_prob": None}, {}),
        ("deepseek_v3", {"scoring_func": "noaux_tc"}, {}),
        ("gpt_oss", {"hidden_act": "silu"}, {}),
        ("minimax_m2", {"n_group": 1, "topk_group": 1}, {}),
    ],
)
def test_contradictions_are_kept(tmp_path, model_type, change, contradicted):
    base = {"model_type": model_type, "num_experts": 64, "num_experts_per_tok": 6}
    assert dict(read(tmp_path, {**base, **change}).contradicted) == contradicted


# -- the table itself -----------------------------------------------------------------------------


def test_harmless_patterns_are_precise():
    """A pattern that may hide a key about routing has no wildcard, but for named prefixes."""
    for row in key_rows():
        if row.list == "harmless":
            for alternative in row.pattern.pattern.split("|"):
                if ".*" in alternative:
                    prefix = alternative.partition(".*")[0].strip("(")
                    assert prefix.rstrip("_") in PREFIXES, alternative


PREFIXES = {
    "mtp",
    "nextn",
    "expert_quant",
    "index",
    "sparse_topk",
    "expert_parallel",
    "gate_low_rank",
    "moe",
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    word=st.sampled_from(["moe", "expert", "router", "routing", "topk", "n_group", "swiglu"]),
    head=st.text("abc_", max_size=4),
    tail=st.text("xyz_", max_size=4),
)
def test_no_key_about_routing_is_passed_over(word, head, tail):
    row = row_of(head + word + tail)
    assert row is not None
    assert row.list in ("changes", "routing")


@pytest.mark.parametrize("stated", [{}, {"torch_dtype": None}, {"dtype": "auto"}])
def test_a_dtype_that_the_config_does_not_state_is_marked(tmp_path, stated):
    note = "not in the config, and assumed: dtype bfloat16"
    assert note in read(tmp_path, {**GLM, **stated}).notes
    assert note not in read(tmp_path, {**GLM, "torch_dtype": "bfloat16"}).notes


@pytest.mark.parametrize(
    ("inner", "is_open"),
    [
        ({"num_experts_per_tok": 8, "norm_topk_prob": True}, False),
        ({"num_experts_per_tok": 4, "norm_topk_prob": True}, True),
        ({"num_experts_per_tok": 8}, True),
    ],
)
def test_keys_outside_the_text_model_may_not_contradict_it(tmp_path, inner, is_open):
    stated = {"num_experts_per_tok": 8, "norm_topk_prob": True}
    path = tmp_path / "config.json"
    config = {"architectures": ["Qwen3MoeForCausalLM"], **stated, "language_config": inner}
    path.write_text(json.dumps(config))
    model = read_config(path)
    assert any("stated otherwise outside" in reason for reason in model.unproven) is is_open


@pytest.mark.parametrize("value", [10**9, [0, 1, 2], -1])
def test_a_number_of_dense_layers_is_one(tmp_path, value):
    path = tmp_path / "config.json"
    config = {"architectures": ["DeepseekV3ForCausalLM"], "first_k_dense_replace": value}
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"first_k_dense_replace: found .* expected an integer"):
        read_config(path)


def test_keys_that_describe_the_checkpoints_weights():
    """Whatever else is in the config, and only with a value that changes something."""
    others = {"foo": 1, "moe_bias": True, "num_zero_experts": 2}
    assert in_checkpoint({**others, "mean_experts": {}}) == {}
    found = in_checkpoint({**others, "mean_experts": {"0": [1]}})
    assert found == {"mean_experts": "pruned experts are replaced by a constant"}


def test_a_key_is_one_line_whatever_its_name(tmp_path):
    spec = read(tmp_path, {**R1, "expert\n  router   softmax": 3})
    assert spec.unproven == ("about experts or routing, and not read: expert router softmax",)
