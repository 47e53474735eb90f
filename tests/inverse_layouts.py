"""Inverses of `reference.layouts`, whose functions move elements one way."""

from __future__ import annotations

import torch


def deinterleave_rows(rows):
    """Gate0, up0, gate1, ..., as gpt-oss stores them, into `[gate; up]`."""
    return torch.cat((rows[..., 0::2, :], rows[..., 1::2, :]), -2)


def unshuffle_rows(rows, epilogue_tile=128):
    """Of blocks of 32 rows, or 16 for a tile of 64, new row `8b + a` is old row `4a + b`."""
    each = {64: 2, 128: 4}[epilogue_tile]
    blocks = torch.unflatten(rows, -2, (-1, each, 8))
    return blocks.transpose(-3, -2).flatten(-4, -2)


def row_major(blocks):
    """`[K / b, M, b]` into `[M, K]`."""
    return blocks.transpose(-3, -2).flatten(-2)


def unswizzle_scales(swizzled, rows, columns):
    """`[..., tiles * 512]` into `[..., rows, columns]`: scale by scale, by where each byte lies."""
    r, c = torch.arange(rows).unsqueeze(1), torch.arange(columns)
    tile = r // 128 * -(-columns // 4) + c // 4
    return swizzled[..., 512 * tile + 16 * (r % 32) + 4 * (r % 128 // 32) + c % 4]
