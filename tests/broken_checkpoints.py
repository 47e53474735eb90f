"""Has vLLM read quantization configs wrongly, and prints what is found, as JSON.

`python tests/broken_checkpoints.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack

from edited import edited
from in_process import in_process

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.served import served_otherwise
from pytest_moe_routing.suite.checkpoints import of_served
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.probe.experts import ELSEWHERE, SCHEMES
from pytest_moe_routing.targets.vllm.target import VllmTarget

QUANT = "vllm.model_executor.layers.quantization"
TENSORS = f"{QUANT}.compressed_tensors.compressed_tensors"
#: What is there instead of what, in a function of a module.
CHANGES = {
    "as it is": None,
    "an override lost": (
        f"{QUANT}.modelopt",
        "ModelOptMixedPrecisionConfig.override_quantization_method",
        'return "modelopt_mixed"',
        'return "modelopt_fp4"',
    ),
    "blocks not read": (
        f"{QUANT}.fp8",
        "Fp8Config.from_config",
        "weight_block_size=weight_block_size",
        "weight_block_size=None",
    ),
    "static scales taken for others": (
        f"{QUANT}.fp8",
        "Fp8MoEMethod.__init__",
        "weight_key = kFp8StaticTensorSym",
        "weight_key = kFp8Dynamic128Sym",
    ),
    "experts excluded": (
        f"{QUANT}.modelopt",
        "ModelOptQuantConfigBase.is_layer_excluded",
        r"return False\s*\Z",
        "return True",
    ),
    "patterns ignored": (
        f"{QUANT}.modelopt",
        "ModelOptQuantConfigBase.is_layer_excluded",
        r"fnmatch\(prefix, wildcard_pattern\)",
        "prefix == wildcard_pattern",
    ),
    "weights of groups of 128": (
        TENSORS,
        "CompressedTensorsConfig._is_nvfp4_format",
        "group_size == 16",
        "group_size == 128",
    ),
    "activations quantized in ModelOpt's checkpoints": (
        f"{QUANT}.modelopt",
        "ModelOptNvFp4Config._from_config",
        'quant_method = "W4A16_NVFP4"',
        "pass",
    ),
    "activations quantized in those of compressed-tensors": (
        f"{TENSORS}_moe.compressed_tensors_moe",
        "CompressedTensorsMoEMethod.get_moe_method",
        r"use_a16=\(input_quant is None\)",
        "use_a16=False",
    ),
    "experts of FP4 by default": (
        "vllm.models.deepseek_v41.quant_config",
        "DeepseekV4FP8Config.get_quant_method",
        'self.expert_dtype == "fp4"',
        "True",
    ),
}


def found(target, models):
    wrong, answered, unanswered = [], 0, 0
    for scheme in (*SCHEMES, *ELSEWHERE):
        about = served_otherwise(target, scheme, models)
        answered += about.answered
        unanswered += about.unanswered.total()
        wrong += [of_served(target, each) for each in about.wrong]
    failures = [[each.cause, *each.lines] for each in wrong]
    return {"failures": failures, "answered": answered, "unanswered": unanswered}


def main(root, flashinfer, version):
    target, _ = in_process(VllmTarget, child, root, flashinfer, version)
    models = [load_models(packaged_directory())["deepseek-r1"]]
    told = {}
    for name, change in CHANGES.items():
        with edited(*change) if change else ExitStack():
            told[name] = found(target, models)
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
