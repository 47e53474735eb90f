"""Mistakes in calls of vLLM's experts of other kernels than TRT-LLM's; run by `broken_steps.py`."""

from __future__ import annotations

import sys
from unittest.mock import patch

import torch

from pytest_moe_routing.oracle.other_experts import other_calls
from pytest_moe_routing.report.text import sentence
from pytest_moe_routing.targets.vllm.probe import release


def nothing(given):
    """Leave the call as it is."""


def swap(*names):
    """Give each argument the value of the next, and the last that of the first."""

    def change(given):
        values = [given[name] for name in names]
        given |= dict(zip(names, (*values[1:], values[0]), strict=True))

    return change


def put(name, make):
    return lambda given: given.update({name: make(given[name])})


def arrives(name, got, wanted):
    return f"{name} arrives as {got}, the layer has {wanted}"


IDS, WEIGHTS, SCALES = "token_selected_experts", "token_final_scales", "quant_scales"
REQUESTED = "--moe-backend flashinfer_cutlass"
ALONE = "Blackwell", REQUESTED
PARALLEL = "--enable-expert-parallel", "--tensor-parallel-size 4"
SPLIT = ("--tensor-parallel-size 2",)
GATHERED = "--enable-expert-parallel", "--data-parallel-size 2"
WEIGHT = "router weight is applied {}; the layer applies it once, on the expert output"
GPT_OSS = "Blackwell", "--moe-backend flashinfer_cutlass_afp8"
FIRST = ["fc1 quantization", "fc1 weights"]

