"""What read_config refuses, and that no config makes it hang or crash."""

from __future__ import annotations

import json
import os
import time

import pytest
from configs import R1, read, without
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import dump_model, load_model, read_config
from pytest_moe_routing.models.huggingface.families import table
from pytest_moe_routing.models.spec import schema
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.report.text import story
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

# -- what cannot be described ---------------------------------------------------------------------


def test_not_expressible_is_a_fallback_everywhere(tmp_path):
    """The nearest recipe of LongCat is known, and no verdict may come of it."""
    config = {
        "architectures": ["LongcatFlashForCausalLM"],
        "quantization_config": R1["quantization_config"],
    }
    spec = read(tmp_path, config)
    assert "zero experts" in spec.router.not_expressible
    for scheme in SERVED_SCHEMES:
        judgement = judge(BuiltinTarget(FlashInfer.of()), spec, scheme)
        assert (judgement.verdict, judgement.exact) == ("fallback", ())
        assert "zero experts" in "\n".join(story(judgement.record()))


ERRORS = {
    "unknown": (
        {"architectures": ["LlamaForCausalLM"], "num_experts": 8},
        "architectures: found LlamaForCausalLM, expected an architecture of the",
    ),
    "nameless": ({"hidden_size": 8}, "architectures: found neither this key nor model_type"),
    "names that are no names": (
        {"architectures": [7, None]},
        "architectures: found neither this key nor model_type",
    ),
    "architectures that are no list": (
        {"architectures": "X"},
        'architectures: found "X", expected a list',
    ),
    "capacity": ({"architectures": ["SwitchTransformersForConditionalGeneration"]}, "drop tokens"),
    "Grok-2": ({"architectures": ["Grok1ForCausalLM"]}, "soft-caps"),
    "missing": (
        {**without("n_routed_experts"), "architectures": ["NemotronHForCausalLM"]},
        "n_routed_experts: found no key of this name, expected an integer >= 1",
    ),
    "unknown, with the next step": (
        {**R1, "architectures": ["ArcticForCausalLM"], "model_type": "arctic"},
        "families; to describe an unknown router, run `moe-routing init DIRECTORY` and edit",
    ),
    "unknown, with a typing error": (
        {**R1, "architectures": ["DeepseekV33ForCausalLM"], "model_type": "deepseek_v33"},
        "(did you mean DeepseekV3ForCausalLM or DeepseekV32ForCausalLM",
    ),
    "missing size": (
        {
            "architectures": ["BailingMoeForCausalLM"],
            "num_experts": 64,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "moe_intermediate_size": 8,
        },
        "hidden_size: found no key of this name",
    ),
    "null": (
        {**R1, "n_routed_experts": None},
        "n_routed_experts: found null, expected at least 1: the model has no experts",
    ),
    "text for a number": (
        {**R1, "num_experts_per_tok": "8"},
        'num_experts_per_tok: found "8", expected an integer',
    ),
    "float for a count": (
        {**R1, "num_experts_per_tok": 8.0},
        "num_experts_per_tok: found 8.0, expected an integer",
    ),
    "true for a count": (
        {**R1, "num_experts_per_tok": True},
        "num_experts_per_tok: found true, expected an integer",
    ),
    "number for a flag": (
        {**R1, "norm_topk_prob": 1},
        "norm_topk_prob: found 1, expected true or false",
    ),
    "object for a number": (
        {**R1, "hidden_size": {"a": 1}},
        "hidden_size: found an object, expected an integer",
    ),
    "empty list": ({**R1, "hidden_size": []}, "hidden_size: found a list, expected an integer"),
    "negative": (
        {**R1, "n_routed_experts": -256},
        "n_routed_experts: found -256, expected an integer >= 1",
    ),
    "zero": ({**R1, "hidden_size": 0}, "hidden_size: found 0, expected an integer >= 1"),
    "too many experts": (
        {**R1, "n_routed_experts": 2**31 - 1},
        "n_routed_experts: found 2147483647, expected an integer >= 1 and <= 65536",
    ),
    "absurd": ({**R1, "hidden_size": 10**4000}, "hidden_size: found Infinity"),
    "infinite": (
        {**R1, "routed_scaling_factor": float("inf")},
        "routed_scaling_factor: found Infinity, expected a number >= 1e-06 and <= 1e+06",
    ),
    "not a number": (
        {**R1, "routed_scaling_factor": float("nan")},
        "routed_scaling_factor: found NaN, expected a number",
    ),
    "not a number, as an unknown key": (
        {**R1, "rope_scaling": {"factors": [1.0, float("nan")]}},
        "rope_scaling.factors[1]: found NaN, expected a number",
    ),
    "subnormal": (
        {**R1, "routed_scaling_factor": 5e-324},
        "routed_scaling_factor: found 5e-324, expected a number >= 1e-06",
    ),
    "more than there are": (
        {**R1, "num_experts_per_tok": 300},
        "num_experts_per_tok: found 300, expected at most num_experts (256)",
    ),
    "groups that do not divide": (
        {**R1, "n_group": 7},
        "n_group: found 7, expected a divisor of num_experts (256)",
    ),
    "more groups than there are": (
        {**R1, "topk_group": 9},
        "topk_group: found 9, expected at most n_group (8)",
    ),
    "half a grouping": ({**R1, "topk_group": None}, "topk_group: found nothing, expected a value"),
    "two spellings that disagree": (
        {**R1, "num_local_experts": 128},
        "num_local_experts: found 128, expected 256 as n_routed_experts has it",
    ),
    "unknown activation": (
        {**R1, "hidden_act": "relu"},
        'hidden_act: found "relu", expected one of silu',
    ),
    "unknown method": (
        {**R1, "architectures": ["DeepseekV2ForCausalLM"], "topk_method": "noaux"},
        'topk_method: found "noaux", expected one of greedy, group_limited_greedy',
    ),
    "one for true": (
        {"architectures": ["Lfm2MoeForCausalLM"], "use_expert_bias": 1},
        "use_expert_bias: found 1, expected one of True, False",
    ),
    "no object": ({"text_config": [R1]}, "text_config: found a list, expected an object"),
    "nested key": (
        {"text_config": {**R1, "hidden_size": "x"}},
        'text_config.hidden_size: found "x"',
    ),
    "long value": ({**R1, "hidden_size": "x" * 10**6}, 'hidden_size: found "xxxxxxxx'),
    "quantization": (
        {**R1, "quantization_config": 8},
        "quantization_config: found 8, expected an object",
    ),
    "method that is no text": (
        {**R1, "quantization_config": {"quant_method": {}}},
        "quantization_config.quant_method: found an object, expected text",
    ),
}


