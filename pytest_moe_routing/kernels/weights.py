"""Experts' weights as each fused kernel wants them: row order, blocks of columns, scales.

A row of `KERNELS` is all that tells one entry point from another. Sources: FlashInfer 0.7.2.post1,
`csrc/trtllm_fused_moe_kernel_launcher.cu` (shapes, dtypes), `flashinfer/fused_moe/core.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.reference.layouts import (
    block_major,
    interleave_rows,
    shuffle_rows,
    swap_halves,
    swizzle_scales,
)
from pytest_moe_routing.reference.quantization import Quantized
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.weights import Expert, Experts


@dataclass(frozen=True)
class Layout:
    """Where the elements of a weight lie.

    Attributes:
        tile: Rows are shuffled for a GEMM epilogue of this many rows; 0 for not at all.
        interleaved: Before that, up and gate rows alternate.
        block_major: Columns lie in blocks of 128 bytes.
        arguments: What tells the kernel, where it can be told.
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
        """The stored elements of a weight, `[rows, columns]` or `[blocks, rows, width]`."""
        matrix = self.rows(matrix, gated)
        return block_major(matrix) if self.block_major else matrix.contiguous()


@dataclass(frozen=True)
class Kernel:
    """One fused entry point, as one quantization scheme uses it.

    Attributes:
        scheme: A key of `reference.moe.SCHEMES`.
        name: `<name>_moe` takes logits, `<name>_routed_moe` takes experts and weights.
        activations: Names of `reference.activation` that the newest release has kernels for.
        layouts: The layouts of weights that it takes; the first is what frameworks use.
        weight_scales: Whether weight scales stay as they are (`plain`) or follow the rows and are
            put in 128x4 tiles (`tiled`); empty where there are none.
        scale_dtype: What block scales are labelled as.
        input_scales: The input's scales lie by `token`, or by `block` (transposed); or empty.
        scalars: How the dequantization scalars are spelt: `scale` or `scales`; empty for none.
        biases: Whether experts may have biases.
        pairs_since: The release from which the routed twin takes `(ids, weights)` unpacked.
        arguments: Whatever else makes this entry point serve this scheme.
    """

    scheme: str
    name: str
    activations: tuple[str, ...]
    layouts: Mapping[str, Layout]
    weight_scales: str = ""
    scale_dtype: str = "uint8"
    input_scales: str = ""
    scalars: str = ""
    biases: bool = False
    pairs_since: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def function(self, routed: bool = False) -> str:
        return f"{self.name}_routed_moe" if routed else f"{self.name}_moe"


_SHUFFLED = Layout(128, interleaved=True)
_BLOCKS = Layout(128, interleaved=True, block_major=True)
#: Numbers of `Fp8QuantizationType` and `WeightLayout`, which have never moved.
_DEEPSEEK_FP8, _MX_FP8 = 1, 2
_MAJOR_K, _BLOCK_MAJOR_K = 0, 2


def _told(layout: Layout, weight_layout: int) -> Layout:
    told = {"use_shuffled_weight": layout.tile > 0, "weight_layout": weight_layout}
    return Layout(layout.tile, layout.interleaved, layout.block_major, told)


_FP4 = {"weight_scales": "tiled", "scale_dtype": "float8_e4m3fn", "biases": True}

