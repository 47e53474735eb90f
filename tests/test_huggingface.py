"""read_config: what it understands, what it refuses, and that no config makes it hang or crash."""

from __future__ import annotations

import json
import os
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytest_moe_routing.backends import BACKENDS, FlashInfer
from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.models import dump_model, load_model, read_config
from pytest_moe_routing.models.huggingface.families import table
from pytest_moe_routing.models.spec import ExpertsConfig, RouterConfig, schema
from pytest_moe_routing.targets import judge
from pytest_moe_routing.targets.builtin import BuiltinTarget

#: As the published config of DeepSeek-R1 has it.
R1 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "n_routed_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_shared_experts": 1,
    "torch_dtype": "bfloat16",
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
}


def without(*keys):
    return {key: value for key, value in R1.items() if key not in keys}


def read(tmp_path, config, name="Some-Model", beside=None):
    folder = tmp_path / name
    folder.mkdir(exist_ok=True)
    text = config if isinstance(config, (str, bytes)) else json.dumps(config)
    (folder / "config.json").write_bytes(text.encode() if isinstance(text, str) else text)
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": beside}))
    return read_config(folder)


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
        ("...", None, "model", "local/..."),
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
    with pytest.raises(ModelError, match="moe_topk: found values that differ between layers"):
        read(tmp_path, {**config, "num_experts": 64, "moe_topk": [8, 4]})


def test_a_key_that_the_code_ignores_is_noted(tmp_path):
    """dots.llm1 names a method where others name a function; transformers reads neither."""
    spec = read(tmp_path, {**R1, "scoring_func": "noaux_tc"})
    assert spec.router.scoring_func == "sigmoid"
    assert (
        'scoring_func is "noaux_tc", which the architecture\'s code ignores: sigmoid' in spec.notes
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
        ({"swiglu_limits": [0, 0, 7.0, 7.0]}, "layers 2-3 are swiglustep"),
    ],
)
def test_layers_that_differ_are_noted(tmp_path, change, note):
    assert any(n.startswith(note) for n in read(tmp_path, {**R1, **change}).notes)


def test_the_text_experts_of_ernie_vl_come_first(tmp_path):
    config = {"architectures": ["Ernie4_5_VLMoeForConditionalGeneration"]}
    spec = read(tmp_path, {**config, "moe_num_experts": [64, 64]})
    assert (spec.router.num_experts, spec.experts.intermediate_size) == (64, 1536)
    assert any("taken is the first" in note for note in spec.notes)


# -- quantization ---------------------------------------------------------------------------------


def groups(**weights):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8}}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


def mixed(**layers):
    algorithms = {name.replace("_", "."): {"quant_algo": algo} for name, algo in layers.items()}
    return {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": algorithms,
    }


QUANTIZATIONS = [
    (None, "bf16"),
    ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8_block"),
    ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8_per_tensor"),
    ({"quant_method": "fbgemm_fp8"}, "fp8_per_channel"),
    ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp.router"]}, "mxfp4"),
    ({"quant_method": "mxfp8"}, "mxfp8"),
    ({"quant_method": "modelopt", "quant_algo": "FP8"}, "fp8_per_tensor"),
    ({"quant_method": "modelopt", "quant_algo": "fp8_pb_wo"}, "fp8_block"),
    ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4"),
    ({"quant_method": "modelopt", "quant_algo": "W4A16_NVFP4"}, "w4a16_nvfp4"),
    ({"quant_method": "modelopt", "quantization": {"quant_algo": "FP8"}}, "fp8_per_tensor"),
    ({"quant_method": "modelopt_mxfp8", "quant_algo": "MXFP8"}, "mxfp8"),
    (
        mixed(layers_0_mlp_experts="NVFP4", layers_0_attn="MXFP8", layers_0_shared_experts="FP8"),
        "nvfp4",
    ),
    (groups(type="float", num_bits=8, strategy="block"), "fp8_block"),
    (groups(type="float", num_bits=8, strategy="tensor"), "fp8_per_tensor"),
    (groups(type="float", num_bits=8, strategy="channel"), "fp8_per_channel"),
    (groups(type="float", num_bits=4, strategy="tensor_group", group_size=16), "nvfp4"),
    (groups(type="float", num_bits=4, group_size=16), "nvfp4"),
    (groups(type="float", num_bits=4, strategy="group", group_size=32), "mxfp4"),
    (groups(type="int", num_bits=4, strategy="group", group_size=32), "mxint4"),
    (groups(type="int", num_bits=4, strategy="group", group_size=128), "int4"),
    (
        {**groups(type="float", num_bits=8, strategy="block"), "ignore": ["re:.*mlp.experts.*"]},
        "bf16",
    ),
    (
        {**groups(type="float", num_bits=8, strategy="block"), "ignore": ["re:.*shared_experts.*"]},
        "fp8_block",
    ),
    ({"quant_method": "awq", "bits": 4}, "int4"),
    ({"quant_method": "gptq", "bits": 8}, "int8"),
]


