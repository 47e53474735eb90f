"""Experts' weights as each fused kernel takes them: row order, blocks of columns, scales.

Sources: FlashInfer 0.7.2.post1, `csrc/trtllm_fused_moe_kernel_launcher.cu` (shapes, dtypes),
`csrc/trtllm_fused_moe_runner.cu` (tiles of the epilogue), `flashinfer/fused_moe/core.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_moe_routing.reference.kernel_layouts import Layout, layout_of
from pytest_moe_routing.reference.quantization import Quantized
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.weights import Expert, Experts
from pytest_moe_routing.schemes import KernelSpec


@dataclass(frozen=True)
class Prepared:
    """The weights of a shard's experts, ready for a kernel.

    Attributes:
        layout: How they lie.
        tensors: Arguments that hold weights and block scales, `[experts, ...]`.
        gate, up, down, intermediate: float32 `[experts]`: what a quantized number of the gate rows,
            the up rows, the second GEMM's weights and the intermediate stands for, block scales
            apart.
        bias1, bias2: float32 `[experts, rows]` in the weights' order of rows, or None.
        intermediate_size: Columns of the second GEMM.
        hidden_size: Columns of the first GEMM; more than the layer's where weights are padded.
    """

    shard: Shard
    layout: Layout
    tensors: Mapping[str, Tensor]
    gate: Tensor
    up: Tensor
    down: Tensor
    intermediate: Tensor
    bias1: Tensor | None
    bias2: Tensor | None
    intermediate_size: int
    hidden_size: int

    def take(self, experts: Sequence[int], shard: Shard) -> Prepared:
        """Return a shard with these experts of this one, by index; an index may be repeated."""
        index = torch.tensor(experts, device=self.gate.device)

        def pick(tensor: Tensor) -> Tensor:
            # As bytes, as not every quantized dtype can be indexed.
            return tensor.view(torch.uint8)[index].view(tensor.dtype)

        return replace(
            self,
            shard=shard,
            tensors={name: pick(tensor) for name, tensor in self.tensors.items()},
            gate=self.gate[index],
            up=self.up[index],
            down=self.down[index],
            intermediate=self.intermediate[index],
            bias1=None if self.bias1 is None else self.bias1[index],
            bias2=None if self.bias2 is None else self.bias2[index],
        )


def prepare(
    experts: Experts,
    kernel: KernelSpec,
    *,
    gated: bool,
    layout: str = "",
    shard: Shard | None = None,
    device: str = "cpu",
) -> Prepared:
    """Lay out a shard's experts for a kernel, one at a time.

    Raises:
        Unsupported: The kernel takes no such layout.
    """
    where = layout_of(kernel, layout)
    shard = shard or Shard.whole(len(experts))
    rows: dict[str, list[Tensor]] = {}
    factors: dict[str, list[float]] = {}
    hidden_size = intermediate_size = 0
    for number in shard.experts:
        expert = experts[number]
        hidden_size, intermediate_size = expert.gemm2.shape[-2:]
        for name, tensor in _tensors(expert, kernel, where, gated, device).items():
            rows.setdefault(name, []).append(tensor)
        first, last = _factors(expert.gemm1), _factors(expert.gemm2)
        scale = 1.0 if expert.intermediate_scale is None else expert.intermediate_scale
        for name, factor in (
            ("gate", first[0]),
            ("up", first[-1]),
            ("down", last[0]),
            ("intermediate", scale),
        ):
            factors.setdefault(name, []).append(factor)
    tensors = {name: torch.stack(parts) for name, parts in rows.items()}
    return Prepared(
        shard,
        where,
        bias1=tensors.pop("bias1", None),
        bias2=tensors.pop("bias2", None),
        tensors=tensors,
        **{name: torch.tensor(values, device=device) for name, values in factors.items()},
        intermediate_size=intermediate_size,
        hidden_size=hidden_size,
    )


def _tensors(
    expert: Expert, kernel: KernelSpec, layout: Layout, gated: bool, device: str
) -> dict[str, Tensor]:
    """One expert's weights, scales and biases, by argument."""
    found = {}
    for name, matrix, bias, halves in (
        ("gemm1", expert.gemm1, expert.bias1, gated),
        ("gemm2", expert.gemm2, expert.bias2, False),
    ):
        found[f"{name}_weights"] = layout.elements(matrix.data.to(device), halves)
        if kernel.weight_scales != "none":
            assert matrix.scales is not None
            found[f"{name}_{kernel.scale_argument}"] = layout.scales(
                matrix.scales.to(device), kernel, halves
            )
        if bias is not None:
            column = bias.to(device, torch.float32).unsqueeze(1)
            found[f"bias{name[-1]}"] = layout.rows(column, halves).squeeze(1)
    return found


def _factors(matrix: Quantized) -> list[float]:
    """Return the scale over a whole matrix: one, or one each of its upper and lower half."""
    height, width = matrix.format.block
    # Halves that were stacked are blocks of many rows; scales of single rows are no factor.
    whole = width == 0 and height != 1 and matrix.scales is not None
    factor = matrix.scales if whole else matrix.global_scale
    return [1.0] if factor is None else factor.flatten().tolist()
