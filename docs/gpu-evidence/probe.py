"""Reproducers of two defects of FlashInfer's routing kernels, and where they begin and end.

Run on a GPU with flashinfer-python >= 0.7.0. Output of an H200: probe.txt.
"""

import torch
from flashinfer.fused_moe import RoutingMethodType, trtllm_gen_routing

from pytest_moe_routing.flashinfer import KernelCall
from pytest_moe_routing.kernels.routing import run_routing

TOKENS = (1, 2, 3, 4, 5, 6, 8, 12, 15, 16, 17, 18, 32, 64, 65, 100, 128, 256, 257, 300, 1024, 1025)
SHAPES = ((16, 1), (60, 4), (96, 8), (128, 8), (160, 8), (192, 8), (256, 8), (384, 8), (512, 8))


def all_nan_row(method, num_experts, top_k, dtype):
    """Token counts at which a row of NaN gets an expert that does not exist."""
    call = KernelCall("fp8_block", method, num_experts, top_k, dtype)
    bad = {}
    for num_tokens in TOKENS:
        logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(0))
        logits[num_tokens // 2] = torch.nan
        ids = run_routing(logits.to(getattr(torch, dtype)).cuda(), None, call).topk_ids
        if (ids < 0).any() or any(len(set(row)) < top_k for row in ids.tolist()):
            bad[num_tokens] = ids[num_tokens // 2].tolist()
    return bad


def experts_of_tiles(num_experts, num_tokens, rank, ranks=4):
    """Llama4: every token wants the last expert; which experts do the rank's tiles belong to?"""
    logits = torch.full((num_tokens, num_experts), -5.0)
    logits[:, -1] = 5.0
    local = num_experts // ranks
    result = trtllm_gen_routing(
        logits.cuda(),
        None,
        RoutingMethodType.Llama4,
        1,
        local_expert_offset=rank * local,
        local_num_experts=local,
        skip_check=True,
    )
    tiles = int(result.total_num_padded_tokens) // 8
    rows = result.expanded_idx_to_permuted_idx.flatten().tolist()
    return result.cta_idx_xy_to_batch_idx[:tiles].tolist(), rows[:4]


print("1. a row of NaN: token counts at which it gets experts that do not exist (-1)")
for method in ("Renormalize", "TopK", "TopKSigmoid", "Default", "Sigmoid"):
    for num_experts, top_k in SHAPES:
        for dtype in ("bfloat16", "float32"):
            if method != "Renormalize" and num_experts > 256:
                continue
            bad = all_nan_row(method, num_experts, top_k, dtype)
            if bad:
                print(f"   {method} E={num_experts} k={top_k} {dtype}: {list(bad)}")
print(
    "2. Llama4, expert parallel: experts of the tiles (local indices expected), rows of the slots"
)
for num_experts, num_tokens in ((16, 1), (16, 3), (16, 4), (128, 1), (128, 3), (128, 4), (128, 64)):
    for rank in (0, 3):
        tiles, rows = experts_of_tiles(num_experts, num_tokens, rank)
        print(f"   E={num_experts} T={num_tokens} rank {rank} of 4: tiles {tiles}, rows {rows}")
