"""How the simulated kernels find the elements of a weight in memory: by address.

Written from the documentation of the layouts, element by element, and on purpose without the
functions that `kernels/weights.py` lays weights out with: an element that went to the wrong place,
or was scaled by another block's scale, is read as such.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_moe_routing.reference.quantization import find_format
from pytest_moe_routing.schemes import kernel_of, storage_of


@dataclass(frozen=True)
class Memory:
    """What a kernel takes for granted about its weights.

    Attributes:
        element: `e4m3`, `e2m1`, `int4` or `bf16`.
        scales: `none`, `square` (float32, 128 x 128), `tiles` (128x4 tiles of scales of one row and
            `block` columns), or `linear`, which no kernel uses and a stale caller might.
        scale: How a scale is stored: `float32`, `e4m3`, `ue8m0` or `bf16`.
        block: Columns that share a scale.
        shuffled: Rows are shuffled in blocks of this many, 0 for none.
        interleaved: Up and gate rows alternate.
        up_first: Otherwise gate rows come before up rows.
        blocked: Columns lie in blocks of 128 bytes.
    """

    element: str
    scales: str = "none"
    scale: str = "float32"
    block: int = 0
    shuffled: int = 32
    interleaved: bool = True
    up_first: bool = True
    blocked: bool = False


def memory_of(scheme: str, layout: str) -> Memory:
    """Return what the kernel of a scheme takes for granted about weights in a layout.

    Names alone come from the scheme's row; where they put an element is said in this module.
    """
    kernel, weight = kernel_of(scheme), find_format(storage_of(scheme).weight)
    shuffled = layout != "plain"
    return Memory(
        weight.element,
        kernel.weight_scales,
        weight.scale,
        weight.block[1],
        # A fused activation has an epilogue of 128 rows, made of 32s; 64 rows are made of 16s.
        shuffled=(32 if kernel.fused_activation else 16) if shuffled else 0,
        interleaved=shuffled and kernel.fused_activation,
        blocked=layout == "blocks",
    )


def raw(tensor: Tensor) -> Tensor:
    """A tensor as a kernel sees it that takes its address and its shape, and no strides."""
    strides, step = [], 1
    for size in reversed(tensor.shape):
        strides.append(step)
        step *= size
    return tensor.as_strided(tensor.shape, strides[::-1])


def stored_rows(rows: int, gated: bool, memory: Memory) -> Tensor:
    """Where each row lies: up rows then gate rows, or rows as they are; int64 `[rows]`."""
    place = torch.arange(rows)
    half = rows // 2
    if gated and not memory.up_first:
        place = (place + half) % rows
    if gated and memory.interleaved:
        place = 2 * (place % half) + place // half
    if memory.shuffled:
        # FlashInfer's row map: 0, 8, 16, 24, 1, 9, ... in a block of 32; 0, 8, 1, 9, ... in one of
        # 16. Eight rows apart lie neighbours.
        within, each = place % memory.shuffled, memory.shuffled // 8
        place = place - within + within % each * 8 + within // each
    return place


def read_weight(weight: Tensor, scales: Tensor | None, gated: bool, memory: Memory) -> Tensor:
    """One expert's weight, rows in logical order, times its block scales: float32 `[M, K]`."""
    weight = raw(weight)
    rows = weight.shape[-2]
    place = stored_rows(rows, gated, memory)
    if memory.blocked:
        # Element (m, k) lies at [k / b, m, k % b].
        stored = weight.index_select(1, place).transpose(0, 1).reshape(rows, -1)
    else:
        stored = weight.index_select(0, place)
    values = decode(stored, memory.element)
    if memory.scales == "none" or scales is None:
        return values
    columns = values.shape[1]
    flat, bytes_ = raw(scales).flatten(), memory.scale
    if memory.scales == "square":
        row = stored_rows(rows, gated, replace(memory, shuffled=0, interleaved=False)) // 128
        column = torch.arange(columns) // 128
        real = flat[row.unsqueeze(1) * (columns // 128) + column]
        return values * real
    count = columns // memory.block
    row, column = place.unsqueeze(1), torch.arange(count).unsqueeze(0)
    if memory.scales == "linear":
        address = row * count + column
    else:
        tile = row // 128 * -(-count // 4) + column // 4
        address = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    real = decode_scale(flat[address], bytes_)
    return (values.view(rows, count, -1) * real.unsqueeze(2)).view(rows, columns)


def decode(stored: Tensor, element: str) -> Tensor:
    """Elements as float32; two to a byte, the lower nibble first, where they have four bits."""
    if element in ("e4m3", "bf16"):
        return stored.to(torch.float32)
    byte = stored.to(torch.int64)
    code = torch.stack((byte & 15, byte >> 4), -1).flatten(-2)
    return _NIBBLES[element][code]


def decode_scale(stored: Tensor, scale: str) -> Tensor:
    """Block scales as float32."""
    if scale == "ue8m0":
        return torch.exp2(stored.view(torch.uint8).to(torch.float32) - 127)
    if scale == "e4m3":
        return stored.view(torch.float8_e4m3fn).to(torch.float32)
    return stored.to(torch.float32)


def _e2m1(code: int) -> float:
    """Sign, two bits of exponent with bias 1, one bit of mantissa; no infinity and no NaN."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if sign else size


_NIBBLES = {
    "e2m1": torch.tensor([_e2m1(code) for code in range(16)]),
    "int4": torch.tensor([float((code ^ 8) - 8) for code in range(16)]),
}
