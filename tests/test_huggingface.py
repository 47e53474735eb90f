"""read_config: what it understands, and its table of families."""

from __future__ import annotations

import pytest
from configs import R1, read, without

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.models import load_model, read_config
from pytest_moe_routing.models.huggingface.families import table
from pytest_moe_routing.models.spec import ExpertsConfig, RouterConfig, schema


def test_deepseek_r1_is_what_its_golden_model_says(tmp_path):
    """The hand-written model and the imported one are the same, number for number."""
    from pytest_moe_routing.goldens import packaged_directory

    imported = read(tmp_path, R1)
    ours = load_model(packaged_directory() / "deepseek-r1")
    assert (imported.router, imported.experts) == (ours.router, ours.experts)
    assert imported.checkpoints == ("fp8_block",)
    assert imported.notes == ("layers 0-2 are dense",)
    assert (imported.id, imported.model) == ("some-model", "Some-Model")


def test_a_file_is_as_good_as_its_folder(tmp_path):
    assert read(tmp_path, R1) == read_config(tmp_path / "Some-Model" / "config.json")


@pytest.mark.parametrize(
    ("folder", "said", "id_", "repository"),
    [
        ("Some-Model", None, "some-model", "local/Some-Model"),
        ("Some-Model", "deepseek-ai/DeepSeek-R1", "deepseek-r1", "deepseek-ai/DeepSeek-R1"),
        ("Some-Model", "/home/me/checkpoint", "some-model", "local/Some-Model"),
        ("möe & co", None, "m-e-co", "local/möe-co"),
        ("...", None, "model", "local/model"),
    ],
)
def test_names(tmp_path, folder, said, id_, repository):
    spec = read(tmp_path, R1 if said is None else {**R1, "_name_or_path": said}, name=folder)
    assert (spec.id, spec.hf_repo) == (id_, repository)


def test_architectures_count_before_model_types(tmp_path):
    """Kimi-K2 has a model type of its own, and DeepSeek-V3's architecture."""
    assert read(tmp_path, {**R1, "model_type": "anything"}).router.top_k == 8
    ling = {"architectures": ["BailingMoeV2ForCausalLM"], "model_type": "bailing_moe"}
    assert read(tmp_path, {**without("architectures"), **ling}).router.correction_bias == "float32"


def test_the_inner_config_counts(tmp_path):
    outer = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25"}
    spec = read(tmp_path, {**outer, "hidden_size": 1, "text_config": R1})
    assert (spec.architecture, spec.experts.hidden_size) == (
        "KimiK25ForConditionalGeneration",
        7168,
    )


def test_the_class_that_stands_in_for_an_unknown_one_is_named(tmp_path):
    """With its wrappers, where the config has a text model's inside; nothing where all is known."""
    assert read(tmp_path, R1).read_as == ()
    unknown = {"architectures": ["NewForCausalLM"]}
    spec = read(tmp_path, {**R1, **unknown})
    assert spec.unknown_architectures == ("NewForCausalLM",)
    assert "DeepseekV3ForCausalLM" in spec.read_as
    assert "KimiK25ForConditionalGeneration" not in spec.read_as
    spec = read(tmp_path, {**unknown, "text_config": R1})
    assert spec.unknown_architectures == ("NewForCausalLM",)
    assert {"DeepseekV3ForCausalLM", "KimiK25ForConditionalGeneration"} <= {*spec.read_as}


# -- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"n_group": None, "topk_group": None}, {"n_group": None, "group_score": None}),
        ({"routed_scaling_factor": None}, {"routed_scaling_factor": 1.0}),
        ({"routed_scaling_factor": 1}, {"routed_scaling_factor": 1}),
        ({"norm_topk_prob": False}, {"renormalize": False, "renormalize_epsilon": 0.0}),
        ({"num_local_experts": 256}, {"num_experts": 256}),
    ],
)
def test_values(tmp_path, change, found):
    router = read(tmp_path, {**R1, **change}).router
    assert {name: getattr(router, name) for name in found} == found


