"""Edits what vLLM makes of its experts' scales, one thing at a time, and prints what is found, as JSON.

`python tests/broken_scales.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys

from edited import edited
from in_process import in_process

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.target import VllmTarget

LAYERS = "vllm.model_executor.layers"
FP8, MODELOPT = f"{LAYERS}.quantization.fp8", f"{LAYERS}.quantization.modelopt"
MXFP4, MOE = f"{LAYERS}.quantization.mxfp4", f"{LAYERS}.fused_moe"
WNA16 = (
    f"{LAYERS}.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_wna16"
)
CONFIG = "get_fused_moe_quant_config"
FP8_CONFIG, FP8_EXPERTS = f"Fp8MoEMethod.{CONFIG}", "TrtLlmFp8ExpertsMonolithic"
NVFP4_EXPERTS = "TrtLlmNvFp4ExpertsBase"
TENSOR = (MODELOPT, f"ModelOptFp8MoEMethod.{CONFIG}")
TRTLLM_FP8, TRTLLM_NVFP4 = f"{MOE}.experts.trtllm_fp8_moe", f"{MOE}.experts.trtllm_nvfp4_moe"
MAKE_NVFP4 = (f"{MOE}.oracle.nvfp4", "make_nvfp4_moe_quant_config")
LOADED = (TRTLLM_NVFP4, f"{NVFP4_EXPERTS}.process_weights_after_loading")
GPT_OSS = (MXFP4, f"GptOssMxfp4MoEMethod.{CONFIG}")
#: What is broken: the function, what is replaced in it and by what, the model and the scheme.
BROKEN = {
    "nothing per tensor": (*TENSOR, "self", "self", "qwen3-30b-a3b", "fp8_per_tensor"),
    "nothing nvfp4": (*MAKE_NVFP4, "w13", "w13", "minimax-m2", "nvfp4"),
    "nothing mxfp4": (*GPT_OSS, "self", "self", "gpt-oss-20b", "mxfp4"),
    "clamp lost": (
        *(FP8, FP8_CONFIG, r'swiglu_limit=getattr\(layer, "swiglu_limit", None\),', ""),
        *("glm-5.3-flash", "fp8_block"),
    ),
    "blocks swapped": (
        *(FP8, FP8_CONFIG, r"w1_scale=w1_scale,\s+w2_scale=w2_scale", "w1_scale=w2_scale, w2_scale=w1_scale"),
        *("qwen3-30b-a3b", "fp8_block"),
    ),
    "input scales swapped": (
        *(*TENSOR, r"a1_scale=a1_scale,\s+a2_scale=a2_scale", "a1_scale=a2_scale, a2_scale=a1_scale"),
        *("qwen3-30b-a3b", "fp8_per_tensor"),
    ),
    "scale inverted": (
        *(*TENSOR, "a2_scale = layer.w2_input_scale", "a2_scale = 1 / layer.w2_input_scale"),
        *("qwen3-30b-a3b", "fp8_per_tensor"),
    ),
    "outputs swapped": (
        *(TRTLLM_FP8, f"{FP8_EXPERTS}._apply_per_tensor"),
        *(r"scalar=self._g1_scale_c(,\s+output1_scales_gate_scalar)=self._g1_alphas",
          r"scalar=self._g1_alphas\1=self._g1_scale_c"),
        *("qwen3-30b-a3b", "fp8_per_tensor"),
    ),
    "second scale for the first": (
        *(*MAKE_NVFP4, r"(?s)(.*g1_alphas=)w13_scale_2", r"\1w2_scale_2"),
        *("minimax-m2", "nvfp4"),
    ),
    "input scale not inverted": (
        *(*MAKE_NVFP4, r"a2_gscale=\(1.0 / a2_scale\)", "a2_gscale=a2_scale"),
        *("minimax-m2", "nvfp4"),
    ),
    "first input scale not inverted": (
        *(*MAKE_NVFP4, r"a1_gscale=\(1.0 / a13_scale\)", "a1_gscale=a13_scale"),
        *("minimax-m2", "nvfp4"),
    ),
    "scaled twice": (
        *(*LOADED, r"(layer.w2_weight_scale_2.data.mul_\(layer.w2_input_scale\))", r"\1; \1"),
        *("minimax-m2", "nvfp4"),
    ),
    "clamp not divided": (
        *(*LOADED, r"clamp_limit / self.quant_config.g1_alphas", "clamp_limit * 1.0"),
        *("glm-5.3-flash", "nvfp4"),
    ),
    "bias lost": (*GPT_OSS, "w2_bias=w2_bias", "w2_bias=None", "gpt-oss-20b", "mxfp4"),
    "alpha changed": (*GPT_OSS, "1.702", "1.0", "gpt-oss-20b", "mxfp4"),
    "int4 scales swapped": (
        *(WNA16, f"CompressedTensorsWNA16MoEMethod.{CONFIG}"),
        *("w2_scale=layer.w2_weight_scale", "w2_scale=layer.w13_weight_scale"),
        *("qwen3-30b-a3b", "mxint4"),
    ),
    "config renamed": (*TENSOR, "layer.w13_input_scale", "self.input_scale", "qwen3-30b-a3b", "fp8_per_tensor"),
}  # fmt: skip
MAKE_FP8, MAKE_MXFP4 = (f"{MOE}.oracle.fp8", "make_fp8_moe_quant_config"), f"{MOE}.oracle.mxfp4"
BF16 = (f"{MOE}.unquantized_fused_moe_method", f"UnquantizedFusedMoEMethod.{CONFIG}")
W4A4 = f"{LAYERS}.quantization.compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w4a4_nvfp4"
#: The same of what experts of FlashInfer's CUTLASS kernels are given.
OTHERS = {
    "nothing others per tensor": (*MAKE_FP8, "w1", "w1", "qwen3-30b-a3b", "fp8_per_tensor"),
    "nothing others block": (*MAKE_FP8, "w1", "w1", "qwen1.5-moe-a2.7b", "fp8_block"),
    "nothing others nvfp4": (*MAKE_NVFP4, "w13", "w13", "qwen1.5-moe-a2.7b", "nvfp4"),
    "nothing others mxfp4": (*GPT_OSS, "self", "self", "gpt-oss-20b", "mxfp4"),
    "nothing others bf16": (*BF16, "self", "self", "minimax-m3", "bf16"),
    "quantization exchanged": (
        *(*MAKE_FP8, r"a1_gscale=\(1.0 / a1_scale\),(\s+)a2_gscale=\(1.0 / a2_scale\)"),
        *(r"a1_gscale=(1.0 / a2_scale),\1a2_gscale=(1.0 / a1_scale)", "qwen3-30b-a3b", "fp8_per_tensor"),
    ),
    "alphas of another input": (
        *(*MAKE_FP8, r"g1_alphas = w1_scale \* a1_scale", "g1_alphas = w1_scale * a2_scale"),
        *("qwen3-30b-a3b", "fp8_per_tensor"),
    ),
    "input of another product": (
        *(FP8, FP8_CONFIG, "a1_scale = layer.w13_input_scale", "a1_scale = layer.w2_input_scale"),
        *("qwen3-30b-a3b", "fp8_per_tensor"),
    ),
    "block scale lost": (
        *(FP8, FP8_CONFIG, "w2_scale=w2_scale", "w2_scale=None", "qwen3-30b-a3b", "fp8_block"),
    ),
    "other clamp lost": (
        *(FP8, FP8_CONFIG, r'swiglu_limit=getattr\(layer, "swiglu_limit", None\),', ""),
        *("glm-5.3-flash", "fp8_block"),
    ),
    "other inputs swapped": (
        *(*MAKE_NVFP4, r"a1_gscale=\(1.0 / a13_scale\)", "a1_gscale=1.0 / a2_scale"),
        *("qwen3-30b-a3b", "nvfp4"),
    ),
    "other method": (
        *(W4A4, f"CompressedTensorsW4A4Nvfp4MoEMethod.{CONFIG}"),
        *("w2_scale_2=layer.w2_weight_scale_2", "w2_scale_2=layer.w13_weight_scale_2"),
        *("qwen3-30b-a3b", "nvfp4"),
    ),
    "other biases swapped": (
        *(MAKE_MXFP4, "make_mxfp4_moe_quant_config", r"(?s)(CUTLASS_MXFP4_BF16.*?w1_bias=)w1_bias"),
        *(r"\1w2_bias", "gpt-oss-20b", "mxfp4"),
    ),
    "other bias of MXFP8 lost": (
        *(MAKE_MXFP4, "make_mxfp4_moe_quant_config", r"(?s)(CUTLASS_MXFP4_MXFP8.*?w2_bias=)w2_bias"),
        *(r"\1None", "gpt-oss-20b", "mxfp4"),
    ),
    "other alpha changed": (*GPT_OSS, "1.702", "1.0", "gpt-oss-20b", "mxfp4"),
    "other beta lost": (*BF16, '"swiglu_beta"', '"no_beta"', "minimax-m3", "bf16"),
    "no config made": (*TENSOR, "return ", "return None and ", "qwen3-30b-a3b", "fp8_per_tensor"),
}  # fmt: skip
#: What only experts that are given ids and weights show: vLLM's own code prepares their input.
MODULAR = ("nothing nvfp4", "first input scale not inverted")


def main(root, flashinfer, version):
    models = load_models(packaged_directory())
    target, _ = in_process(VllmTarget, child, root, flashinfer, version)
    found = {}
    for name, (module, path, old, new, model, scheme) in BROKEN.items():
        with edited(module, path, old, new):
            try:
                record = judge(target, models[model], scheme).record()
                modular = target.modular_findings(models[model], scheme) if name in MODULAR else ()
            except Unsupported as reason:
                found[name] = ["not judged", [str(reason)]]
            else:
                found[name] = [record.verdict, list(sentences((*record.findings, *modular)))]
    for name, (module, path, old, new, model, scheme) in OTHERS.items():
        with edited(module, path, old, new):
            found[name] = others(target, models[model], scheme)
    print(json.dumps(found))


def others(target, model, scheme):
    """Return what is found on one rank, once."""
    try:
        calls = target.other_experts(model, scheme)
    except Unsupported as reason:
        return ["not judged", [str(reason)]]
    findings = {f: None for call in calls for f in call.findings if "rank" not in f.where}
    return ["asked" if calls else "no calls", list(dict.fromkeys(sentences(findings)))]


if __name__ == "__main__":
    main(*sys.argv[1:])
