"""Breaks vLLM's CuteDSL experts, one thing at a time, and prints what is found, as JSON.

`python tests/broken_cutedsl.py ROOT FLASHINFER VERSION`, in a process of its own.
"""

from __future__ import annotations

import json
import sys

from edited import edited
from in_process import in_process

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets.vllm.probe import main as child
from pytest_moe_routing.targets.vllm.target import VllmTarget

MOE = "vllm.model_executor.layers.fused_moe"
EXPERTS = "FlashInferCuteDSLExperts"
MODULE = f"{MOE}.experts.flashinfer_cutedsl_moe"
CALL = (MODULE, f"{EXPERTS}.apply")
CONFIG = (f"{MOE}.oracle.nvfp4", "make_nvfp4_moe_quant_config")
#: What is broken: the function, what is replaced in it and by what, and the model.
BROKEN = {
    "nothing": (*CALL, "activation", "activation", "deepseek-r1"),
    "nothing clamped": (*CALL, "activation", "activation", "deepseek-v4-flash-nvfp4"),
    "nothing uninterleaved": (*CALL, "activation", "activation", "minimax-m3"),
    "nothing without a gate": (*CALL, "activation", "activation", "nemotron-3-nano"),
    "nothing of SiTU": (*CALL, "activation", "activation", "kimi-k3"),
    "nothing in float32": (*CALL, "activation", "activation", "marco-mini"),
    "offset lost": (*CALL, "local_expert_offset=self.local_expert_offset,", "", "deepseek-r1"),
    "offset of ranks": (
        *(MODULE, f"{EXPERTS}.__init__", r"self\.ep_rank \* self\.local_num_experts"),
        *("self.ep_rank", "deepseek-r1"),
    ),
    "all experts local": (
        *(*CALL, "num_local_experts=self.local_num_experts", "num_local_experts=self.global_num_experts"),
        "deepseek-r1",
    ),
    "local experts lost": (*CALL, "num_local_experts=self.local_num_experts,", "", "deepseek-r1"),
    "local experts for all": (
        *(*CALL, " num_experts=self.global_num_experts", " num_experts=self.local_num_experts"),
        "deepseek-r1",
    ),
    "other top_k": (*CALL, "top_k=self.topk", "top_k=self.topk - 1", "deepseek-r1"),
    "limit lost": (
        *(*CALL, r'swiglu_params = \{"swiglu_limit": self\.gemm1_clamp_limit\}', "pass"),
        "deepseek-v4-flash-nvfp4",
    ),
    "alpha and beta exchanged": (
        *(*CALL, r'"swiglu_alpha": self\.gemm1_alpha,(\s+)"swiglu_beta": self\.gemm1_beta'),
        *(r'"swiglu_alpha": self.gemm1_beta,\1"swiglu_beta": self.gemm1_alpha', "minimax-m3"),
    ),
    "SiTU lost": (*CALL, r'"situ_beta": self\.situ_beta,', "", "kimi-k3"),
    "clamp of SiTU lost": (*CALL, r'"situ_linear_beta": self\.situ_linear_beta,', "", "kimi-k3"),
    "activation lost": (
        *(*CALL, r"activation_type=activation_to_flashinfer_int\((?s:.*?)\n        \),", ""),
        "nemotron-3-nano",
    ),
    "ids and weights exchanged": (
        *(*CALL, r"token_selected_experts=topk_ids\.(.*),\s+token_final_scales=topk_weights\.(.*),"),
        *(
            r"token_selected_experts=topk_weights.\1, token_final_scales=topk_ids.\2,",
            "deepseek-r1",
        ),
    ),
    "weights lost": (*CALL, r"topk_weights\.float\(\)", "torch.ones_like(topk_weights.float())", "deepseek-r1"),
    "dtype of weights": (*CALL, r"topk_weights\.float\(\)", "topk_weights.bfloat16()", "deepseek-r1"),
    "dtype of ids": (*CALL, r"topk_ids\.to\(torch\.int32\)", "topk_ids.long()", "deepseek-r1"),
    "ids of the first rank": (
        *(*CALL, r"topk_ids\.to\(torch\.int32\)", "topk_ids.to(torch.int32) % self.local_num_experts"),
        "deepseek-r1",
    ),
    "output lost": (*CALL, "moe_output=output,", "", "deepseek-r1"),
    "scales of the input in tiles": (
        *(*CONFIG, r"NvFp4MoeBackend\.FLASHINFER_TRTLLM,\s+NvFp4MoeBackend\.FLASHINFER_CUTEDSL,"),
        *("NvFp4MoeBackend.FLASHINFER_TRTLLM,", "deepseek-r1"),
    ),
    "scales of the input by column": (
        *(*CALL, r"block_scale\.unsqueeze\(-1\)", "block_scale.t().contiguous().unsqueeze(-1)"),
        "deepseek-r1",
    ),
    "input of another product": (
        *(*CONFIG, r"a1_gscale=\(1\.0 / a13_scale\),(\s+a2_gscale=\(1\.0 / a2_scale\),\s+w1_scale=w13)"),
        *(r"a1_gscale=(1.0 / a2_scale),\1", "deepseek-r1"),
    ),
    "alphas exchanged": (
        *(*CALL, r"w1_alpha=self\.g1_alphas", "w1_alpha=self.g2_alphas", "deepseek-r1"),
    ),
    "scale of the second input lost": (
        *(*CALL, r"fc2_input_scale = self\.a2_gscale", "fc2_input_scale = self.a1_gscale"),
        "deepseek-r1",
    ),
    "block scales exchanged": (
        *(*CALL, r"w1_weight_sf=self\.w1_scale", "w1_weight_sf=self.w2_scale", "deepseek-r1"),
    ),
}  # fmt: skip


def main(root, flashinfer, version):
    models = load_models(packaged_directory())
    target, handlers = in_process(VllmTarget, child, root, flashinfer, version)
    handlers["numbers"]()
    found = {}
    for name, (module, path, old, new, model) in BROKEN.items():
        with edited(module, path, old, new):
            calls = target.other_experts(models[model], "nvfp4")
        mine = [call for call in calls if call.experts == EXPERTS]
        # By what is wrong: the ways on which it is.
        told = {}
        for call in mine:
            for sentence in sentences(call.findings):
                told.setdefault(sentence, set()).add(way_of(call))
        found[name] = [len(mine), {text: sorted(ways) for text, ways in told.items()}]
    print(json.dumps(found))


def way_of(call):
    flags = " ".join(call.switches)
    words = ("nvlink", "data-parallel", "expert-parallel", "tensor-parallel")
    return next((word for word in words if word in flags), "alone")


if __name__ == "__main__":
    main(*sys.argv[1:])
