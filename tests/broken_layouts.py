"""Edits SGLang's preparation of weights one at a time, and prints what is found, as JSON.

`python tests/broken_layouts.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys

from edited import edited
from in_process import in_process

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.formats import unlike_formats
from pytest_moe_routing.oracle.layouts import wrong_layouts
from pytest_moe_routing.oracle.other_experts import other_calls
from pytest_moe_routing.oracle.shares import wrong_splits
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets.sglang.probe import main as child
from pytest_moe_routing.targets.sglang.target import SglangTarget

LAYERS = "sglang.srt.layers"
RUNNER = f"{LAYERS}.moe.moe_runner.flashinfer_trtllm"
MXFP4 = (
    f"{LAYERS}.quantization.mxfp4_flashinfer_trtllm_moe",
    "Mxfp4FlashinferTrtllmMoEMethod.process_weights_after_loading",
)
HOPPER = (
    f"{LAYERS}.quantization.mxfp4",
    "Mxfp4MoEMethod._process_weights_for_sm90_cutlass",
)
V4_ON_HOPPER = (
    f"{LAYERS}.quantization.mxfp4_flashinfer_cutlass_moe",
    "Mxfp4FlashinferCutlassMoEMethod.process_weights_after_loading",
)
BF16 = (
    f"{LAYERS}.quantization.unquant",
    "UnquantizedFusedMoEMethod._apply_trtllm_bf16_block_layout",
)
KERNEL = (f"{LAYERS}.moe.flashinfer_trtllm_moe", "trtllm_fp8_block_scale_moe_out_wrapper")
W4A4 = (
    f"{LAYERS}.quantization.compressed_tensors.schemes.compressed_tensors_w4a4_nvfp4_moe",
    "CompressedTensorsW4A4Nvfp4MoE.apply_weights",
)
FACTOR = (f"{LAYERS}.moe.fused_moe_triton.layer", "_fuses_routed_scaling_factor_in_topk")
LOADER = (f"{LAYERS}.moe.fused_moe_triton.layer", "FusedMoE._load_w13")
CUTEDSL = f"{LAYERS}.moe.moe_runner.flashinfer_cutedsl"
WRAPPER = (CUTEDSL, "ensure_cutedsl_wrapper")
TO_CUTEDSL = (CUTEDSL, "fused_experts_none_to_flashinfer_cutedsl_fp4")
MODELOPT = (
    f"{LAYERS}.quantization.modelopt_quant",
    "ModelOptNvFp4FusedMoEMethod.process_weights_after_loading",
)
#: What is broken: the function, what is replaced in it and by what, the model and the scheme.
BROKEN = {
    "nothing bf16": (*BF16, "clone", "clone", "qwen3-30b-a3b", "bf16"),
    "blocks not made": (
        *(*BF16, r"= convert_to_block_layout\([^()]*\)", "= tile"),
        *("qwen3-30b-a3b", "bf16"),
    ),
    "nothing mxfp4": (*MXFP4, "128", "128", "deepseek-v4-flash", "mxfp4"),
    "halves not swapped": (
        *(*MXFP4, r"reorder_w1w3_to_w3w1\(\s", "(lambda *both: both)( "),
        *("deepseek-v4-flash", "mxfp4"),
    ),
    "names of gate and up swapped": (
        *(f"{LAYERS}.moe.fused_moe_triton.layer", "FusedMoE.make_expert_params_mapping"),
        r'(?s)"w1", ckpt_gate_proj_name(.*)"w3", ckpt_up_proj_name',
        *(r'"w1", ckpt_up_proj_name\1"w3", ckpt_gate_proj_name', "qwen3-30b-a3b", "bf16"),
    ),
    "loaded swapped": (
        *(*LOADER, 'switch_w13 and shard_id == "w1"', 'switch_w13 and shard_id == "w3"'),
        *("llama-4-scout", "nvfp4"),
    ),
    "not shuffled": (
        *(*MXFP4, r"g2_w.append\(w2_u8\[perm.to\(w2_u8.device\)\]", "g2_w.append(w2_u8"),
        *("deepseek-v4-flash", "mxfp4"),
    ),
    "layout says blocks": (
        *(*KERNEL, "weight_layout: int = 0", "weight_layout: int = 2"),
        *("llama-4-scout", "mxfp8"),
    ),
    "not interleaved": (
        *(RUNNER, "align_fp8_moe_weights_for_flashinfer_trtllm"),
        *(r"reorder_rows_for_gated_act_gemm\(w13_weight\[i\]\)", "w13_weight[i]"),
        *("llama-4-scout", "fp8_per_tensor"),
    ),
    "scales of activations swizzled": (
        *(RUNNER, "quantize_hidden_states_fp4", r"False,  # is_sf_swizzled_layout", "True,"),
        *("llama-4-scout", "nvfp4"),
    ),
    "scales of weights not in tiles": (
        *(RUNNER, "align_mxfp8_moe_weights_for_flashinfer_trtllm"),
        *(r"(?s)block_scale_interleave(\(\s+w2_scale_linear)", r"(lambda x: x)\1"),
        *("llama-4-scout", "mxfp8"),
    ),
    "swapped in another format": (
        *(RUNNER, "align_fp8_moe_weights_for_flashinfer_trtllm"),
        *("swap_w13_halves: bool = False", "swap_w13_halves: bool = True"),
        *("deepseek-r1", "fp8_per_tensor"),
    ),
    "scales of another format": (
        *(*W4A4, "g2_alphas=layer.g2_alphas", "g2_alphas=layer.g1_alphas"),
        *("qwen3-30b-a3b", "nvfp4"),
    ),
    "factor of a runner that is named": (
        *(*FACTOR, r"or runner_backend.is_flashinfer_trtllm_routed\(\)", ""),
        *("deepseek-r1", "fp8_block"),
    ),
    "scales of another kernel in another format": (
        *(*W4A4, r"layer.w13_input_scale_quant,", "layer.w2_input_scale_quant,"),
        *("qwen3-30b-a3b", "nvfp4"),
    ),
    "scales of halves loaded swapped": (
        *(f"{LAYERS}.moe.fused_moe_triton.layer", "FusedMoE._load_per_tensor_weight_scale"),
        *("idx = 0 if", "idx = 1 if", "qwen3-30b-a3b", "fp8_per_tensor"),
    ),
    "smaller scale of the halves": (
        f"{LAYERS}.quantization.modelopt_quant",
        "ModelOptFp8MoEMethod.process_weights_after_loading",
        *(r"(w13_weight_scale\.)max\(dim=1\)", r"\1min(dim=1)"),
        *("qwen3-30b-a3b", "fp8_per_tensor"),
    ),
    "scale of the gate for up rows": (
        *(f"{LAYERS}.quantization.modelopt_quant", "_compute_gemm1_alphas"),
        *(r"up_scale = w13_weight_scale_2\[:, 1\]", "up_scale = gate_scale", "qwen3-30b-a3b", "nvfp4"),
    ),
    "up rows stored for the scale of the gate": (
        f"{LAYERS}.quantization.modelopt_quant",
        "ModelOptNvFp4FusedMoEMethod.process_weights_after_loading",
        *(r"torch\.maximum\(", "torch.minimum("),
        *("glm-5.3-flash", "nvfp4"),
    ),
    "smallest input scale": (
        f"{LAYERS}.quantization.modelopt_quant",
        "ModelOptFp8MoEMethod.process_weights_after_loading",
        *(r"w2_input_scale\.max\(\)", "w2_input_scale.min()"),
        *("qwen3-30b-a3b", "fp8_per_tensor"),
    ),
    "experts of a rank in another order": (
        *(f"{LAYERS}.moe.fused_moe_triton.layer", "FusedMoE._map_global_expert_id_to_local_expert_id"),
        *(r"return expert_id - start_idx", "return end_idx - 1 - expert_id", "qwen3-30b-a3b", "bf16"),
    ),
    "nothing for Hopper": (*HOPPER, "2880", "2880", "gpt-oss-20b", "mxfp4"),
    "biases swapped for Hopper": (
        *(*HOPPER, r"(?s)= w13_bias_up\n(.*)= w13_bias_gate", r"= w13_bias_gate\n\1= w13_bias_up"),
        *("gpt-oss-20b", "mxfp4"),
    ),
    "weights swapped for Hopper": (
        *(*HOPPER, r"(?s)gate_rows(.*?)up_rows", r"up_rows\1gate_rows"),
        *("gpt-oss-20b", "mxfp4"),
    ),
    "not interleaved for Hopper": (
        *(*HOPPER, r"= interleave_moe_weights_for_sm90_mixed_gemm\(w2_padded, .fp4.\)", "= w2_padded"),
        *("gpt-oss-20b", "mxfp4"),
    ),
    "scales not folded for Hopper": (
        *(*V4_ON_HOPPER, r"(?s)w13_s_il = interleave_moe_scales.*?\)", "w13_s_il = w13_scale_u8"),
        *("deepseek-v4-flash", "mxfp4"),
    ),
    "scales not in tiles for RTX": (
        *(*V4_ON_HOPPER, r"block_scale_interleave\(scale_u8\)", "scale_u8"),
        *("deepseek-v4-flash", "mxfp4"),
    ),
    "scales in each other's place for CuteDSL": (
        *(*WRAPPER, r"_scales = \(w1_alpha, fc2_input_scale, w2_alpha\)"),
        *("_scales = (w1_alpha, w2_alpha, fc2_input_scale)", "qwen3-30b-a3b", "nvfp4"),
    ),
    "scale inverted for CuteDSL": (
        *(CUTEDSL, "resolve_cutedsl_standard_scales"),
        *(r"(return w13_weight_scale_2.*) / scalar", r"\1 * scalar", "qwen3-30b-a3b", "nvfp4"),
    ),
    "scales of activations in tiles for CuteDSL": (
        *(*TO_CUTEDSL, "is_sf_swizzled_layout=False", "is_sf_swizzled_layout=True"),
        *("qwen3-30b-a3b", "nvfp4"),
    ),
    "scale of the input for CuteDSL": (
        *(*TO_CUTEDSL, r"(?s)( fp4_quantize\(\s+hidden_states,\s+)quant_info.a1_scale"),
        *(r"\1quant_info.a2_scale", "qwen3-30b-a3b", "nvfp4"),
    ),
    "groups for CuteDSL": (
        *(*MODELOPT, r"(w13_weight\.view\(torch\.uint8\), group_size=)64", r"\g<1>32"),
        *("qwen3-30b-a3b", "nvfp4"),
    ),
    "groups of scales for CuteDSL": (
        *(*MODELOPT, r"(layer\.w13_weight_scale, group_size=)64", r"\g<1>32"),
        *("qwen3-30b-a3b", "nvfp4"),
    ),
    "blocks of another matrix for CuteDSL": (
        *(MODELOPT[0], "ModelOptNvFp4FusedMoEMethod.apply"),
        *('"w2_blockscale_mma"', '"w13_blockscale_mma"', "qwen3-30b-a3b", "nvfp4"),
    ),
    # Those of `test_other_experts`; see `CALLS`.
    "rank lost for CuteDSL": (
        *(*WRAPPER, "local_expert_offset=.*", "", "qwen3-30b-a3b", "nvfp4"),
    ),
    "experts lost for CuteDSL": (
        *(*WRAPPER, "num_experts=layer.num_experts", "num_experts=layer.num_local_experts"),
        *("qwen3-30b-a3b", "nvfp4"),
    ),
    "mode lost for CuteDSL": (
        *(*WRAPPER, "quant_mode=quant_mode", "quant_mode='w4a16'", "qwen3-30b-a3b", "nvfp4"),
    ),
    "dtype of router weights for CuteDSL": (
        *(*TO_CUTEDSL, "token_final_scales=topk_weights", "token_final_scales=topk_weights.bfloat16()"),
        *("qwen3-30b-a3b", "nvfp4"),
    ),
    "activation for CuteDSL": (
        *(CUTEDSL, "_cutedsl_wrapper_activation_type"),
        *("activation_type_cls.Swiglu", "activation_type_cls.Relu2", "qwen3-30b-a3b", "nvfp4"),
    ),
}  # fmt: skip
#: What is also looked for in `test_other_experts`.
CALLS = (
    "factor of a runner that is named",
    "rank lost for CuteDSL",
    "experts lost for CuteDSL",
    "mode lost for CuteDSL",
    "dtype of router weights for CuteDSL",
    "activation for CuteDSL",
)


LAYER = f"{LAYERS}.moe.fused_moe_triton.layer", "FusedMoE._load_w13"
#: The same of experts that are split over ranks.
SPLIT = {
    "nothing split": (*LAYER, "shard_size", "shard_size", "qwen3-30b-a3b", "bf16"),
    "nothing torn": (*LAYER, "shard_size", "shard_size", "gemma-4-26b-a4b", "nvfp4"),
    "rows of the first rank": (
        *(*LAYER, r"weight_start = shard_size \* self\.moe_tp_rank", "weight_start = 0"),
        *("qwen3-30b-a3b", "bf16"),
    ),
    "tiles of a rank": (*LAYER, "shard_size", "shard_size", "qwen3-30b-a3b", "mxint4"),
}


def main(root, flashinfer, version):
    models = load_models(packaged_directory())
    target, handlers = in_process(SglangTarget, child, root, flashinfer, version)
    handlers["method_numbers"]()
    found = {}
    for name, (module, path, old, new, model, scheme) in BROKEN.items():
        with edited(module, path, old, new):
            target._answers.clear()
            usual = wrong_layouts(target, scheme, [models[model]])
            others = unlike_formats(target, scheme, [models[model]])
            named = other_calls(target, scheme, [models[model]]).wrong if name in CALLS else ()
        told = [
            [e.at.method.rpartition("/")[2], *sentences(e.at.findings)]
            for e in (*usual.wrong, *others.layouts)
        ]
        unlike = [[e.format, *sentences(e.record.findings)] for e in others.unlike]
        calls = [[e.call.experts, *sentences(e.findings)] for e in (*others.calls, *named)]
        found[name] = [usual.answered, *told, *unlike, *calls]
    for name, (module, path, old, new, model, scheme) in SPLIT.items():
        with edited(module, path, old, new):
            target._answers.clear()
            split = wrong_splits(target, scheme, [models[model]])
        told = [[str(e.splits[0]), *sentences(e.at.findings)] for e in split.wrong]
        found[name] = [split.answered, *told]
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