@pytest.mark.parametrize(("quantization", "scheme"), QUANTIZATIONS)
def test_quantization(tmp_path, quantization, scheme):
    spec = read(tmp_path, {**R1, "quantization_config": quantization})
    assert spec.checkpoints == (scheme,)


def test_weights_alone_in_nvfp4(tmp_path):
    config = groups(type="float", num_bits=4, strategy="tensor_group", group_size=16)
    config["config_groups"]["group_0"]["input_activations"] = None
    assert read(tmp_path, {**R1, "quantization_config": config}).checkpoints == ("w4a16_nvfp4",)


def test_the_group_of_the_experts_counts(tmp_path):
    config = groups(type="float", num_bits=8, strategy="block")
    config["config_groups"]["group_1"] = {
        "targets": ["re:.*mlp.experts.*"],
        "weights": {"type": "float", "num_bits": 4, "group_size": 16},
        "input_activations": {"num_bits": 4},
    }
    assert read(tmp_path, {**R1, "quantization_config": config}).checkpoints == ("nvfp4",)


def test_a_file_beside_the_config(tmp_path):
    beside = {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16}
    config = without("quantization_config")
    assert read(tmp_path, config, beside=beside).checkpoints == ("nvfp4",)
    assert read(tmp_path, R1, name="Other", beside=beside).checkpoints == ("fp8_block",)


def test_fp4_experts_of_an_fp8_model(tmp_path):
    assert read(tmp_path, {**R1, "expert_dtype": "fp4"}).checkpoints == ("mxfp4",)


# -- what cannot be described ---------------------------------------------------------------------


def test_not_expressible_is_a_fallback_everywhere(tmp_path):
    """The nearest recipe of LongCat is known, and no verdict may come of it."""
    config = {
        "architectures": ["LongcatFlashForCausalLM"],
        "quantization_config": R1["quantization_config"],
    }
    spec = read(tmp_path, config)
    assert "zero experts" in spec.router.not_expressible
    for backend in BACKENDS:
        judgement = judge(BuiltinTarget(FlashInfer.of()), spec, backend)
        assert (judgement.verdict, judgement.exact) == ("fallback", ())
        assert "zero experts" in "\n".join(judgement.lines())


