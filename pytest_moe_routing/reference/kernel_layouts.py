"""Where each fused kernel finds the elements of experts' weights, and their block scales.

Sources: FlashInfer 0.7.2.post1, `csrc/trtllm_fused_moe_kernel_launcher.cu` (shapes, dtypes),
`csrc/trtllm_fused_moe_runner.cu` (tiles of the epilogue), `flashinfer/fused_moe/core.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.reference.layouts import (
    block_major,
    interleave_rows,
    shuffle_rows,
    swap_halves,
    swizzle_scales,
)
from pytest_moe_routing.schemes import KernelSpec


@dataclass(frozen=True)
class Layout:
    """Where the elements of a weight lie.

    Attributes:
        tile: Rows are shuffled for a GEMM epilogue of this many rows; 0 for not at all.
        interleaved: Before that, up and gate rows alternate.
        block_major: Columns lie in blocks of 128 bytes.
        arguments: What names the layout to the kernel, where it has to be named.
    """

    tile: int = 0
    interleaved: bool = False
    block_major: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def rows(self, matrix: Tensor, gated: bool) -> Tensor:
        """Rows `[gate; up]` of a checkpoint, or rows without a gate, in the kernel's order."""
        if gated:
            matrix = swap_halves(matrix)
            if self.interleaved:
                matrix = interleave_rows(matrix)
        return shuffle_rows(matrix, self.tile) if self.tile else matrix

    def elements(self, matrix: Tensor, gated: bool) -> Tensor:
        """Return the stored elements of a weight, `[rows, columns]` or `[blocks, rows, width]`."""
        matrix = self.rows(matrix, gated)
        return block_major(matrix) if self.block_major else matrix.contiguous()

    def scales(self, scales: Tensor, kernel: KernelSpec, gated: bool) -> Tensor:
        """Return a weight's block scales `[rows, columns]` as an entry point takes them."""
        if kernel.weight_scales == "rows":
            return self.rows(scales, gated).squeeze(1)
        if kernel.weight_scales == "square":
            return (swap_halves(scales) if gated else scales).contiguous()
        tiled = swizzle_scales(self.rows(scales, gated)).view(getattr(torch, kernel.scale_dtype))
        # Tiles are kept under the logical shape, from which FP4 kernels tell the block size.
        return tiled.view(-1, scales.shape[-1])


#: Layouts by name: whether rows are shuffled, and the number of `WeightLayout`, which never moved.
_LAYOUTS: Mapping[str, tuple[bool, int]] = {
    "plain": (False, 0),
    "shuffled": (True, 0),
    "blocks": (True, 2),
}


def layout_of(kernel: KernelSpec, name: str = "") -> Layout:
    """Return a layout of weights that an entry point takes; by default the first.

    Raises:
        Unsupported: The entry point takes no layout of this name.
    """
    name = name or kernel.layouts[0]
    if name not in kernel.layouts:
        known = ", ".join(kernel.layouts)
        raise Unsupported(f"{kernel.function()} does not accept layout {name!r}; layouts: {known}")
    shuffled, number = _LAYOUTS[name]
    told = {"use_shuffled_weight": shuffled, "weight_layout": number}
    return Layout(
        tile=(128 if kernel.fused_activation else 64) if shuffled else 0,
        interleaved=shuffled and kernel.fused_activation,
        block_major=name == "blocks",
        arguments=told if kernel.takes_layout else {},
    )
