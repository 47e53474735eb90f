"""The permutation that fused MoE kernels derive from chosen experts, before the grouped GEMMs.

Tokens are copied into one segment per local expert, in ascending expert order; each segment is
padded to a multiple of the GEMM's token tile. Semantics of FlashInfer's routing kernels: the order
*within* a segment is not contract (kernels use atomics), so `check_permutation` tests invariants.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.reference.shard import Shard


@dataclass(frozen=True)
class Permutation:
    """Where each chosen (token, slot) goes.

    Attributes:
        tokens_per_expert: int64 `[local_num_experts]`.
        segment_starts: int64 `[local_num_experts + 1]`; the last is the padded size of it all.
        expanded_idx_to_permuted_idx: int64 `[num_tokens, top_k]`: row in the permuted buffer, or
            -1 where the expert lives on another rank.
        permuted_idx_to_token_idx: int64 `[padded size]`: the token, or -1 in padding rows.
    """

    tokens_per_expert: Tensor
    segment_starts: Tensor
    expanded_idx_to_permuted_idx: Tensor
    permuted_idx_to_token_idx: Tensor


def permute(
    topk_ids: Tensor,
    *,
    num_experts: int,
    tile_tokens_dim: int = 8,
    shard: Shard | None = None,
) -> Permutation:
    """Build the permutation of `topk_ids` (global ids, `[num_tokens, top_k]`) for one rank.

    Args:
        topk_ids: The chosen experts.
        num_experts: How many experts the layer has.
        tile_tokens_dim: Segments are padded to multiples of this.
        shard: The experts of the rank; default: all.

    Raises:
        RecipeError: ids out of range, or a shard that does not lie within the experts.
    """
    shard = shard or Shard.whole(num_experts)
    local = shard.local_num_experts
    if not shard.lies_within(num_experts):
        raise RecipeError(f"shard: found {shard}, expected experts within 0..{num_experts - 1}")
    if topk_ids.numel() and not 0 <= int(topk_ids.min()) <= int(topk_ids.max()) < num_experts:
        raise RecipeError(f"topk_ids: found ids outside 0..{num_experts - 1}")
    num_tokens, top_k = topk_ids.shape
    shifted = topk_ids.to(torch.int64).flatten() - shard.local_expert_offset
    is_local = (shifted >= 0) & (shifted < local)
    counts = torch.bincount(shifted[is_local], minlength=local)
    padded = (counts + tile_tokens_dim - 1) // tile_tokens_dim * tile_tokens_dim
    starts = torch.cat([padded.new_zeros(1), padded.cumsum(0)])

    chosen = is_local.nonzero().flatten()
    order = chosen[shifted[chosen].argsort(stable=True)]
    experts = shifted[order]
    first_of_expert = counts.cumsum(0) - counts
    place = torch.arange(len(order), device=order.device) - first_of_expert[experts]
    rows = starts[experts] + place

    expanded = torch.full_like(shifted, -1)
    expanded[order] = rows
    tokens = torch.full((int(starts[-1]),), -1, dtype=torch.int64, device=order.device)
    tokens[rows] = order // top_k
    return Permutation(counts, starts, expanded.view(num_tokens, top_k), tokens)


def check_permutation(got: Permutation, topk_ids: Tensor, wanted: Permutation) -> list[str]:
    """Return what is wrong with a kernel's permutation; empty if nothing is."""
    problems = []
    for name in ("tokens_per_expert", "segment_starts"):
        problems += _unequal(name, getattr(got, name), getattr(wanted, name))
    rows = got.expanded_idx_to_permuted_idx
    local = wanted.expanded_idx_to_permuted_idx >= 0
    if not torch.equal(rows >= 0, local):
        wrong = int(((rows >= 0) != local).sum())
        problems.append(f"{wrong} slots are local and should not be, or the reverse")
        return problems
    used = rows[local]
    if used.numel() != used.unique().numel():
        problems.append("two slots share a row of the permuted buffer")
    # A slot's segment is known by the row that the reference gave to the same expert.
    segment = torch.searchsorted(wanted.segment_starts, used, right=True)
    expected = torch.searchsorted(
        wanted.segment_starts, wanted.expanded_idx_to_permuted_idx[local], right=True
    )
    if not torch.equal(segment, expected):
        problems.append(f"{int((segment != expected).sum())} slots lie in another expert's segment")
    size = len(wanted.permuted_idx_to_token_idx)
    token_of_slot = torch.arange(len(topk_ids), device=rows.device).unsqueeze(1).expand_as(rows)
    inside = used < size
    if not bool(inside.all()):
        problems.append(f"{int((~inside).sum())} slots lie beyond the padded size {size}")
    elif not torch.equal(got.permuted_idx_to_token_idx[used], token_of_slot[local]):
        problems.append("the permuted buffer does not lead back to the slots' own tokens")
    return problems


def _unequal(name: str, got: Tensor, wanted: Tensor) -> list[str]:
    """List the first elements of a vector that differ, and how many others do."""
    if got.shape != wanted.shape:
        return [f"{name} has {len(got)} elements, not {len(wanted)}"]
    places = (got != wanted).nonzero().flatten().tolist()
    if not places:
        return []
    first = ", ".join(f"[{p}] is {int(got[p])}, not {int(wanted[p])}" for p in places[:3])
    others = f" (and {len(places) - 3} more)" if len(places) > 3 else ""
    return [f"{name}: {first}{others}"]
