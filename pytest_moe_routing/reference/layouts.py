"""How quantized tensors lie in memory: packing, row orders, block-major K, swizzled scales.

Every function moves elements and changes none, works on the last two dimensions `[rows, columns]`
of any dtype. Semantics of FlashInfer 0.7.2.post1 (`flashinfer/utils.py`,
`flashinfer/quantization/fp4_quantization.py`) and of cuBLAS' 128x4 scale layout.

    [gate; up] of a checkpoint
      -> swap_halves -> [up; gate] -> interleave_rows -> up0, gate0, up1, gate1, ...
      -> shuffle_rows -> rows as the GEMM's epilogue reads them -> block_major -> columns in blocks
"""

from __future__ import annotations

import torch
from torch import Tensor, unflatten

from pytest_moe_routing.errors import QuantizationError

#: A block of rows that is transposed when shuffling, by the GEMM's epilogue tile.
_SHUFFLED_BLOCKS = {64: (8, 2), 128: (8, 4)}

#: A tile of swizzled scales: 128 rows by 4 columns, 512 bytes.
_TILE_ROWS, _TILE_COLUMNS = 128, 4

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def _check_multiple(what: str, size: int, of: int) -> None:
    if size % of:
        raise QuantizationError(f"{what}: found {size}, expected a multiple of {of}")