ERRORS = {
    "unknown": (
        {"architectures": ["LlamaForCausalLM"]},
        "architectures: found LlamaForCausalLM, expected one of the",
    ),
    "nameless": ({"hidden_size": 8}, "architectures: found nothing"),
    "names that are no names": ({"architectures": [7, None]}, "architectures: found nothing"),
    "architectures that are no list": (
        {"architectures": "X"},
        'architectures: found "X", expected a list',
    ),
    "capacity": ({"architectures": ["SwitchTransformersForConditionalGeneration"]}, "drop tokens"),
    "Grok-2": ({"architectures": ["Grok1ForCausalLM"]}, "soft-caps"),
    "missing": (
        {**without("n_routed_experts"), "architectures": ["NemotronHForCausalLM"]},
        "n_routed_experts: found nothing: the key is missing, expected an integer >= 1",
    ),
    "missing size": (
        {
            "architectures": ["BailingMoeForCausalLM"],
            "num_experts": 64,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "moe_intermediate_size": 8,
        },
        "hidden_size: found nothing",
    ),
    "null": (
        {**R1, "n_routed_experts": None},
        "n_routed_experts: found null, expected an integer >= 1",
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
        "n_routed_experts: found 2147483647, expected an integer >= 1 <= 65536",
    ),
    "absurd": ({**R1, "hidden_size": 10**4000}, "hidden_size: found Infinity"),
    "infinite": (
        {**R1, "routed_scaling_factor": float("inf")},
        "routed_scaling_factor: found Infinity, expected a number > 0",
    ),
    "not a number": (
        {**R1, "routed_scaling_factor": float("nan")},
        "routed_scaling_factor: found NaN, expected a number > 0",
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
    "unknown quantization": (
        {**R1, "quantization_config": {"quant_method": "zip"}},
        'quantization_config.quant_method: found "zip", expected one of auto-round',
    ),
    "method that is no text": (
        {**R1, "quantization_config": {"quant_method": {}}},
        "quantization_config.quant_method: found an object, expected text",
    ),
    "odd blocks": (
        {**R1, "quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
        "weight_block_size: found [64, 64], expected [128, 128] or null",
    ),
    "odd bits": (
        {**R1, "quantization_config": {"quant_method": "awq", "bits": 3}},
        "bits: found 3, expected 4 or 8",
    ),
    "two algorithms": (
        {**R1, "quantization_config": mixed(a_experts_0="FP8", a_experts_1="NVFP4")},
        "quantized_layers: found FP8, NVFP4, expected one quant_algo",
    ),
    "mixed without experts": (
        {**R1, "quantization_config": mixed(attn="FP8")},
        "quantized_layers: found no experts",
    ),
    "unknown algorithm": (
        {**R1, "quantization_config": {"quant_algo": ["FP8"]}},
        "quant_algo: found a list, expected one of FP8",
    ),
    "unknown weights": (
        {**R1, "quantization_config": groups(type="float", num_bits=6)},
        'weights.strategy: found "float" of 6 bits by "tensor"',
    ),
    "weights of lists": (
        {**R1, "quantization_config": groups(type=[], num_bits={})},
        "weights.strategy: found a list of an object bits",
    ),
    "no groups": (
        {**R1, "quantization_config": {"quant_method": "compressed-tensors"}},
        "config_groups: found nothing",
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
    "key twice": (b'{"hidden_size": 8, "hidden_size": 9}', "hidden_size: found the key again"),
    "key twice, deep": (
        b'{"text_config": {"n_group": 8, "n_group": 8}}',
        "n_group: found the key again",
    ),
    "many keys": (
        b"{" + b", ".join(b'"%d": 0' % i for i in range(100_000)) + b"}",
        "found nothing",
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
    with pytest.raises(ModelError, match="found no such file"):
        read_config(tmp_path)
    os.mkfifo(tmp_path / "config.json")  # would block for ever
    with pytest.raises(ModelError, match="found no such file"):
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
            if name == "refuse":
                continue
            if name in family.first and isinstance(value, list):
                value = value[0]
            if name == "activation":
                value = table().activations[value]
            assert kinds[name].metadata["kind"].problem(value) is None, (name, value)


def test_no_name_means_two_families():
    families = table().families.values()
    all_names = [n for f in families for n in {f.name, *f.model_types, *f.architectures}]
    assert len(all_names) == len(set(all_names)) == len(table().by_name)
    assert not table().by_name.keys() & table().refused.keys()
