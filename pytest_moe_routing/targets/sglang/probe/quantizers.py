"""Stand-ins for what quantizes tensors on a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.flashinfer import preparation
from pytest_moe_routing.targets import marked_weights, scales
from pytest_moe_routing.targets.sglang.probe.requests import MARKED, requested


def quantizers() -> dict[str, Any]:
    """Quantized tensors, as to shape and dtype."""
    e4m3 = torch.float8_e4m3fn

    def fp8_groups(
        x: Tensor, group: int, *_: Any, column_major_scales: bool = False, **__: Any
    ) -> tuple[Tensor, Tensor]:
        rows, columns = len(x), x.shape[1] // group
        blocks = _scales_of(x, group, torch.ones(rows, columns, dtype=torch.float32))
        return x.to(e4m3), blocks.t().contiguous().t() if column_major_scales else blocks

    def groups(
        x: Tensor, group_size: int, *_: Any, scale_ue8m0: bool = False, **__: Any
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.uint8 if scale_ue8m0 else torch.float32
        ones = torch.ones(*x.shape[:-1], x.shape[-1] // group_size, dtype=dtype)
        return x.to(e4m3), _scales_of(x, group_size, ones)

    def fp8_tensor(x: Tensor, scale: Any = None, *_: Any, **__: Any) -> tuple[Tensor, Any]:
        scales.note(scale)
        is_exact = requested(MARKED) is not None and isinstance(scale, Tensor)
        return (x.float() / scale if is_exact else x).to(e4m3), scale

    def mxfp8(x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        width, is_tiled = preparation.mxfp8_scales(x, *args, **options)
        zeros = torch.zeros(x.numel() // width, dtype=torch.uint8)
        return x.to(e4m3), _scales_of(x, width, zeros, is_tiled=is_tiled)

    def fp4(x: Tensor, scale: Any = None, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        scales.note(scale)
        packed = torch.zeros(len(x), x.shape[1] // 2, dtype=torch.uint8)
        width, is_tiled = preparation.fp4_scales(x, scale, *args, **options)
        zeros = torch.zeros(x.numel() // width, dtype=torch.uint8)
        return packed, _scales_of(x, width, zeros, is_tiled=is_tiled)

    return {
        "per_tensor_dequantize": lambda x, scale: x.to(torch.float16) * scale,
        "per_token_group_quant": groups,
        "per_token_group_quant_fp8": fp8_groups,
        "scaled_fp8_quant": fp8_tensor,
        "flashinfer_mxfp8_quantize": mxfp8,
        "mxfp8_quantize": mxfp8,
        "fp4_quantize": fp4,
        "scaled_fp4_quant": fp4,
    }


def _scales_of(x: Tensor, width: int, absent: Tensor, *, is_tiled: bool = False) -> Tensor:
    """Return the scales of activations, whose order matters only where it is asked for."""
    if requested(MARKED) is None:
        return absent
    return marked_weights.activation_scales(len(x), x.shape[1] // width, absent.dtype, is_tiled)