def test_lists_of_equal_values(tmp_path):
    """HunYuan writes its numbers once per layer."""
    config = {"architectures": ["HunYuanMoEV1ForCausalLM"], "intermediate_size": 3072}
    spec = read(tmp_path, {**config, "num_experts": [64] * 32, "moe_topk": [8] * 32})
    assert (spec.router.num_experts, spec.router.top_k) == (64, 8)
    differ = {**config, "num_experts": 64, "moe_topk": [8, 4]}
    with pytest.raises(
        ModelError, match=r"moe_topk: found 2 values that differ.*num_hidden_layers"
    ):
        read(tmp_path, differ)
    with pytest.raises(ModelError, match="one for each layer: there are 3"):
        read(tmp_path, {**differ, "num_hidden_layers": 3})


def test_a_key_that_the_code_ignores_is_noted(tmp_path):
    """dots.llm1 names a method where others name a function; transformers reads neither."""
    spec = read(tmp_path, {**R1, "scoring_func": "noaux_tc"})
    assert spec.router.scoring_func == "sigmoid"
    assert (
        'scoring_func is "noaux_tc"; transformers ignores this and computes sigmoid, and another '
        "framework may read it" in spec.notes
    )
    assert not any("scoring_func" in note for note in read(tmp_path, R1).notes)


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"first_k_dense_replace": 1}, "layer 0 is dense"),
        ({"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}, "layers 0, 2 are dense"),
        ({"first_k_dense_replace": 0, "moe_layer_freq": [0, 0, 1, 1]}, "layers 0-1 are dense"),
        ({"num_hash_layers": 3}, "layers 0-2 are routed by a table of token ids"),
        ({"mlp_layer_types": ["hash_moe", "moe"]}, "layer 0 is routed by a table of token ids"),
        ({"interleave_moe_layer_step": 2}, "one layer in 2 is a mixture of experts"),
    ],
)
def test_layers_that_differ_are_noted(tmp_path, change, note):
    assert any(n.startswith(note) for n in read(tmp_path, {**R1, **change}).notes)


def test_the_text_experts_of_ernie_vl_come_first(tmp_path):
    config = {"architectures": ["Ernie4_5_VLMoeForConditionalGeneration"]}
    spec = read(tmp_path, {**config, "moe_num_experts": [64, 64]})
    assert (spec.router.num_experts, spec.experts.intermediate_size) == (64, 1536)
    assert any("the first value, the text model's, is used" in note for note in spec.notes)


# -- the table itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", table().families.values(), ids=lambda family: family.name)
def test_rows_have_values_that_can_be(family):
    """Every value that a row may give is valid, so an error is always the config's."""
    kinds = {**schema(RouterConfig), **schema(ExpertsConfig)}
    given = [family.fixed, family.defaults]
    for case in family.cases:
        given += [fixed for _, fixed in case.values]
        given += [case.otherwise] if case.otherwise else []
    for values_ in given:
        for name, value in values_.items():
            if name in ("refuse", "unproven", "disputed"):
                continue
            if name in family.first and isinstance(value, list):
                value = value[0]
            if name == "activation":
                value = table().activations[value]
            assert kinds[name].metadata["kind"].problem(value) is None, (name, value)


@pytest.mark.parametrize("family", table().families.values(), ids=lambda family: family.name)
def test_the_default_of_a_key_is_a_value_without_doubt(family):
    """A config without the key has the config class's value, which the family's code supports."""
    for case in family.cases:
        if case.default is not None:
            assert not {"unproven", "disputed"} & case.fixed(case.default).keys(), case


def test_no_name_means_two_families():
    families = table().families.values()
    all_names = [n for f in families for n in {f.name, *f.model_types, *f.architectures}]
    assert len(all_names) == len(set(all_names)) == len(table().by_name)
    assert not table().by_name.keys() & table().refused.keys()