#: By name: how the call is changed, the model, the scheme, and what is found: the way that needs
#: the least, and the sentences.
MISTAKES = {
    "nothing": (nothing, "deepseek-r1", "nvfp4"),
    "ranks swapped": (
        *(swap("tp_rank", "ep_rank"), "deepseek-r1", "nvfp4"),
        *("Blackwell", *SPLIT, REQUESTED, arrives("tp_rank", 0, 1), arrives("ep_rank", 1, 0)),
    ),
    "sizes swapped": (
        *(swap("tp_size", "ep_size"), "deepseek-r1", "fp8_per_tensor"),
        *("Hopper", *SPLIT, arrives("tp_size", 1, 2), arrives("ep_size", 2, 1)),
    ),
    "ranks that split experts lost": (
        *(lambda given: given.update(tp_size=1, tp_rank=0), "deepseek-r1", "nvfp4"),
        *("Blackwell", *SPLIT, REQUESTED, arrives("tp_size", 1, 2), arrives("tp_rank", 0, 1)),
    ),
    "another rank": (
        *(put("ep_rank", lambda _: 0), "deepseek-r1", "bf16"),
        *("Blackwell", *PARALLEL, REQUESTED, arrives("ep_rank", 0, 3)),
    ),
    "ids widened": (
        *(put(IDS, torch.Tensor.long), "deepseek-r1", "bf16"),
        *(*ALONE, arrives(IDS, "int64", "int32")),
    ),
    "ids of another order": (
        *(put(IDS, lambda ids: ids.flip(1).contiguous()), "deepseek-r1", "nvfp4"),
        *(*ALONE, arrives(IDS, "other values", "the layer's ids")),
    ),
    "weights lost": (
        *(put(WEIGHTS, torch.ones_like), "deepseek-r1", "bf16"),
        *(*ALONE, WEIGHT.format("nowhere")),
    ),
    "weights twice": (
        *(put(WEIGHTS, torch.square), "deepseek-r1", "fp8_block"),
        *("Hopper", *PARALLEL, WEIGHT.format("twice on the expert output")),
    ),
    "weights in bfloat16": (
        *(put(WEIGHTS, torch.Tensor.bfloat16), "deepseek-r1", "bf16"),
        *(*ALONE, arrives(WEIGHTS, "bfloat16", "float32")),
    ),
    "limit lost": (
        *(put("swiglu_limit", lambda _: None), "minimax-m3", "nvfp4"),
        *(*ALONE, arrives("swiglu_limit", "inf", 7)),
    ),
    "alpha lost": (
        *(put("swiglu_alpha", lambda _: None), "gpt-oss-20b", "mxfp4"),
        *(*GPT_OSS, arrives("swiglu_alpha", 1, 1.702)),
    ),
    "biases lost": (
        *(put("fc2_expert_biases", lambda _: None), "gpt-oss-20b", "mxfp4"),
        *(*GPT_OSS, arrives("fc2_expert_biases", "none", "its fc2 biases")),
    ),
    "biases swapped": (
        *(swap("fc1_expert_biases", "fc2_expert_biases"), "gpt-oss-20b", "mxfp4"),
        *GPT_OSS,
        arrives("fc1_expert_biases", "fc2 biases", "its fc1 biases"),
        arrives("fc2_expert_biases", "fc1 biases", "its fc2 biases"),
    ),
    "scales swapped": (
        *(put(SCALES, lambda s: [s[1], s[0], *s[2:]]), "deepseek-r1", "nvfp4"),
        *(*ALONE, arrives(SCALES, *FIRST[::-1])),
    ),
    "a scale lost": (
        *(put(SCALES, lambda scales: scales[1:]), "deepseek-r1", "fp8_block"),
        *("Hopper", *PARALLEL, arrives(SCALES, "1 scales", "2 scales")),
    ),
    "another activation": (
        *(put("activation_type", lambda _: 6), "deepseek-r1", "nvfp4"),
        *(*ALONE, arrives("activation_type", "Relu2", "Swiglu")),
    ),
    "quantized otherwise": (
        *(put("use_deepseek_fp8_block_scale", lambda _: False), "deepseek-r1", "fp8_block"),
        *("Hopper", *PARALLEL, arrives("use_deepseek_fp8_block_scale", "no", "yes")),
    ),
    "output of another width": (
        *(put("output_dtype", lambda _: torch.half), "deepseek-r1", "bf16"),
        *(*ALONE, arrives("output_dtype", "float16", "bfloat16")),
    ),
    "llama 4, as it should be": (
        *(put(WEIGHTS, torch.ones_like), "llama-4-scout", "fp8_per_tensor"),
    ),
    # As vLLM is: docs/findings.md.
    "gathered scales": (
        *(nothing, "deepseek-r1", "mxfp4"),
        *("Blackwell", *GATHERED, REQUESTED, arrives("input_sf", "16x24", "3072 scales in tiles")),
    ),
}


def other_kernels(target, models):
    """Yield what is found of each mistake."""
    experts = release.names().get("modular-flashinfer-cutlass")
    module = vars(sys.modules[experts.__module__])
    right = module["flashinfer_cutlass_fused_moe"]
    for name, (how, model, scheme, *_) in MISTAKES.items():

        def wrong(_how=how, **given):
            _how(given)
            return right(**given)

        with patch.dict(module, flashinfer_cutlass_fused_moe=wrong):
            found = other_calls(target, scheme, [models[model]]).wrong
        yield (
            name,
            [
                part
                for each in found
                for part in (
                    *(each.call.device, *each.call.switches),
                    *map(sentence, each.findings),
                )
            ],
        )


def elsewhere(target, models):
    """Yield which experts are taken for FP8 per channel, as vLLM is and if gates accept it."""

    def taken():
        found = other_calls(target, "fp8_per_channel", [models["deepseek-r1"]]).wrong
        return [
            [wrong.call.experts, wrong.call.device, *map(sentence, wrong.findings)]
            for wrong in found
        ]

    yield "as it is", taken()
    for key in ("modular-flashinfer-cutlass", "modular-fp8"):
        experts = release.names().get(key)
        accepts = staticmethod(lambda weight_key, activation_key: True)
        with patch.object(experts, "_supports_quant_scheme", accepts):
            yield key, taken()
