"""The architecture decides which family a config is read as; a guess is never judged."""

from __future__ import annotations

import pytest
from configs import R1, read, without

from pytest_moe_routing.errors import ModelError, Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.judge import as_read_by, judge, open_questions
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.targets import load_target

GROVE = {
    "architectures": ["GroveMoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
}


def test_an_unknown_architecture_is_not_judged(tmp_path):
    """The numbers are shown as the model_type's family has them, and no verdict rests on them."""
    spec = read(tmp_path, GROVE)
    assert (spec.router.scoring_func, spec.router.top_k) == ("softmax", 8)
    assert open_questions(spec) == [
        "GroveMoeForCausalLM is not known; the config is read as that of Qwen3MoeForCausalLM"
    ]
    target = load_target("builtin", FlashInfer.of(None))
    with pytest.raises(Unsupported, match="GroveMoeForCausalLM is not known"):
        judge(target, spec, "bf16")
    known = read(tmp_path, {**GROVE, "architectures": ["Qwen3MoeForCausalLM"]})
    assert judge(target, known, "bf16").verdict == "exact"


class Registered(Target):
    """A target that runs one unknown architecture by the code of a known one."""

    name = "registered"

    def __init__(self):
        super().__init__(FlashInfer.of(None))

    def runs_as(self, architecture, known):
        return (architecture, *known) == ("GroveMoeForCausalLM", "Qwen3MoeForCausalLM")


def test_a_target_that_runs_it_by_known_code_is_asked(tmp_path):
    grove = read(tmp_path, GROVE)
    other = read(tmp_path, {**GROVE, "architectures": ["OtherForCausalLM"]})
    assert open_questions(as_read_by(Registered(), grove)) == []
    assert open_questions(as_read_by(Registered(), other))


@pytest.mark.parametrize(
    "architecture",
    [
        "Qwen3MoeForSequenceClassification",
        "Qwen3MoeForTokenClassification",
        "Qwen3MoeForQuestionAnswering",
        "Qwen3MoeModel",
    ],
)
def test_another_head_has_the_same_experts(tmp_path, architecture):
    spec = read(tmp_path, {**GROVE, "architectures": [architecture]})
    assert open_questions(spec) == []
    assert spec.architecture == architecture
    # The head names the family by itself.
    alone = {**GROVE, "architectures": [architecture], "model_type": ""}
    assert not open_questions(read(tmp_path, alone))


@pytest.mark.parametrize(
    "architecture", ["Qwen3MoeEagle3", "MyQwen3MoeForCausalLM", "Qwen3MoEForCausalLM2", "qwen3moe"]
)
def test_a_similar_name_is_not_the_same(tmp_path, architecture):
    assert open_questions(read(tmp_path, {**GROVE, "architectures": [architecture]}))


def test_the_first_architecture_counts(tmp_path):
    known = "Qwen3MoeForCausalLM"
    assert open_questions(read(tmp_path, {**GROVE, "architectures": ["X", known]}))
    first = read(tmp_path, {**GROVE, "architectures": [known, "X"]})
    assert not open_questions(first)
    note = f"architectures lists {known}, X; the config is read as that of the first"
    assert note in first.notes
    again = read(tmp_path, {**GROVE, "architectures": [known, known]})
    assert not [note for note in again.notes if "architectures" in note]


def test_a_second_architecture_with_another_router_is_not_judged(tmp_path):
    """A release that does not know the first one would run the second."""
    for other in ("MixtralForCausalLM", "Grok1ForCausalLM"):
        config = {**GROVE, "architectures": ["Qwen3MoeForCausalLM", other]}
        assert open_questions(read(tmp_path, config)) == [
            f"architectures lists Qwen3MoeForCausalLM, {other}, which may have different routers"
        ]


def test_a_model_type_counts_where_there_is_no_architecture(tmp_path):
    assert not open_questions(read(tmp_path, {**GROVE, "architectures": None}))
    assert not open_questions(read(tmp_path, {**GROVE, "architectures": []}))


def test_an_architecture_overrules_the_model_type(tmp_path):
    config = {**GROVE, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "mixtral"}
    spec = read(tmp_path, config)
    assert spec.unproven == ()
    note = (
        "model_type is mixtral, that of another family; the config is read as that of its "
        "architecture, Qwen3MoeForCausalLM"
    )
    assert note in spec.notes


# -- nested configs -------------------------------------------------------------------------------


def nested(outer, inner=R1):
    return {**outer, "text_config": inner}


KIMI = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25"}


@pytest.mark.parametrize(
    ("config", "unproven"),
    [
        (nested(KIMI), None),
        (nested({"model_type": "kimi_k25"}, without("architectures")), None),
        (nested({}), None),
        (
            nested({"architectures": ["SomeForConditionalGeneration"]}),
            "SomeForConditionalGeneration is not known; the config is read as that of DeepseekV3",
        ),
        (
            nested({"model_type": "some_vl"}),
            "some_vl is not known to run its text model as deepseek_v3",
        ),
        (
            nested(KIMI, {**R1, "architectures": ["SomeForCausalLM"]}),
            "SomeForCausalLM is not known; the config is read as that of DeepseekV3ForCausalLM or",
        ),
        # A wrapper is one of the families that it is known to wrap, and of no other.
        (nested(KIMI, {**GROVE, "architectures": None}), "KimiK25ForConditionalGeneration is not"),
        (
            nested({"architectures": ["Qwen3VLMoeForConditionalGeneration"]}),
            "Qwen3VLMoeForConditionalGeneration has another router than its text model, deepseek",
        ),
        # The class of the whole model decides what its text model is.
        (
            nested(
                {"architectures": ["Qwen3VLMoeForConditionalGeneration"]},
                {**GROVE, "architectures": None, "model_type": "some_text"},
            ),
            None,
        ),
        (
            nested(
                {"model_type": "qwen3_vl_moe"},
                {**GROVE, "architectures": None, "model_type": "some_text"},
            ),
            "some_text is not known; the config is read as that of the text model of qwen3_vl_moe",
        ),
    ],
)
def test_outer_and_inner_names_follow_the_same_rule(tmp_path, config, unproven):
    found = open_questions(read(tmp_path, config))
    assert (found == []) if unproven is None else found[0].startswith(unproven)


# -- models without experts -----------------------------------------------------------------------

DENSE = {"hidden_size": 8, "intermediate_size": 32, "vocab_size": 100, "num_hidden_layers": 2}


@pytest.mark.parametrize(
    "config",
    [
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **DENSE},
        {"architectures": ["NemotronHForCausalLM"], "n_groups": 8, **DENSE},
        {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 0, **DENSE},
        {"architectures": ["GraniteMoeHybridForCausalLM"], "num_local_experts": 0, **DENSE},
        {"architectures": ["Gemma4ForCausalLM"], "enable_moe_block": False, **DENSE},
        {"architectures": ["Gemma4ForCausalLM"], "num_experts": None, **DENSE},
    ],
    ids=lambda config: config["architectures"][0],
)
def test_dense_models(tmp_path, config):
    is_known = config["architectures"] != ["LlamaForCausalLM"]
    message = "the model has no experts" if is_known else "found no key about experts"
    with pytest.raises(ModelError, match=message):
        read(tmp_path, config)
