"""Which scheme a config states for the routed experts, and when it states none that is known."""

from __future__ import annotations

import time

import pytest
from configs import R1, groups, mixed, read, without

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.models import dump_model, load_model, read_config

BLOCK = {"quant_method": "fp8", "weight_block_size": [128, 128]}
NVFP4 = {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16}
FP8 = {"type": "float", "num_bits": 8, "strategy": "block"}

SCHEMES = [
    (None, "bf16"),
    (BLOCK, "fp8_block"),
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
    # ModelOpt's weights alone (vllm 0.33.0 modelopt.py ModelOptNvFp4Config._from_config).
    (
        {"quant_algo": "NVFP4", "config_groups": {"group_0": {"input_activations": None}}},
        "w4a16_nvfp4",
    ),
    (
        mixed(layers_0_mlp_experts="NVFP4", layers_0_attn="MXFP8", layers_0_shared_experts="FP8"),
        "nvfp4",
    ),
    # The experts' algorithm is more specific than the method of the rest.
    ({**BLOCK, "quant_algo": "MIXED_PRECISION", "moe_quant_algo": "NVFP4"}, "nvfp4"),
    ({**BLOCK, **mixed(layers_0_ffn_experts="NVFP4"), "quant_method": "fp8"}, "nvfp4"),
    # Two places that differ in whether activations are quantized: the more specific one.
    (
        {
            **mixed(layers_0_mlp_experts="W4A16_NVFP4"),
            "config_groups": groups(["model.layers.0.mlp.experts"], **NVFP4)["config_groups"],
        },
        "w4a16_nvfp4",
    ),
    (groups(**FP8), "fp8_block"),
    (groups(type="float", num_bits=8, strategy="tensor"), "fp8_per_tensor"),
    (groups(type="float", num_bits=8, strategy="channel"), "fp8_per_channel"),
    (groups(**NVFP4), "nvfp4"),
    (groups(type="float", num_bits=4, group_size=16), "nvfp4"),
    (groups(inputs=None, **NVFP4), "w4a16_nvfp4"),
    (groups(type="float", num_bits=4, strategy="group", group_size=32), "mxfp4"),
    (groups(inputs=None, type="int", num_bits=4, strategy="group", group_size=32), "mxint4"),
    (
        groups(
            inputs=None, type="int", num_bits=4, strategy="group", group_size=32, symmetric=False
        ),
        "int4",
    ),
    (groups(inputs=None, type="int", num_bits=4, strategy="group", group_size=128), "int4"),
    (groups(["re:.*attn.*"], **FP8), "bf16"),
    (groups(["re:.*ffn.*(gate|up|down)_proj$"], **NVFP4), "nvfp4"),
    (groups([r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj"], **NVFP4), "nvfp4"),
    (groups(["re:^model.layers.(?!1).*mlp.*"], **NVFP4), "nvfp4"),
    ({"quant_method": "awq", "bits": 4}, "int4"),
    ({"quant_method": "gptq", "bits": 8}, "int8"),
    # auto-round (vllm 0.33.0 quantization/inc)
    ({"quant_method": "auto-round", "bits": 4, "group_size": 128}, "int4"),
    ({"quant_method": "auto-round", "data_type": "int", "bits": 8, "group_size": 128}, "int8"),
    ({"quant_method": "auto-round", "data_type": "mx_fp", "bits": 4, "group_size": 32}, "mxfp4"),
    (
        {
            "quant_method": "auto-round",
            "data_type": "mx_fp",
            "bits": 8,
            "group_size": 32,
            "act_bits": 8,
        },
        "mxfp8",
    ),
    (
        {
            "quant_method": "auto-round",
            "data_type": "nv_fp4",
            "bits": 4,
            "group_size": 16,
            "act_bits": 4,
        },
        "nvfp4",
    ),
    (
        {"quant_method": "auto-round", "data_type": "nv_fp", "bits": 4, "group_size": 16},
        "w4a16_nvfp4",
    ),
]

#: What an ignore list of an FP8 checkpoint leaves of it, in the first layer with experts.
IGNORED = [
    (["re:.*mlp.experts.*"], "bf16"),
    (["re:.*shared_experts.*"], "fp8_block"),
    ([r"re:.*mlp\.(gate|up|gate_up|down)_proj.*"], "fp8_block"),
    (["model.layers.3.mlp.experts"], "bf16"),
    (["model.layers.3"], "bf16"),
    (["model.layers.3*"], "bf16"),
    (["model.layers.30*"], "fp8_block"),
    (["*.mlp.experts.*"], "bf16"),
    (["*.mlp.shared_expert.*", "lm_head", "gate"], "fp8_block"),
    (["mlp.experts"], "bf16"),
    (["experts"], "bf16"),
    (["model.layers.3.mlp.gate", "model.layers.3.self_attn.q_proj"], "fp8_block"),
]

UNKNOWN = [
    ({"quant_method": "quark"}, "quark is not known"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes is not known"),
    ({"quant_method": "torchao"}, "torchao is not known"),
    ({"quant_method": "exl3", "bits": 4}, "exl3 is not known"),
    ({"load_in_4bit": True}, "no quant_method is not known"),
    ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "fp8 in blocks of [64, 64]"),
    ({"quant_method": "awq", "bits": 3}, "awq of 3 bits"),
    ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:x": {}}}, "gptq with dynamic rules"),
    ({"quant_algo": ["FP8"]}, "the quant_algo a list is not known"),
    ({"quant_algo": "NVFP3"}, "the quant_algo NVFP3 is not known"),
    (mixed(attn="FP8"), "quantized_layers names no experts"),
    (
        mixed(layers_0_experts_0="FP8", layers_0_experts_1="NVFP4"),
        "the experts of layer 0 are of several kinds: FP8 and NVFP4",
    ),
    (
        {**mixed(layers_0_mlp_experts="NVFP4"), "moe_quant_algo": "FP8"},
        "quantized_layers states nvfp4, and moe_quant_algo fp8_per_tensor",
    ),
    ({"quant_method": "compressed-tensors"}, "compressed-tensors without config_groups"),
    (groups(type="float", num_bits=6), 'weights "float" of 6 bits by "tensor"'),
    (groups(type=[], num_bits={}), "weights a list of an object bits"),
    (groups(inputs=None, **FP8), "with activations of null bits"),
    (groups(inputs={"num_bits": 8}, **NVFP4), "with activations of 8 bits"),
    (groups(block_structure=[64, 64], **FP8), "in other blocks than [128, 128]"),
    (groups(["re:.*down_proj"], **NVFP4), "cover the experts of layer 3, or parts"),
    (groups([r"re:.*experts\.0\..*"], **NVFP4), "cover the experts of layer 3, or parts"),
    (groups(["re:("], **NVFP4), "is not a regular expression"),
    (groups(["re:(a*)*b"], **NVFP4), "is too complicated"),
    (groups(["re:(.*)(.*)(.*)(.*)(.*)(.*)x"], **NVFP4), "is too complicated"),
    (groups(["re:(x).*\\1"], **NVFP4), "is too complicated"),
    (groups(["*a*b*c*d*e*experts*"], **NVFP4), "is too complicated"),
    (groups(["re:" + "x" * 600], **NVFP4), "is too long"),
    (
        {"quant_method": "auto-round", "data_type": "mx_fp", "bits": 3, "group_size": 32},
        "auto-round mx_fp of 3 bits",
    ),
    (
        {"quant_method": "auto-round", "bits": 4, "extra_config": {"a.experts.0": {"bits": 16}}},
        "auto-round with an extra_config",
    ),
]


@pytest.mark.parametrize(("quantization", "scheme"), SCHEMES)
def test_known_schemes(tmp_path, quantization, scheme):
    config = {**R1, "quantization_config": quantization, "first_k_dense_replace": 0}
    spec = read(tmp_path, config)
    assert (spec.checkpoints, spec.unknown_scheme) == ((scheme,), None)


@pytest.mark.parametrize(("ignored", "scheme"), IGNORED)
@pytest.mark.parametrize("key", ["ignore", "modules_to_not_convert", "exclude_modules"])
def test_ignore_lists(tmp_path, ignored, scheme, key):
    spec = read(tmp_path, {**R1, "quantization_config": {**BLOCK, key: ignored}})
    assert spec.checkpoints == (scheme,)


@pytest.mark.parametrize(("quantization", "expected"), UNKNOWN)
def test_a_scheme_that_is_not_known_does_not_hide_the_router(tmp_path, quantization, expected):
    spec = read(tmp_path, {**R1, "quantization_config": quantization})
    assert spec.checkpoints == ()
    assert expected in spec.unknown_scheme
    assert spec.router == read(tmp_path, R1).router
    assert load_model(_written(tmp_path, dump_model(spec))) == spec


def _written(tmp_path, text):
    path = tmp_path / "some-model" / "model.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_patterns_take_bounded_time(tmp_path):
    """Somebody else's regular expressions: five hundred that are slow where they do not match."""
    slow = [f"re:.*{c}.*{c}.*{c}.*{c}.*{c}X{i}" for i in range(100) for c in "elpro"]
    config = {**R1, "num_hidden_layers": 61, "quantization_config": {**BLOCK, "ignore": slow}}
    started = time.perf_counter()
    spec = read(tmp_path, config)
    assert time.perf_counter() - started < 20  # a generous bound: unbounded, it would take hours
    assert spec.unknown_scheme == "the patterns take too long"


# -- layers that differ ---------------------------------------------------------------------------


def layers(tmp_path, quantization):
    spec = read(tmp_path, {**R1, "num_hidden_layers": 6, "quantization_config": quantization})
    own = {g.layers: g.scheme for g in spec.layers if g.kind == "moe"}
    return spec.checkpoints, own


def test_algorithms_by_layer(tmp_path):
    """Layers 0 to 2 are dense."""
    algorithms = {f"model.layers.{i}.mlp.experts": {"quant_algo": "NVFP4"} for i in (3, 4)}
    algorithms["model.layers.5.mlp.experts.0.gate_proj"] = {"quant_algo": "FP8"}
    config = {**mixed(), "quantized_layers": algorithms}
    assert layers(tmp_path, config) == (("nvfp4",), {"5": "fp8_per_tensor"})


def test_layers_that_are_not_quantized(tmp_path):
    config = {**BLOCK, "modules_to_not_convert": ["model.layers.5.mlp.experts"]}
    assert layers(tmp_path, config) == (("fp8_block",), {"5": "bf16"})
    config = {**BLOCK, "modules_to_not_convert": ["model.layers.0*", "model.layers.1.*"]}
    assert layers(tmp_path, config) == (("fp8_block",), {})
    config = {**groups(**FP8), "ignore": [r"re:model\.layers\.[34]\..*"]}
    assert layers(tmp_path, config) == (("bf16",), {"5": "fp8_block"})


def test_a_group_of_layers_has_its_own_checkpoint(tmp_path):
    config = {**BLOCK, "modules_to_not_convert": ["model.layers.5.mlp.experts"]}
    spec = read(tmp_path, {**R1, "num_hidden_layers": 6, "quantization_config": config})
    variants = spec.variants()
    assert variants[""].checkpoints == ("fp8_block",)
    assert variants["5"].checkpoints == ("bf16",)
    assert str(spec.layers[1]) == "layer 5 is different: scheme bf16"


def test_parts_of_a_layer_are_not_known(tmp_path):
    config = {**BLOCK, "ignore": [r"re:.*experts\.0\..*"]}
    spec = read(tmp_path, {**R1, "quantization_config": config})
    assert spec.unknown_scheme == r"re:.*experts\.0\..* excludes some experts of layer 3"


# -- other places ---------------------------------------------------------------------------------


def test_the_group_of_the_experts_counts(tmp_path):
    config = groups(**FP8)
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


def test_a_file_beside_the_config_that_contradicts_it(tmp_path):
    beside = {"quant_algo": "NVFP4"}
    spec = read(tmp_path, R1, beside=beside)
    assert spec.checkpoints == ()
    assert spec.unknown_scheme == (
        "quantization_config states fp8_block, and hf_quant_config.json next to it states nvfp4"
    )
    agreeing = {**R1, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}
    assert read(tmp_path, agreeing, beside=beside).checkpoints == ("nvfp4",)


@pytest.mark.parametrize(
    ("name", "text", "scheme"),
    [
        ("quantize_config.json", '{"quant_method": "gptq", "bits": 4}', "int4"),
        ("quant_config.json", '{"w_bit": 4, "q_group_size": 128, "version": "GEMM"}', "int4"),
    ],
)
def test_files_of_other_tools(tmp_path, name, text, scheme):
    folder = tmp_path / "Some-Model"
    folder.mkdir()
    (folder / name).write_text(text)
    assert read(tmp_path, without("quantization_config")).checkpoints == (scheme,)


def test_other_keys(tmp_path):
    config = without("quantization_config")
    assert read(tmp_path, {**config, "compression_config": groups(**NVFP4)}).checkpoints == (
        "nvfp4",
    )
    mlx = read(tmp_path, {**config, "quantization": {"bits": 4}})
    assert mlx.unknown_scheme == "the mlx format (key quantization)"
    inner = {**config, "quantization_config": BLOCK}
    assert read(tmp_path, {"text_config": inner}).checkpoints == ("fp8_block",)


def test_fp4_experts_of_an_fp8_model(tmp_path):
    assert read(tmp_path, {**R1, "expert_dtype": "fp4"}).checkpoints == ("mxfp4",)
    unknown = read(tmp_path, {**R1, "expert_dtype": "fp5"}).unknown_scheme
    assert unknown == 'expert_dtype "fp5" is not known'


# -- the dtype, and another scheme by hand --------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_dtypes_that_no_kernel_takes(tmp_path, dtype):
    mixtral = {"model_type": "mixtral", "torch_dtype": dtype}
    spec = read(tmp_path, mixtral)
    assert spec.checkpoints == ()
    assert spec.unknown_scheme.startswith(f"unquantized, with dtype {dtype}: ")
    # The router's logits are of the model's dtype, where the code does not widen them.
    logits = {"float16": "float16", "float32": "bfloat16"}[dtype]
    assert spec.router.logits_dtype == logits
    assert read(tmp_path, {**R1, "torch_dtype": dtype}).router.logits_dtype == "float32"


def test_a_scheme_by_hand(tmp_path):
    quark = {**R1, "quantization_config": {"quant_method": "quark"}}
    read(tmp_path, quark)
    spec = read_config(tmp_path / "Some-Model", override="mxfp4")
    assert (spec.checkpoints, spec.unknown_scheme) == (("mxfp4",), None)
    with pytest.raises(ModelError, match=r"unknown scheme 'nvfp5'; did you mean nvfp4\?"):
        read_config(tmp_path / "Some-Model", override="nvfp5")


# -- compressed-tensors' own code as an oracle ----------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "re:.*mlp.experts.*",
        "re:.*shared_experts.*",
        r"re:.*mlp\.(gate|up|gate_up|down)_proj.*",
        "re:.*ffn.*(gate|up|down)_proj$",
        r"re:model\.layers\.[34]\..*",
        "re:experts",
        "re:.*gate$",
        r"re:.*\.experts\.\d+\.",
    ],
)
def test_patterns_match_as_compressed_tensors_matches(tmp_path, target):
    match = pytest.importorskip("compressed_tensors.utils.match")
    names = [
        f"model.layers.3.{block}.experts.{e}.{p}"
        for block in ("mlp", "ffn")
        for e in (0, 255)
        for p in ("gate_proj", "up_proj", "down_proj")
    ]
    by_block = {
        block: {match.match_name(name, target) for name in names if f".{block}." in name}
        for block in ("mlp", "ffn")
    }
    covered = {True} in by_block.values()
    spec = read(tmp_path, {**R1, "quantization_config": groups([target], **NVFP4)})
    assert spec.checkpoints == (("nvfp4",) if covered else ("bf16",))


@pytest.mark.parametrize(("ignore", "scheme"), [([r"re:.*mlp\.experts.*"], "bf16"), ([], None)])
def test_a_group_of_an_unknown_kind_is_no_matter_to_excluded_experts(tmp_path, ignore, scheme):
    """As compressed-tensors 0.20 writes its presets W3A16 and MXFP6A16, which have no name here."""
    weights = {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 128}
    quantization = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ignore,
    }
    spec = read(tmp_path, {**R1, "num_hidden_layers": 8, "quantization_config": quantization})
    assert spec.checkpoints == ((scheme,) if scheme else ())
