"""FlashInfer's functions that bring weights and scales into the order of its kernels, on a CPU.

Names, parameters and defaults are those of flashinfer-python 0.7.2.post1 (`fused_moe/core.py`,
`utils.py`, `quantization/fp4_quantization.py`, `quantization/fp8_quantization.py`); what they do
has been the same since 0.5. Those whose name starts with `quantize` have the flags for the order of
scales that the functions of that kind have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.reference.layouts import (
    block_major,
    fold_scales,
    interleave_for_hopper,
    interleave_rows,
    shuffle_rows,
    swizzle_scales,
)


def _require(what: str, size: int, of: int) -> None:
    """Raise what FlashInfer raises, whose message does not always have the sizes."""
    if size % of:
        raise AssertionError(f"{what}: found {size}, expected a multiple of {of}")


def _require_tiles(scales: Tensor) -> None:
    _require("rows of scales", len(scales), 128)


def _shuffled(rows: Tensor, epilogue_tile_m: int) -> Tensor:
    _require("rows to shuffle", len(rows), 32 if epilogue_tile_m % 128 == 0 else 16)
    return shuffle_rows(rows, epilogue_tile_m)


def _numbers(rows: Tensor) -> Tensor:
    return torch.arange(len(rows)).unsqueeze(1)


def shuffle_matrix_a(input_tensor: Tensor, epilogue_tile_m: int) -> Tensor:
    return _shuffled(input_tensor, epilogue_tile_m)


def shuffle_matrix_sf_a(
    input_tensor: Tensor, epilogue_tile_m: int, num_elts_per_sf: int = 16
) -> Tensor:
    return swizzle_scales(input_tensor[scale_indices(input_tensor, epilogue_tile_m)])


def reorder_rows_for_gated_act_gemm(x: Tensor) -> Tensor:
    return interleave_rows(x)


def reorder_indices(x: Tensor) -> Tensor:
    return interleave_rows(_numbers(x)).squeeze(1)


def shuffle_indices(
    input_tensor: Tensor, epilogue_tile_m: int, num_elts_per_sf: int = 16
) -> Tensor:
    return _shuffled(_numbers(input_tensor), epilogue_tile_m).squeeze(1)


def scale_indices(input_tensor: Tensor, epilogue_tile_m: int, num_elts_per_sf: int = 16) -> Tensor:
    _require_tiles(input_tensor)
    return shuffle_indices(input_tensor, epilogue_tile_m)


def w3_w1_indices(
    _cache_permute_indices: dict[Any, Tensor],
    dst_w3_w1_weight: Tensor,
    epilogue_tile_m: int,
    num_elts_per_sf: int | None = None,
    is_gated_act_gemm: bool = True,
) -> Tensor:
    if num_elts_per_sf is not None:
        _require_tiles(dst_w3_w1_weight)
    key = "w3_w1", len(dst_w3_w1_weight), epilogue_tile_m, is_gated_act_gemm
    if key not in _cache_permute_indices:
        numbers = _numbers(dst_w3_w1_weight)
        numbers = interleave_rows(numbers) if is_gated_act_gemm else numbers
        _cache_permute_indices[key] = _shuffled(numbers, epilogue_tile_m).squeeze(1)
    return _cache_permute_indices[key]


def w2_indices(
    _cache_permute_indices: dict[Any, Tensor],
    dst_w2_weight: Tensor,
    epilogue_tile_m: int,
    num_elts_per_sf: int | None = None,
    is_gated_act_gemm: bool | None = None,
) -> Tensor:
    if num_elts_per_sf is not None:
        _require_tiles(dst_w2_weight)
    key = "w2", len(dst_w2_weight), epilogue_tile_m
    if key not in _cache_permute_indices:
        _cache_permute_indices[key] = shuffle_indices(dst_w2_weight, epilogue_tile_m)
    return _cache_permute_indices[key]


def convert_to_block_layout(input_tensor: Tensor, blockK: int) -> Tensor:  # noqa: N803
    _require("columns of a block-major matrix", input_tensor.shape[-1], blockK)
    return block_major(input_tensor, blockK * input_tensor.element_size())


def block_scale_interleave(unswizzled_sf: Tensor, *, out: Tensor | None = None) -> Tensor:
    return swizzle_scales(unswizzled_sf).flatten()


def convert_sf_to_mma_layout(
    sf: Tensor, m: int, k: int, num_groups: int = 1, sf_vec_size: int = 16
) -> Tensor:
    """View scales in 128x4 tiles as `[32, 4, m tiles, 4, k tiles, groups]`.

    `flashinfer/cute_dsl/utils.py`.

    Raises:
        ValueError: There are not as many scales as in whole tiles.
    """
    tiles = -(-m // 128), -(-k // sf_vec_size // 4)
    if sf.numel() != num_groups * tiles[0] * tiles[1] * 512:
        raise ValueError(f"scales do not fill {num_groups} times {tiles[0]}x{tiles[1]} tiles")
    return sf.reshape(num_groups, *tiles, 32, 4, 4).permute(3, 4, 1, 5, 2, 0)


def interleave_weights_for_hopper(weight: Tensor, quant_type: str = "fp4") -> Tensor:
    return interleave_for_hopper(weight)


def interleave_scales_for_hopper(scales: Tensor, group_size: int = 32) -> Tensor:
    return fold_scales(scales, 128 // group_size)


def residual(raw_scale: Tensor) -> Tensor:
    """Return the factor that Humming's kernel applies to each expert: its least exponent's."""
    return torch.exp2(raw_scale.flatten(1).amin(1).float() - 127) / 2


def humming_for_hopper(weight: Tensor, raw_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leave payloads and exponents as they are.

    FlashInfer's clamps exponents to a range, and rewrites payloads whose exponents it moved.
    """
    return interleave_for_hopper(weight), fold_scales(raw_scale), residual(raw_scale)


#: What orders weights and scales for the mixed-input GEMM on Hopper, by FlashInfer's names.
HOPPER: Mapping[str, Callable[..., Tensor]] = {
    "interleave_moe_weights_for_sm90_mixed_gemm": interleave_weights_for_hopper,
    "interleave_moe_scales_for_sm90_mixed_gemm": interleave_scales_for_hopper,
}
#: Those functions, by FlashInfer's names.
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "shuffle_matrix_a": shuffle_matrix_a,
    "shuffle_matrix_sf_a": shuffle_matrix_sf_a,
    "reorder_rows_for_gated_act_gemm": reorder_rows_for_gated_act_gemm,
    "get_reorder_rows_for_gated_act_gemm_row_indices": reorder_indices,
    "get_shuffle_matrix_a_row_indices": shuffle_indices,
    "get_shuffle_matrix_sf_a_row_indices": scale_indices,
    "_maybe_get_cached_w3_w1_permute_indices": w3_w1_indices,
    "get_w2_permute_indices_with_cache": w2_indices,
    "convert_to_block_layout": convert_to_block_layout,
    "block_scale_interleave": block_scale_interleave,
    "nvfp4_block_scale_interleave": block_scale_interleave,
    **HOPPER,
    "preprocess_moe_weights_for_sm90_mixed_gemm_humming": humming_for_hopper,
}


def fp4_scales(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    **_: Any,
) -> tuple[int, bool]:
    """Return the columns that share a scale and whether scales lie in tiles, of `fp4_quantize`."""
    return sf_vec_size, is_sf_swizzled_layout


def mxfp8_scales(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    **_: Any,
) -> tuple[int, bool]:
    """Return the same of `mxfp8_quantize`."""
    return 32, is_sf_swizzled_layout
