"""What runs while a CUDA graph is captured: a second stream, and kernels that leave out a sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.targets.sglang.probe.requests import CAPTURED, requested


def enter() -> None:
    """Have code that uses CUDA's streams run without them."""
    torch.cuda.current_stream = torch.cpu.current_stream  # type: ignore[assignment]
    torch.cuda.stream = torch.cpu.stream  # type: ignore[assignment]
    torch.Tensor.record_stream = lambda *_: None  # type: ignore[method-assign]


def stand_ins() -> dict[str, Any]:
    """Return replacements of SGLang's own functions, by bare name."""
    return {
        "get_is_capture_mode": lambda: bool(requested(CAPTURED)),
        "moe_finalize_fuse_shared": summed,
    }


def unsummed(output: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
    """Return what an entry point with `do_finalize=False` leaves to be summed to `output`.

    In SGLang's order: a row for each expert of a token, their weights, and the place of each row.
    """
    tokens, top_k = len(output), arguments["top_k"]
    rows = output.repeat_interleave(top_k, 0)
    weights = torch.full((tokens, top_k), 1 / top_k)
    return [rows, weights, torch.arange(len(rows), dtype=torch.int32)]


def summed(
    rows: Tensor, places: Tensor, weights: Tensor, shared: Tensor | None, top_k: int, **_: Any
) -> Tensor:
    """Return what SGLang's `moe_finalize_fuse_shared` returns."""
    each = rows[places].view(-1, top_k, rows.shape[1]).float()
    output = (each * weights.unsqueeze(2)).sum(1)
    return (output if shared is None else output + shared).to(rows.dtype)
