"""How the simulated kernels find the elements of a weight in memory: by address.

Written from the documentation of the layouts, element by element, and on purpose without the
functions that `kernels/weights.py` lays weights out with: an element that went to the wrong place,
or was scaled by another block's scale, is read as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import NotSimulated
from pytest_moe_routing.reference.quantization import find_format
from pytest_moe_routing.schemes import kernel_of, storage_of


@dataclass(frozen=True)
class Memory:
    """What a kernel takes for granted about its weights.

    Attributes:
        element: `e4m3`, `e2m1`, `int4` or `bf16`.
        scales: `none`, `square` (float32, 128 x 128), `tiles` (128x4 tiles of scales of one row and
            `block` columns), `rows` (one for each row, where the row lies), or `linear`, which no
            kernel uses and a stale caller might.
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


def check_memory(names: Mapping[str, Any], memory: Memory, scale_argument: str) -> None:
    """Check that weights and scales hold what the kernel reads from them.

    Launchers check few of these sizes: a tensor that is too small is read beyond its end.

    Raises:
        NotSimulated: A tensor has another number of elements.
    """
    dtype = {"e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}.get(memory.element, torch.uint8)
    packing = 2 if memory.element in ("e2m1", "int4") else 1
    hidden, inner = names["hidden"], names["intermediate_size"]
    for name, high, wide in (("gemm1", names["halves"] * inner, hidden), ("gemm2", hidden, inner)):
        expected = {f"{name}_weights": high * (wide // packing)}
        if memory.scales == "square":
            expected[f"{name}_{scale_argument}"] = high // 128 * (wide // 128)
        elif memory.scales == "rows":
            expected[f"{name}_{scale_argument}"] = high
        elif memory.scales != "none":
            tiles = -(-high // 128) * -(-wide // (4 * memory.block))
            expected[f"{name}_{scale_argument}"] = tiles * 512
        for argument, size in expected.items():
            tensor = names[argument]
            if tensor is None or tensor.shape[0] != names["total"] or tensor[0].numel() != size:
                shape = None if tensor is None else list(tensor.shape)
                raise NotSimulated(
                    f"{argument}: found {shape}, expected {names['total']} experts of {size} "
                    "elements; FlashInfer does not check it, and the kernel reads other memory"
                )
        if names[f"{name}_weights"].dtype != dtype:
            raise NotSimulated(
                f"{name}_weights: found {names[f'{name}_weights'].dtype}, expected {dtype}"
            )


def raw(tensor: Tensor) -> Tensor:
    """Return a tensor as a kernel sees it that takes its address and shape, and no strides."""
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
        # 16. Neighbors lie eight rows apart.
        within, each = place % memory.shuffled, memory.shuffled // 8
        place = place - within + within % each * 8 + within // each
    return place


def read_weight(weight: Tensor, scales: Tensor | None, gated: bool, memory: Memory) -> Tensor:
    """One expert's weight, rows in logical order, times its block scales: float32 `[M, K]`."""
    weight = raw(weight)
    rows = weight.shape[-2]
    place = stored_rows(rows, gated, memory)
    if memory.blocked:
        # Element (m, k) lies at [k / b, m, k % b], whatever shape the tensor is given.
        weight = weight.reshape(-1, rows, 128 // weight.element_size())
        stored = weight.index_select(1, place).transpose(0, 1).reshape(rows, -1)
    else:
        stored = weight.index_select(0, place)
    values = decode(stored, memory.element)
    if memory.scales == "none" or scales is None:
        return values
    columns = values.shape[1]
    flat, bytes_ = raw(scales).flatten(), memory.scale
    if memory.scales == "rows":
        return values * decode_scale(flat[place], bytes_).unsqueeze(1)
    count = columns // memory.block
    row, column = place.unsqueeze(1), torch.arange(count).unsqueeze(0)
    if memory.scales == "square":
        plain = replace(memory, shuffled=0, interleaved=False)
        row = stored_rows(rows, gated, plain).unsqueeze(1) // 128
        address = row * count + column
    elif memory.scales == "linear":
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
    return (
        _BYTES[element]
        .index_select(0, stored.flatten().to(torch.int32))
        .view(*stored.shape[:-1], -1)
    )


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
#: The two elements of each byte.
_BYTES = {
    element: torch.stack((values.repeat(16), values.repeat_interleave(16)), 1)
    for element, values in _NIBBLES.items()
}
