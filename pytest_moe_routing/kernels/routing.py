"""Calls FlashInfer's standalone routing operator: the kernels that run inside its fused MoE.

`trtllm_gen_routing` (FlashInfer >= 0.7.0) runs `Routing::Runner::run`, as every fused launcher does
before its GEMMs, and returns experts, weights and the permutation.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.kernels.gpu import HOPPER, NEEDS_FLASHINFER, poisoned
from pytest_moe_routing.reference.permutation import Permutation
from pytest_moe_routing.reference.shard import Shard


@dataclass(frozen=True)
class KernelRouting:
    """What the kernel returned, on the CPU.

    Attributes:
        topk_ids: int64 `[num_tokens, top_k]`, global; -1 outside the local shard.
        topk_weights: bfloat16 `[num_tokens, top_k]`.
        permutation: As `reference.permutation.permute` describes it; None where it cannot be one.
        broken: Why it cannot, in words.
    """

    topk_ids: Tensor
    topk_weights: Tensor
    permutation: Permutation | None
    broken: str = ""


def routing_arguments(
    logits: Tensor,
    bias: Tensor | None,
    call: KernelCall,
    *,
    tile_tokens_dim: int,
    shard: Shard,
) -> dict[str, Any]:
    """Return the keyword arguments of `trtllm_gen_routing`, except for the method, an enum."""
    if call.bias == "zeros":
        bias = torch.zeros(call.num_experts, dtype=torch.float32, device=logits.device)
    return {
        "routing_logits": logits,
        "routing_bias": bias,
        "top_k": call.top_k,
        "n_group": call.n_group,
        "topk_group": call.topk_group,
        **asdict(shard),
        "routed_scaling_factor": call.routed_scaling_factor,
        "tile_tokens_dim": tile_tokens_dim,
    }


def launch(
    logits: Tensor,
    bias: Tensor | None,
    call: KernelCall,
    *,
    tile_tokens_dim: int = 8,
    shard: Shard | None = None,
    fused_moe: Any = None,
) -> Any:
    """Call `trtllm_gen_routing`, asynchronously; arguments and errors as for `run_routing`."""
    fused_moe = fused_moe or import_module("flashinfer.fused_moe")
    shard = shard or Shard.whole(call.num_experts)
    arguments = routing_arguments(logits, bias, call, tile_tokens_dim=tile_tokens_dim, shard=shard)
    arguments["routing_method"] = fused_moe.RoutingMethodType[call.method]
    operator = getattr(fused_moe, "trtllm_gen_routing", None)
    if operator is None:
        raise Unsupported(f"trtllm_gen_routing needs FlashInfer {NEEDS_FLASHINFER} or newer")
    takes = inspect.signature(operator).parameters
    unknown = [name for name in arguments if name not in takes]
    if unknown:
        raise TypeError(f"trtllm_gen_routing does not accept {', '.join(unknown)}")
    if logits.is_cuda and torch.cuda.get_device_capability(logits.device)[0] == HOPPER:
        from pytest_moe_routing.kernels.hopper import install_routing_module

        install_routing_module()
        arguments["skip_check"] = True
    return operator(**arguments)


def run_routing(
    logits: Tensor,
    bias: Tensor | None,
    call: KernelCall,
    *,
    tile_tokens_dim: int = 8,
    shard: Shard | None = None,
    fused_moe: Any = None,
) -> KernelRouting:
    """Route where `logits` lie, and wait for the result.

    Args:
        logits: float32 or bfloat16 `[num_tokens, num_experts]`, on a CUDA device.
        bias: float32 or bfloat16 `[num_experts]`, on the same device; used when `call.bias` is
            `router`.
        call: Method, groups and scale; its dtypes describe `logits` and `bias`.
        tile_tokens_dim: Token tile of the grouped GEMM that would follow, a power of two.
        shard: The expert-parallel shard; default all experts.
        fused_moe: `flashinfer.fused_moe`, or what stands for it.

    Raises:
        Unsupported: The kernels cannot be had on this GPU.
        TypeError: The installed FlashInfer takes other arguments than this adapter passes.
    """
    how: dict[str, Any] = {"tile_tokens_dim": tile_tokens_dim, "shard": shard}
    with nullcontext() if getattr(fused_moe, "simulated", False) else poisoned():
        result = launch(logits, bias, call, **how, fused_moe=fused_moe)
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
    local = shard.local_num_experts if shard else call.num_experts
    ids, weights = result.topk_ids.cpu().to(torch.int64), result.topk_weights.cpu()
    tiles = _Tiles(result, tile_tokens_dim)
    broken = tiles.broken(local)
    return KernelRouting(ids, weights, None if broken else tiles.permutation(local), broken)


class _Tiles:
    """The kernel's bookkeeping: tiles belong to experts (local indices), rows to tiles."""

    def __init__(self, result: Any, tile: int) -> None:
        self._tile = tile
        self._padded = int(result.total_num_padded_tokens)
        experts = result.cta_idx_xy_to_batch_idx[: self._padded // tile]
        self._experts = experts.cpu().to(torch.int64)
        self._rows = result.expanded_idx_to_permuted_idx.cpu().to(torch.int64)
        self._tokens = result.permuted_idx_to_token_idx[: self._padded].cpu().to(torch.int64)

    def broken(self, local_num_experts: int) -> str:
        """Return violations of the permutation's invariants; empty if there are none."""
        outside = ~((self._experts >= 0) & (self._experts < local_num_experts))
        if bool(outside.any()):
            place = int(outside.nonzero()[0])
            return (
                f"the kernel gave tile {place} to expert {int(self._experts[place])}, "
                f"but this rank holds experts 0 to {local_num_experts - 1} (local indices)"
            )
        if bool((self._rows >= self._padded).any()):
            return f"the kernel put a slot at row {int(self._rows.max())} of {self._padded}"
        return ""

    def permutation(self, local_num_experts: int) -> Permutation:
        """Return the same permutation in the reference's terms."""
        tiles = torch.bincount(self._experts, minlength=local_num_experts)
        used = self._rows[self._rows >= 0]
        counts = torch.bincount(self._experts[used // self._tile], minlength=local_num_experts)
        return Permutation(
            tokens_per_expert=counts,
            segment_starts=torch.cat([tiles.new_zeros(1), (tiles * self._tile).cumsum(0)]),
            expanded_idx_to_permuted_idx=self._rows,
            permuted_idx_to_token_idx=self._tokens,
        )


def require(flashinfer: FlashInfer, call: KernelCall) -> None:
    """Raise `Unsupported` when this release's kernels are known not to run a call."""
    violations = flashinfer.violations(call)
    if violations:
        raise Unsupported("; ".join(map(str, violations)))
