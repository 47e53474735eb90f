"""Changes gates of vLLM's own experts, one at a time, and prints what is found, as JSON.

`python tests/broken_gates.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack, contextmanager
from functools import wraps
from pathlib import Path
from unittest.mock import patch

from edited import edited
from in_process import in_process

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.changed_experts import changed_experts
from pytest_moe_routing.suite.taken_experts import of_other_class, of_wrong_gate
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.probe import splits
from pytest_moe_routing.targets.vllm.target import VllmTarget

MODELS = load_models(packaged_directory())
ASKED = ("gpt-oss-120b", "qwen3-30b-a3b", "nemotron-3-nano", "kimi-k3")
EXPERTS = "vllm.model_executor.layers.fused_moe.experts"
TRITON = f"{EXPERTS}.triton_moe", "TritonExperts"
WNA16 = f"{EXPERTS}.triton_moe", "TritonWNA16Experts"
MARLIN = f"{EXPERTS}.marlin_moe", "MarlinExperts"
GPT_OSS = f"{EXPERTS}.gpt_oss_triton_kernels_moe", "OAITritonMxfp4ExpertsMonolithic"
ORACLE = "vllm.model_executor.layers.fused_moe.oracle"
ADAPTERS = f"{EXPERTS}.trtllm_lora_moe", "TrtLlmBf16LoRAExperts"
BY_NAME = f"{EXPERTS}.trtllm_lora_moe", "TrtLlmMxfp4LoRAExperts"
METHODS, ACTIVATIONS = "_supports_routing_method", "_supports_activation"


@contextmanager
def gate(experts, name, changed):
    """Have a class's gate answer for a routing method, or an activation, as `changed` says."""
    module, cls = experts
    owner = getattr(stubs.real_module(module), cls)
    right = getattr(owner, name)

    @wraps(right)
    def wrong(*args, **kwargs):
        (asked, *_) = (*args, *kwargs.values())
        return changed[asked.name] if asked.name in changed else right(*args, **kwargs)

    with patch.object(owner, name, staticmethod(wrong)):
        yield


@contextmanager
def routing(experts, name, made):
    """Have a function of a class's module compute something else."""
    module = stubs.real_module(experts[0])
    with patch.object(module, name, made(getattr(module, name))):
        yield


def alone_only(experts):
    right = getattr(stubs.real_module(experts[0]), experts[1])._supports_parallel_config
    return wraps(right)(lambda moe_parallel_config: not moe_parallel_config.use_ep)


def no_adapters():
    right = getattr(stubs.real_module(ADAPTERS[0]), ADAPTERS[1]).supports_lora
    return staticmethod(wraps(right)(lambda: False))


def unnormalized(right):
    return lambda **given: right(**{**given, "renormalize": False})


def rows(multiple):
    """Have adapters need another multiple of a rank's rows for TRT-LLM's kernel."""
    name = "_trtllm_bf16_lora_supported"
    return lambda: edited(f"{ORACLE}.unquantized", name, "% 128 ==", f"% {multiple} ==")


def uncut():
    """Have nothing cut blocks of scales for 32 or 64 rows."""
    return edited(f"{ORACLE}.fp8", "refine_fp8_moe_block_shape", "refine < 32", "refine < 128")


def deep_gemm_first():
    """Have the selector prefer a library that is not here, and that a build for CUDA contains."""
    module = stubs.real_module(f"{ORACLE}.mxfp8")
    right = module._SUPPORTED_BACKENDS
    return patch.object(
        module, "_SUPPORTED_BACKENDS", sorted(right, key=lambda backend: backend.name != "DEEPGEMM")
    )


#: What is changed, and the scheme that is asked about.
CHANGES = {
    "another library first": (deep_gemm_first, "mxfp8"),
    "as it is": (ExitStack, "mxfp4"),
    "as it is in FP8": (ExitStack, "fp8_block"),
    "a method less": (lambda: gate(GPT_OSS, METHODS, {"RenormalizeNaive": False}), "mxfp4"),
    "the other method less": (lambda: gate(GPT_OSS, METHODS, {"Renormalize": False}), "mxfp4"),
    "softmax in bfloat16": (lambda: gate(GPT_OSS, METHODS, {"Default": True}), "mxfp4"),
    "a method more": (lambda: gate(GPT_OSS, METHODS, {"DeepSeekV3": True}), "mxfp4"),
    "a method of no recipe": (lambda: gate(GPT_OSS, METHODS, {"Custom": True}), "mxfp4"),
    "other weights": (lambda: routing(GPT_OSS, "triton_kernel_moe_forward", unnormalized), "mxfp4"),
    "no call": (
        lambda: routing(GPT_OSS, "triton_kernel_moe_forward", lambda _: lambda **_: None),
        "mxfp4",
    ),
    "an activation less": (lambda: gate(TRITON, ACTIVATIONS, {"SILU": False}), "fp8_block"),
    "an activation of Marlin less": (
        lambda: gate(MARLIN, ACTIVATIONS, {"RELU2_NO_MUL": False}),
        "nvfp4",
    ),
    "one GPU alone": (
        lambda: patch.object(
            getattr(stubs.real_module(TRITON[0]), TRITON[1]),
            "_supports_parallel_config",
            staticmethod(alone_only(TRITON)),
        ),
        "bf16",
    ),
    "adapters for 64 rows": (rows(64), "bf16"),
    "adapters for 256 rows": (rows(256), "bf16"),
    "no adapters": (
        lambda: patch.object(
            getattr(stubs.real_module(ADAPTERS[0]), ADAPTERS[1]), "supports_lora", no_adapters()
        ),
        "bf16",
    ),
    "adapters by name, an activation less": (
        lambda: gate(BY_NAME, ACTIVATIONS, {"SILU": False}),
        "mxfp4",
    ),
    "blocks of 64 rows are whole": (uncut, "fp8_block"),
    "no field for adapters": (lambda: patch.object(splits, "_ADAPTERS", "is_gone"), "bf16"),
    "an activation more": (lambda: gate(WNA16, ACTIVATIONS, {"SITU": True}), "mxint4"),
}


def has(module, name):
    """Whether the release has a class."""
    return hasattr(stubs.real_module(module), name)


def found_in(target, scheme):
    found = changed_experts(target, scheme, [MODELS[name] for name in ASKED])
    told = [of_other_class(target, scheme, each) for each in found.changed]
    told += [of_wrong_gate(target, scheme, each) for each in found.gates]
    failures = [[failure.cause, failure.rank.name, *failure.lines] for failure in told]
    return {"failures": failures, "answered": found.answered, "open": dict(found.unanswered)}


def main(root, flashinfer, version):
    target, _ = in_process(VllmTarget, child, root, flashinfer, version)
    found = {}
    for name, (change, scheme) in CHANGES.items():
        if name.startswith("adapters by name") and not has(*BY_NAME):
            continue
        with change():
            found[name] = found_in(target, scheme)
    # A release that is newer than all known ones.
    target.source = Source(Path(root), "99.0.0", flashinfer)
    for name in (
        *("an activation less", "an activation more"),
        *("adapters for 64 rows", "adapters for 256 rows", "blocks of 64 rows are whole"),
    ):
        change, scheme = CHANGES[name]
        with change():
            found[f"{name}, newer"] = found_in(target, scheme)
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