@pytest.mark.parametrize("error", ERRORS)
def test_errors(tmp_path, error):
    config, expected = ERRORS[error]
    with pytest.raises(ModelError) as caught:
        read(tmp_path, config)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'Some-Model' / 'config.json'}: ")
    assert expected in message
    assert "\n" not in message
    assert len(message) < 1000


HOSTILE = {
    "empty": (b"", ":1: not valid JSON: Expecting value"),
    "not JSON": (b"model: R1\n", ":1: not valid JSON"),
    "cut off": (json.dumps(R1)[:-1].encode(), "not valid JSON"),
    "not UTF-8": (b'{"architectures": ["\xff"]}', "not UTF-8"),
    "UTF-16": (json.dumps(R1).encode("utf-16"), "not UTF-8"),
    "a list": (b"[]", "found a list, expected an object"),
    "null": (b"null", "found null, expected an object"),
    "nested arrays": (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
    "nested objects": (b'{"a": ' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "key twice": (b'{"hidden_size": 8, "hidden_size": 9}', "hidden_size: found the key twice"),
    "key twice, deep": (
        b'{"text_config": {"n_group": 8, "n_group": 8}}',
        "n_group: found the key twice",
    ),
    "many keys": (
        b"{" + b", ".join(b'"%d": 0' % i for i in range(100_000)) + b"}",
        "found neither this key",
    ),
    "many unknown keys": (
        json.dumps({**R1, **{f"k{i}": {"a": i} for i in range(200_000)}}).encode(),
        ": found a config with more than 10000 keys that are not read, expected the config of a",
    ),
    "many keys in an unknown object": (
        json.dumps({**R1, "foo": {f"num_expert_{i}": i for i in range(200_000)}}).encode(),
        ": foo.num_expert_9",
    ),
    "100 MB": (b'{"a": "' + b"x" * 100_000_000 + b'"}', "expected at most 16000000"),
}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_files(tmp_path, hostile):
    text, expected = HOSTILE[hostile]
    started = time.perf_counter()
    with pytest.raises(ModelError) as caught:
        read(tmp_path, text)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.perf_counter() - started < 5  # a generous bound of what takes milliseconds


def test_files_that_are_none(tmp_path):
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        read_config(tmp_path)
    os.mkfifo(tmp_path / "config.json")  # would block for ever
    with pytest.raises(ModelError, match="found a named pipe, expected a regular file"):
        read_config(tmp_path)


def test_a_hostile_file_beside_the_config(tmp_path):
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    (folder / "hf_quant_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"hf_quant_config.json:1: not valid JSON"):
        read(tmp_path, R1)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
read_keys = sorted(
    {key for keys in table().spellings.values() for key in keys}
    | {case.key for family in table().families.values() for case in family.cases}
    | {
        "architectures",
        "quantization_config",
        "text_config",
        "ffn_config",
        "expert_dtype",
        "swiglu_limits",
    }
    | {
        "mlp_layer_types",
        "moe_layer_freq",
        "first_k_dense_replace",
        "num_hash_layers",
        "_name_or_path",
    }
)
names = st.sampled_from(sorted(table().by_name))


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=400
)
@given(name=names, changes=st.dictionaries(st.sampled_from(read_keys), values, max_size=6))
def test_any_value_under_any_key_is_understood_or_one_error(tmp_path, name, changes):
    config = {"model_type": name, "num_experts": 8, "num_experts_per_tok": 2, **changes}
    try:
        spec = read(tmp_path, config)
    except ModelError as error:
        message = str(error)
    else:
        message = ""
        check(spec, tmp_path)
    assert "\n" not in message


def check(spec, tmp_path):
    for section in (spec.router, spec.experts):
        assert not list(section.problems())
        for key, item in schema(type(section)).items():
            assert item.metadata["kind"].problem(getattr(section, key)) is None
    written = tmp_path / spec.id / "model.yaml"
    written.parent.mkdir(exist_ok=True)
    written.write_text(dump_model(spec))
    assert load_model(written) == spec


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    text=st.binary(max_size=60)
    | st.text(max_size=60).map(str.encode)
    | values.map(json.dumps).map(str.encode)
)
def test_any_bytes_are_one_error(tmp_path, text):
    with pytest.raises(ModelError) as caught:
        read(tmp_path, text)
    assert "\n" not in str(caught.value)
