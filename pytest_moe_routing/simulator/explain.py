"""Names the faults that explain what a kernel returned, by simulating each of them.

Nothing is guessed: the same call is simulated right and with every fault, and a fault explains a
result that it comes ten times nearer to than the right simulation does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.simulator.faults import FAULTS
from pytest_moe_routing.simulator.simulator import Simulator

#: Share of the deviation that a fault may leave unexplained: what rounding adds on hardware.
_LEFT = 0.1


def explain(run: Callable[[Any], Tensor], got: Tensor, flashinfer: FlashInfer) -> list[str]:
    """Lines for a failure's message: each fault that explains it, and where it was reported.

    Args:
        run: Makes the call with what stands for `flashinfer.fused_moe`, all on the CPU.
        got: What the kernel returned for it, in the same form.
        flashinfer: The release that is simulated.
    """
    wrong = distance(run(Simulator(flashinfer)), got)
    if not wrong:
        return []
    lines = []
    for fault in FAULTS.values():
        try:
            simulated = run(Simulator(flashinfer, fault))
        except (RuntimeError, IndexError):
            # This fault breaks the call in another way than by a wrong result.
            continue
        if distance(simulated, got) <= _LEFT * wrong:
            lines.append(f"  diagnosis  {fault.what} (as in {fault.imitates})")
    return lines or ["  diagnosis  none of the known faults explains it"]


def dense(topk_ids: Tensor, topk_weights: Tensor, num_experts: int) -> Tensor:
    """Return a routing as weights by expert, and each token's number of slots without an expert."""
    ids = topk_ids.to(torch.int64)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    found = torch.zeros(len(ids), num_experts + 1, dtype=torch.float64)
    found.scatter_add_(1, ids, topk_weights.to(torch.float64))
    found[:, -1] = (ids == num_experts).sum(1)
    return found


def distance(one: Tensor, other: Tensor) -> float:
    """Root mean square of the difference; a NaN is far from every number and near a NaN."""
    if one.shape != other.shape:
        return torch.inf
    one, other = one.to(torch.float64), other.to(torch.float64)
    same = (one == other) | (one.isnan() & other.isnan())
    apart = (one - other).abs().masked_fill(same, 0.0)
    far = apart[apart.isfinite()].amax().item() if apart.isfinite().any() else 0.0
    return float(apart.nan_to_num(1.0 + far, posinf=1.0 + far).square().mean().sqrt())