KERNELS: Mapping[str, Kernel] = {
    k.scheme: k
    for k in (
        Kernel(
            "fp8_per_tensor",
            "trtllm_fp8_per_tensor_scale",
            ("silu", "relu2", "swiglustep"),
            {"shuffled": _SHUFFLED},
            scalars="scales",
            pairs_since="0.6.18",
        ),
        Kernel(
            "fp8_block",
            "trtllm_fp8_block_scale",
            ("silu",),
            {
                "plain": _told(Layout(), _MAJOR_K),
                "shuffled": _told(Layout(64), _MAJOR_K),
                "blocks": _told(Layout(64, block_major=True), _BLOCK_MAJOR_K),
            },
            weight_scales="plain",
            scale_dtype="float32",
            input_scales="block",
            pairs_since="0.6.18",
            arguments={"fp8_quantization_type": _DEEPSEEK_FP8},
        ),
        Kernel(
            "mxfp8",
            "trtllm_fp8_block_scale",
            ("silu", "relu2", "gelu", "swigluoai", "swiglustep"),
            {"shuffled": _told(_SHUFFLED, _MAJOR_K)},
            weight_scales="tiled",
            input_scales="token",
            pairs_since="0.6.18",
            arguments={"fp8_quantization_type": _MX_FP8},
        ),
        Kernel(
            "nvfp4",
            "trtllm_fp4_block_scale",
            ("silu", "relu2", "gelu", "swigluoai", "swiglustep"),
            {"shuffled": _SHUFFLED},
            input_scales="token",
            scalars="scale",
            pairs_since="0.6.12",
            **_FP4,  # type: ignore[arg-type]
        ),
        Kernel(
            "mxfp4",
            "trtllm_fp4_block_scale",
            ("silu", "gelu", "swigluoai"),
            {"shuffled": _SHUFFLED},
            input_scales="token",
            pairs_since="0.6.12",
            **_FP4,  # type: ignore[arg-type]
        ),
        Kernel(
            "mxfp4_bf16",
            "trtllm_fp4_block_scale",
            ("silu", "swigluoai"),
            {"shuffled": _SHUFFLED},
            pairs_since="0.6.12",
            **_FP4,  # type: ignore[arg-type]
        ),
        Kernel(
            "bf16",
            "trtllm_bf16",
            ("silu", "relu2", "swigluoai", "swiglustep"),
            {"blocks": _told(_BLOCKS, _BLOCK_MAJOR_K)},
            pairs_since="0.6.18",
        ),
        Kernel(
            "mxint4",
            "trtllm_mxint4_block_scale",
            ("silu",),
            {"blocks": _BLOCKS},
            weight_scales="tiled",
            scale_dtype="bfloat16",
        ),
    )
}


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

    def take(self, experts: Sequence[int], shard: Shard) -> Prepared:
        """A shard whose experts are these of this one, by place; some may come several times."""
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
    kernel: Kernel,
    *,
    gated: bool,
    layout: Layout | None = None,
    shard: Shard | None = None,
    device: str = "cpu",
) -> Prepared:
    """Lay out a shard's experts for a kernel, one at a time."""
    layout = layout or next(iter(kernel.layouts.values()))
    shard = shard or Shard.whole(len(experts))
    rows: dict[str, list[Tensor]] = {}
    factors: dict[str, list[float]] = {}
    for number in shard.experts:
        expert = experts[number]
        for name, tensor in _tensors(expert, kernel, layout, gated, device).items():
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
        layout,
        bias1=tensors.pop("bias1", None),
        bias2=tensors.pop("bias2", None),
        tensors=tensors,
        **{name: torch.tensor(values, device=device) for name, values in factors.items()},
        intermediate_size=experts[shard.experts.start].gemm2.shape[-1],
    )


def _tensors(
    expert: Expert, kernel: Kernel, layout: Layout, gated: bool, device: str
) -> dict[str, Tensor]:
    """One expert's weights, scales and biases, by argument."""
    found = {}
    for name, matrix, bias, halves in (
        ("gemm1", expert.gemm1, expert.bias1, gated),
        ("gemm2", expert.gemm2, expert.bias2, False),
    ):
        found[f"{name}_weights"] = layout.elements(matrix.data.to(device), halves)
        if kernel.weight_scales:
            assert matrix.scales is not None
            found[f"{name}_weights_scale"] = _scales(
                matrix.scales.to(device), kernel, layout, halves
            )
        if bias is not None:
            column = bias.to(device, torch.float32).unsqueeze(1)
            found[f"bias{name[-1]}"] = layout.rows(column, halves).squeeze(1)
    return found


def _scales(scales: Tensor, kernel: Kernel, layout: Layout, gated: bool) -> Tensor:
    if kernel.weight_scales == "plain":
        return (swap_halves(scales) if gated else scales).contiguous()
    tiled = swizzle_scales(layout.rows(scales, gated)).view(getattr(torch, kernel.scale_dtype))
    # Tiles are kept under the logical shape, from which FP4 kernels tell the block size.
    return tiled.view(-1, scales.shape[-1])


def _factors(matrix: Quantized) -> list[float]:
    """The scale over a whole matrix: one, or those of its upper and of its lower half."""
    whole = matrix.format.block[1] == 0 and matrix.scales is not None
    factor = matrix.scales if whole else matrix.global_scale
    return [1.0] if factor is None else factor.flatten().tolist()