def pack_nibbles(codes: Tensor) -> Tensor:
    """Pack 4-bit codes `[..., columns]` into uint8 `[..., columns / 2]`, even columns low.

    Raises:
        QuantizationError: an odd number of columns, or codes that are not uint8.
    """
    if codes.dtype != torch.uint8:
        raise QuantizationError(f"4-bit codes: found {codes.dtype}, expected torch.uint8")
    _check_multiple("columns of 4-bit codes", codes.shape[-1], 2)
    return (codes[..., 0::2] & 15) | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Inverse of `pack_nibbles`: uint8 codes 0..15, `[..., 2 * bytes]`."""
    if packed.dtype != torch.uint8:
        raise QuantizationError(f"packed 4-bit codes: found {packed.dtype}, expected torch.uint8")
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)


def swap_halves(rows: Tensor) -> Tensor:
    """Swap the upper and lower half of the rows: `[gate; up]` <-> `[up; gate]`. Its own inverse.

    Checkpoints and vLLM keep w1 (gate) first; FlashInfer's kernels want w3 (up) first.
    """
    _check_multiple("rows of a gated weight", rows.shape[-2], 2)
    first, second = rows.chunk(2, -2)
    return torch.cat((second, first), -2)


def interleave_rows(rows: Tensor) -> Tensor:
    """Alternate the rows of both halves: r0, r[M/2], r1, r[M/2 + 1], ...

    A gated epilogue finds the two factors of one output next to each other.
    """
    _check_multiple("rows of a gated weight", rows.shape[-2], 2)
    return torch.stack(rows.chunk(2, -2), -2).flatten(-3, -2)


def interleave_groups(rows: Tensor, group: int) -> Tensor:
    """Rows of two halves in turns: `group` of the first half, then as many of the second.

    What FlashInfer's CuteDSL kernels read of up and gate rows, in groups of 64
    (`_interleave_linear_and_gate` in fused_moe/prepare.py of 0.7.2.post1).
    """
    _check_multiple("rows of both halves", rows.shape[-2], 2 * group)
    halves = unflatten(rows, -2, (2, -1, group))
    return halves.transpose(-4, -3).reshape(rows.shape)


def shuffle_rows(rows: Tensor, epilogue_tile: int = 128) -> Tensor:
    """Reorder rows within blocks for the GEMM's epilogue, as FlashInfer's `shuffle_matrix_a`.

    Each block of 32 rows (tile 128), seen as 8 x 4, is transposed: old row `4a + b` becomes new
    row `8b + a`. A block of 16 (tile 64) is 8 x 2.

    Raises:
        QuantizationError: rows do not fill blocks, or there is no such tile.
    """
    threads, each = _block(rows, epilogue_tile)
    return unflatten(rows, -2, (-1, threads, each)).transpose(-3, -2).flatten(-4, -2)


def _block(rows: Tensor, epilogue_tile: int) -> tuple[int, int]:
    if epilogue_tile not in _SHUFFLED_BLOCKS:
        valid = ", ".join(map(str, _SHUFFLED_BLOCKS))
        raise QuantizationError(f"epilogue tile: found {epilogue_tile}, expected one of {valid}")
    block = _SHUFFLED_BLOCKS[epilogue_tile]
    _check_multiple("rows to shuffle", rows.shape[-2], block[0] * block[1])
    return block


def block_major(matrix: Tensor, block_bytes: int = 128) -> Tensor:
    """Cut columns into blocks that lie one after another: `[M, K]` -> `[K / b, M, b]`.

    `b` is `block_bytes` over the element size, so bfloat16 has blocks of 64 columns and packed
    4-bit codes (uint8) have blocks of 256 codes. FlashInfer's `convert_to_block_layout`.
    """
    size = block_bytes // matrix.element_size()
    _check_multiple("columns of a block-major matrix", matrix.shape[-1], size)
    return unflatten(matrix, -1, (-1, size)).transpose(-3, -2).contiguous()


def swizzle_scales(scales: Tensor) -> Tensor:
    """Block scales `[rows, columns]` as 128x4 tiles, flat, padded with zeros to whole tiles.

    Tiles follow each other along the columns first. In a tile, byte `16 * (r % 32) + 4 * (r // 32)
    + c` holds the scale of row r and column c. Leading dimensions stay, so each expert is flat.
    """
    rows, columns = scales.shape[-2:]
    pad = (0, -columns % _TILE_COLUMNS, 0, -rows % _TILE_ROWS)
    # Bytes, as float8 has no padding kernel; zero has the same bits in every scale format.
    raw = scales.contiguous().view(_BITS[scales.element_size()])
    tiles = torch.nn.functional.pad(raw, pad)
    tiles = unflatten(unflatten(tiles, -1, (-1, _TILE_COLUMNS)), -3, (-1, 4, 32))
    # [row tile, r // 32, r % 32, column tile, c] -> [row tile, column tile, r % 32, r // 32, c]
    at = scales.ndim - 2
    order = (*range(at), at, at + 3, at + 2, at + 1, at + 4)
    return tiles.permute(order).flatten(at).view(scales.dtype)


def interleave_for_hopper(packed: Tensor) -> Tensor:
    """Reorder packed 4-bit codes, uint8 `[rows, columns / 2]`, for Hopper's mixed-input GEMM.

    Four bytes of a pair of rows (r, r + 8) and of columns (c, c + 4) become neighbors. FlashInfer's
    `interleave_moe_weights_for_sm90_mixed_gemm` (csrc/nv_internal/tensorrt_llm/kernels/
    cutlass_kernels/moe_gemm/moe_gemm_mixed_utils.cu) moves bytes so for `fp4`, and then permutes
    the bits of each four, which this does not.
    """
    _check_multiple("rows of a weight", packed.shape[-2], 16)
    _check_multiple("bytes of a row", packed.shape[-1], 32)
    size = 16 * packed.shape[-1]
    places = unflatten(torch.arange(size, device=packed.device), 0, (2, 8, -1, 2, 2, 2, 4))
    # [row half, r, 32 bytes, lane / 8, to row half, column half, c]; moving single bytes by a
    # permutation takes more than twice as long.
    order = places.permute(4, 1, 2, 3, 6, 5, 0).flatten()
    rows = packed.reshape(-1, size).view(_BITS[packed.element_size()])
    return rows.index_select(1, order).view(packed.dtype).view(packed.shape)


def fold_scales(scales: Tensor, groups: int = 4) -> Tensor:
    """Fold block scales of one byte, `[rows, columns]`, for Hopper's mixed-input GEMM.

    Scales of 64 rows and of 128 elements of each become rows of 16 bytes. FlashInfer 0.7.2's
    `interleave_moe_scales_for_sm90_mixed_gemm`; most releases before 0.6.18 fold otherwise.

    Args:
        groups: Scales of 128 elements of a row.

    Returns:
        `[rows / 64, columns / groups, 4 * groups, 16]`.
    """
    _check_multiple("rows of scales", scales.shape[-2], 64)
    _check_multiple("columns of scales", scales.shape[-1], groups)
    slices = 16 // groups
    raw = scales.contiguous().view(torch.uint8)
    blocks = unflatten(unflatten(raw, -1, (-1, groups)), -3, (-1, slices, 64 // slices))
    # [64 rows, slice, r, columns, c] -> [64 rows, columns, r, slice, c]
    at = scales.ndim - 2
    order = (*range(at), *(at + place for place in (0, 3, 2, 1, 4)))
    return blocks.permute(order).flatten(-2).contiguous()
