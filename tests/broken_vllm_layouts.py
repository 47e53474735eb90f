"""Edits vLLM's preparation of weights one at a time, and prints what is found, as JSON.

`python tests/broken_vllm_layouts.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys

from edited import edited
from in_process import in_process
from packaging.version import Version

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.layouts import wrong_layouts
from pytest_moe_routing.oracle.shares import wrong_splits
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.target import VllmTarget

LAYERS = "vllm.model_executor.layers"
QUANT, MOE = f"{LAYERS}.quantization", f"{LAYERS}.fused_moe"
UTILS, FP4 = f"{QUANT}.utils.flashinfer_utils", f"{QUANT}.utils.flashinfer_fp4_moe"
DEEPSEEK = UTILS, "_shuffle_deepseek_fp8_moe_weights"
MXFP8 = UTILS, "_shuffle_mxfp8_moe_weights"
FP8 = UTILS, "prepare_fp8_moe_layer_for_fi"
PER_TENSOR = UTILS, "rotate_weights_for_fi_trtllm_fp8_per_tensor_moe"
KERNEL = f"{MOE}.experts.trtllm_fp8_moe"
MODELOPT = f"{QUANT}.modelopt", "ModelOptNvFp4FusedMoE.process_weights_after_loading"
TENSORS = f"{QUANT}.compressed_tensors.compressed_tensors_moe"
LOADER = f"{MOE}.routed_experts", "RoutedExperts._load_w13"
MXFP4 = f"{MOE}.oracle.mxfp4"
RUNNER = f"{MOE}.runner.moe_runner"
CUTEDSL = FP4, "prepare_nvfp4_moe_layer_for_flashinfer_cutedsl"
GPT_OSS = MXFP4, "convert_gpt_oss_weight_to_mxfp4_moe_kernel_format"
#: What is broken: the function, what is replaced in it and by what, the model and the scheme.
BROKEN = {
    "tile of the epilogue": (
        *(*DEEPSEEK, "epilogue_tile_m = 64", "epilogue_tile_m = 128"),
        *("deepseek-r1", "fp8_block"),
    ),
    "size of blocks": (*DEEPSEEK, "block_k = 128", "block_k = 64", "deepseek-r1", "fp8_block"),
    "layout of experts that route": (
        *(KERNEL, "TrtLlmFp8ExpertsMonolithic._apply_block_scale"),
        *("WeightLayout.BlockMajorK", "WeightLayout.MajorK", "deepseek-r1", "fp8_block"),
    ),
    "layout of experts that do not": (
        *(KERNEL, "TrtLlmFp8ExpertsModular.apply"),
        *("WeightLayout.BlockMajorK", "WeightLayout.MajorK", "deepseek-r1", "fp8_block"),
    ),
    "said not to be shuffled": (
        *(KERNEL, "TrtLlmFp8ExpertsMonolithic._apply_block_scale"),
        *("use_shuffled_weight = True", "use_shuffled_weight = False", "minimax-m3", "mxfp8"),
    ),
    "halves of weights": (*FP8, r"swap_w13_to_w31\(w13\)", "w13", "minimax-m3", "mxfp8"),
    "halves of square scales": (
        *(*FP8, r"(?s)(block_quant:\s+w13_scale = )swap_w13_to_w31\(", r"\1("),
        *("deepseek-r1", "fp8_block"),
    ),
    "names of gate and up swapped": (
        *(f"{MOE}.routed_experts", "RoutedExperts.build_expert_params_mapping"),
        r'(?s)"w1", ckpt_gate_proj_name(.*)"w3", ckpt_up_proj_name',
        *(r'"w1", ckpt_up_proj_name\1"w3", ckpt_gate_proj_name', "mixtral-8x7b", "bf16"),
    ),
    "loaded swapped": (
        *(*LOADER, r"(?s)(dim, )0(, shard_size.*?dim, )shard_size(, shard_size)"),
        *(r"\1shard_size\g<2>0\3", "mixtral-8x7b", "bf16"),
    ),
    "scales not in tiles": (
        *(*MXFP8, r"block_scale_interleave\(s\[:, idx\]\)", "s[:, idx]"),
        *("minimax-m3", "mxfp8"),
    ),
    "scales in tiles twice": (
        *(*MXFP8, r"interleaved\.reshape\(s\.shape\)"),
        r"block_scale_interleave(interleaved.reshape(s.shape)).reshape(s.shape)",
        *("minimax-m3", "mxfp8"),
    ),
    "gate rows that are none": (
        *(*PER_TENSOR, "if is_gated_activation", "if True"),
        *("nemotron-3-nano", "fp8_per_tensor"),
    ),
    "no gate rows": (
        *(*PER_TENSOR, "if is_gated_activation", "if False"),
        *("mixtral-8x7b", "fp8_per_tensor"),
    ),
    "tile of packed integers": (
        *(f"{QUANT}.utils.flashinfer_mxint4_moe", "prepare_static_weights_for_trtllm_mxint4_moe"),
        *("epilogue_tile_m = 128", "epilogue_tile_m = 64", "mixtral-8x7b", "mxint4"),
    ),
    "halves of blocks": (
        *(UTILS, "convert_moe_weights_to_flashinfer_trtllm_block_layout"),
        *(r"(?s)if is_gated_act_gemm:(\s+permute)", r"if False:\1", "mixtral-8x7b", "bf16"),
    ),
    "order of pairs": (
        *(MXFP4, "convert_weight_to_mxfp4_moe_kernel_format"),
        *(r"\[w3_weight, w1_weight\]", "[w1_weight, w3_weight]", "deepseek-v4-flash", "mxfp4"),
    ),
    "order of biases": (
        *(*GPT_OSS, r"swap_every_two_rows\(w13_bias, -1\)", "w13_bias", "gpt-oss-20b", "mxfp4"),
    ),
    "dtype of biases": (
        *(*GPT_OSS, r"(w2_bias.*)torch\.float32", r"\1torch.bfloat16", "gpt-oss-20b", "mxfp4"),
    ),
    "tile of biases": (
        *(*GPT_OSS, r"(?s)(w2_bias\[i\]\.clone\(\)\.reshape\(-1, 1\),\s+)epilogue_tile_m", r"\g<1>64"),
        *("gpt-oss-20b", "mxfp4"),
    ),
    "scales of activations in tiles": (
        *(f"{MOE}.oracle.nvfp4", "make_nvfp4_moe_quant_config"),
        *(r"(?s)is_scale_swizzled=\(.*?\n        \)", "is_scale_swizzled=True"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "scales of inputs swapped": (
        *(*MODELOPT, "a13_scale=layer.w13_input_scale", "a13_scale=layer.w2_input_scale"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "scale of the first input": (
        *(FP4, "prepare_nvfp4_moe_layer_for_fi_or_cutlass"),
        *(r"amax_for_moe_activation_quant\(a13_scale, enable_eplb\)", "a13_scale.flatten()[:1]"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "up rows in the padding of gate rows": (
        *(UTILS, "align_fp4_moe_weights_for_fi"),
        r"padded_w13\[:, padded_intermediate : padded_intermediate \+ intermediate, :\]",
        *("padded_w13[:, intermediate : 2 * intermediate, :]", "mixtral-8x7b", "nvfp4"),
    ),
    "columns after their padding": (
        *(UTILS, "align_moe_weights_for_fi"),
        *(r"padded_w2\[:, :, :intermediate\]", "padded_w2[:, :, -intermediate:]"),
        *("nemotron-3-nano", "fp8_per_tensor"),
    ),
    "one factor for all experts": (
        *(KERNEL, "TrtLlmFp8ExpertsMonolithic.__init__"),
        *(r"\(w1_scale \* a1_scale\)", "(w1_scale.max() * a1_scale).repeat(len(w1_scale))"),
        *("mixtral-8x7b", "fp8_per_tensor"),
    ),
    "factor of another checkpoint": (
        f"{TENSORS}.compressed_tensors_moe_w4a4_nvfp4",
        "CompressedTensorsW4A4Nvfp4MoEMethod.process_weights_after_loading",
        *(r"1\.0 / layer\.w2_weight_global_scale", "layer.w2_weight_global_scale"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "scales of halves swapped": (
        *(f"{QUANT}.modelopt", "ModelOptFp8MoEMethod.process_weights_after_loading"),
        *(r"w13_scale,(\s+shard_size)", r"w13_scale.flip(1),\1", "mixtral-8x7b", "fp8_per_tensor"),
    ),
    "scale of the gate for both halves": (
        f"{TENSORS}.compressed_tensors_moe_w8a8_fp8",
        "CompressedTensorsW8A8Fp8MoEMethod.process_weights_after_loading",
        r"w13_scale,(\s+shard_size)",
        *(r"w13_scale[:, :1].repeat(1, 2),\1", "mixtral-8x7b", "fp8_per_tensor"),
    ),
    "scales of half of the inputs": (
        *(*MODELOPT, "a13_scale=layer.w13_input_scale", "a13_scale=layer.w13_input_scale[:, :1]"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "scales of the other half of the inputs": (
        *(*MODELOPT, "a13_scale=layer.w13_input_scale", "a13_scale=layer.w13_input_scale[:, 1:]"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "block scales cast": (
        *(*FP8, r"(?s)(block_quant:\s+w13_scale = )(swap_w13_to_w31\(w13_scale\))"),
        *(r"\1\2.bfloat16().float()", "deepseek-r1", "fp8_block"),
    ),
    "small block scales clamped": (*FP8, "= 1e-10", "= 1e-3", "deepseek-r1", "fp8_block"),
    "experts of a rank in another order": (
        *(f"{MOE}.routed_experts", "RoutedExperts._map_global_expert_id_to_local_expert_id"),
        *(r"return (.*)", r"at = \1; return at if at < 1 else self.local_num_experts - at"),
        *("mixtral-8x7b", "bf16"),
    ),
    "halves for CUTLASS": (
        *(FP4, "prepare_nvfp4_moe_layer_for_fi_or_cutlass"),
        *(r"(?s)(and backend\s+in \[\s+)NvFp4MoeBackend.FLASHINFER_CUTLASS,", r"\1"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "scales not in tiles for CUTLASS": (
        *(FP4, "prepare_nvfp4_moe_layer_for_fi_or_cutlass"),
        *(r"w2_scale = swizzle_blockscale\(w2_scale\)", "w2_scale = w2_scale"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "factor for CUTLASS": (
        *(f"{MOE}.oracle.fp8", "make_fp8_moe_quant_config"),
        *(r"g2_alphas = w2_scale \* a2_scale", "g2_alphas = w2_scale * 1"),
        *("mixtral-8x7b", "fp8_per_tensor"),
    ),
    "hidden size for CuteDSL": (
        *(UTILS, "align_fp4_moe_hidden_dim_for_fi", "min_alignment: int = 256"),
        *("min_alignment: int = 128", "nemotron-3-nano", "nvfp4"),
    ),
    "rows for CuteDSL": (
        *(*CUTEDSL, "64 if gated else 128", "16", "nemotron-3-nano", "nvfp4"),
    ),
    "halves for CuteDSL": (
        *(*CUTEDSL, r"(?s)w13, w13_scale = reorder_w13_to_w31_for_flashinfer_cutedsl\(.*?\)", "pass"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "groups for CuteDSL": (
        *(*CUTEDSL, "group_size=64", "group_size=32", "mixtral-8x7b", "nvfp4"),
    ),
    "groups of scales for CuteDSL": (
        *(*CUTEDSL, r"w13_scale = interleave_linear_and_gate\(w13_scale, group_size=64, dim=1\)"),
        *("pass", "mixtral-8x7b", "nvfp4"),
    ),
    "scales not in tiles for CuteDSL": (
        *(*CUTEDSL, r"w2_scale = swizzle_blockscale\(w2_scale\)", "pass", "mixtral-8x7b", "nvfp4"),
    ),
    "alpha for CuteDSL": (
        f"{MOE}.experts.flashinfer_cutedsl_moe",
        "FlashInferCuteDSLExperts.process_weights_after_loading",
        *(r"layer\.w13_weight_scale_2\.data\.mul_\(layer\.w13_input_scale\)", "pass"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "scale of the second input for CuteDSL": (
        *(f"{MOE}.experts.flashinfer_cutedsl_moe", "FlashInferCuteDSLExperts.apply"),
        *(r"fc2_input_scale=fc2_input_scale", "fc2_input_scale=self.a1_gscale"),
        *("mixtral-8x7b", "nvfp4"),
    ),
    "output that is not cut": (
        *(RUNNER, "MoERunner._maybe_reduce_final_output"),
        *(r"states\[\.\.\., :trunc_size\] if .*", "states", "mixtral-8x7b", "nvfp4"),
    ),
    "output that is not cut next to shared experts": (
        *(RUNNER, "MoERunner.forward", r"fused_output\[\.\.\., :og_hidden_dim_pre_xform\]"),
        *("fused_output", "nemotron-3-nano", "nvfp4"),
    ),
    "output that is cut elsewhere": (
        *(RUNNER, "MoERunner._maybe_reduce_final_output"),
        *(r"states\[\.\.\., :trunc_size\]", "states[..., -trunc_size:]", "mixtral-8x7b", "nvfp4"),
    ),
    "padding that is not zero": (
        *(RUNNER, "MoERunner._maybe_pad_hidden_states", "value=0.0", "value=1.0"),
        *("nemotron-3-nano", "nvfp4"),
    ),
    "output that is cut to the latent size": (
        *(RUNNER, "MoERunner._maybe_pad_hidden_states"),
        *("self.routed_output_transform is not None and shared", "False and shared"),
        *("nemotron-3-nano", "nvfp4"),
    ),
    "output that is wider than the layer": (
        *(f"{MOE}.experts.trtllm_mxfp4_moe", "TrtLlmMxfp4ExpertsBase.__init__"),
        *(r"moe_config.hidden_dim_unpadded or moe_config.hidden_dim", "moe_config.hidden_dim"),
        *("gpt-oss-20b", "mxfp4"),
    ),
    "tile of rows without a gate for CuteDSL": (
        *(*CUTEDSL, "64 if gated else 128", "64", "nemotron-3-nano", "nvfp4"),
    ),
    "rows of experts without a gate for CUTLASS": (
        *(*GPT_OSS, "128", "128", "nemotron-3-nano", "mxfp4"),
    ),
    "hidden states that are padded otherwise than weights": (
        *(MXFP4, "make_mxfp4_moe_quant_config", "mx_alignment=256", "mx_alignment=128"),
        *("deepseek-v4-flash", "mxfp4"),
    ),
    "nothing with biases": (*GPT_OSS, "128", "128", "gpt-oss-20b", "mxfp4"),
    "nothing without gates": (*DEEPSEEK, "64", "64", "nemotron-3-nano", "nvfp4"),
    "nothing with SiTU": (*DEEPSEEK, "64", "64", "kimi-k3", "nvfp4"),
}  # fmt: skip

#: The same of what a later release does.
SINCE = {
    "halves of one tensor": (
        *("0.32.0", f"{MOE}.routed_experts", "RoutedExperts.build_expert_params_mapping"),
        *(r'(w13_shards.*= )\("w1", "w3"\)', r'\1("w3", "w1")', "qwen3-vl-30b-a3b", "bf16"),
    ),
    "halves of an expert in one tensor": (
        *("0.33.0", f"{MOE}.routed_experts", "RoutedExperts.load_weights"),
        *('0 if shard_id == "w1" else 1', '1 if shard_id == "w1" else 0'),
        *("qwen3-vl-30b-a3b", "bf16"),
    ),
    "rows that are columns": (
        *("0.33.0", f"{MOE}.routed_experts", "RoutedExperts._orient_fused_weight"),
        *(r"fused_weight\.transpose\(-1, -2\)", "fused_weight", "qwen3-vl-30b-a3b", "fp8_block"),
    ),
    "block scales of rows that are columns": (
        *("0.33.0", f"{MOE}.routed_experts", "RoutedExperts.load_weights"),
        *(r"self\.is_fused_checkpoint_transposed and uses_weight_layout", "uses_weight_layout"),
        *("qwen3-30b-a3b", "fp8_block"),
    ),
    "columns for MXFP8": (
        *("0.33.0", *FP8, "hidden_alignment=256", "hidden_alignment=128"),
        *("minimax-m3", "mxfp8"),
    ),
    "columns for MXFP8 that are not padded": (
        *("0.33.0", UTILS, "align_mxfp8_moe_weights_for_fi_trtllm"),
        *(r"round_up\(hidden_size, hidden_alignment\)", "hidden_size", "minimax-m3", "mxfp8"),
    ),
    "columns for MXFP8 that hidden states lack": (
        *("0.33.0", *FP8, "layer.moe_config.hidden_dim = new_hidden", "pass"),
        *("minimax-m3", "mxfp8"),
    ),
}

#: The same of experts that are split over ranks.
SPLIT = {
    "nothing split": (*GPT_OSS, "128", "128", "minimax-m2", "nvfp4"),
    "nothing refused": (*GPT_OSS, "128", "128", "qwen3-30b-a3b", "fp8_block"),
    "tiles of a rank": (
        *(FP4, "prepare_nvfp4_moe_layer_for_fi_or_cutlass"),
        *("64 if is_gated", "16 if is_gated", "qwen3-30b-a3b", "nvfp4"),
    ),
    "blocks of a rank": (*GPT_OSS, "128", "128", "gemma-4-26b-a4b", "nvfp4"),
    "rows of a rank": (*GPT_OSS, "128", "128", "qwen3-30b-a3b", "fp8_per_tensor"),
    "size of all ranks": (
        *(f"{MOE}.experts.trtllm_nvfp4_moe", "TrtLlmNvFp4ExpertsBase.__init__"),
        *(r"moe_config\.intermediate_size_per_partition", "moe_config.intermediate_size"),
        *("minimax-m2", "nvfp4"),
    ),
    "rows of the first rank": (
        *(*LOADER, r"loaded_per_rank \* tp_rank", "loaded_per_rank * 0"),
        *("mixtral-8x7b", "bf16"),
    ),
    "refused for no reason": (
        *(f"{QUANT}.modelopt", "ModelOptMxFp8FusedMoE.create_weights"),
        *("(intermediate_size_per_partition) % MXFP8_BLOCK_SIZE", r"\1"),
        *("mixtral-8x7b", "mxfp8"),
    ),
}


def main(root, flashinfer, version):
    models = load_models(packaged_directory())
    target, handlers = in_process(VllmTarget, child, root, flashinfer, version)
    handlers["numbers"]()
    found = {}
    newer = {n: what for n, (since, *what) in SINCE.items() if Version(version) >= Version(since)}
    for name, (module, path, old, new, model, scheme) in {**BROKEN, **newer}.items():
        with edited(module, path, old, new):
            wrong = wrong_layouts(target, scheme, [models[model]])
        answers = [[e.at.method.rpartition("/")[2], *sentences(e.at.findings)] for e in wrong.wrong]
        found[name] = [wrong.answered, *answers]
    for name, (module, path, old, new, model, scheme) in SPLIT.items():
        with edited(module, path, old, new):
            split = wrong_splits(target, scheme, [models[model]])
        told = [[str(e.splits[0]), *sentences(e.at.findings)] for e in split.wrong]
        found[name] = [split.answered, *told]
    found["unanswered"] = wrong_layouts(target, "nvfp4", [models["gpt-oss-20b"]]).unanswered
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
