"""Layouts: each has an inverse, and agrees with flashinfer's and torchao's pure-torch helpers."""

import inverse_layouts
import pytest
import torch
from independent import independent

from pytest_moe_routing.errors import QuantizationError
from pytest_moe_routing.flashinfer import preparation
from pytest_moe_routing.logits import integers
from pytest_moe_routing.reference import layouts


def numbered(*shape, dtype=torch.uint8):
    """Every element another number, as far as the dtype goes."""
    return torch.arange(torch.Size(shape).numel()).view(shape).to(dtype)


def noise(*shape):
    return integers(*shape, seed=11, bits=8).to(torch.uint8)


PAIRS = [
    (layouts.swap_halves, layouts.swap_halves),
    (layouts.interleave_rows, inverse_layouts.deinterleave_rows),
    (layouts.shuffle_rows, inverse_layouts.unshuffle_rows),
    (lambda w: layouts.shuffle_rows(w, 64), lambda w: inverse_layouts.unshuffle_rows(w, 64)),
    (layouts.block_major, inverse_layouts.row_major),
    (layouts.unpack_nibbles, layouts.pack_nibbles),
    (layouts.swizzle_scales, lambda s: inverse_layouts.unswizzle_scales(s, 256, 384)),
]


@pytest.mark.parametrize(("there", "back"), PAIRS)
@pytest.mark.parametrize("experts", [(), (3,)])
def test_there_and_back_is_nothing(there, back, experts):
    matrix = noise(*experts, 256, 384)
    moved = there(matrix)
    assert not (moved.shape == matrix.shape and torch.equal(moved, matrix))
    assert torch.equal(back(moved), matrix)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("there", "back"), PAIRS[:5])
def test_any_dtype_can_be_laid_out(there, back, dtype):
    matrix = (noise(64, 256) & 63).to(torch.float32).to(dtype)
    there_and_back = back(there(matrix))
    assert there_and_back.dtype == dtype
    assert torch.equal(there_and_back.view(torch.uint8), matrix.view(torch.uint8))


def test_groups_of_both_halves_in_turns():
    rows = layouts.interleave_groups(numbered(8, 1), 2).flatten().tolist()
    assert rows == [0, 1, 4, 5, 2, 3, 6, 7]
    assert layouts.interleave_groups(numbered(4, 1), 2).flatten().tolist() == [0, 1, 2, 3]


def test_scales_in_tiles_as_cutedsl_kernels_see_them():
    """The place that `convert_sf_to_mma_layout` documents: [m % 32, m % 128 // 32, m // 128, ...]."""
    scales = numbered(2 * 256, 8).to(torch.int32)
    tiles = torch.stack([layouts.swizzle_scales(each) for each in scales.chunk(2)])
    view = preparation.convert_sf_to_mma_layout(tiles, m=256, k=128, num_groups=2)
    assert view.shape == (32, 4, 2, 4, 2, 2)
    assert view.data_ptr() == tiles.data_ptr()
    assert view[5, 2, 1, 3, 1, 1] == scales[256 + 128 + 2 * 32 + 5, 4 + 3]
    with pytest.raises(ValueError, match="scales do not fill 1 times 2x2 tiles"):
        preparation.convert_sf_to_mma_layout(tiles, m=256, k=128)


def test_layouts_by_hand():
    assert layouts.swap_halves(numbered(4, 1)).flatten().tolist() == [2, 3, 0, 1]
    assert layouts.interleave_rows(numbered(4, 1)).flatten().tolist() == [0, 2, 1, 3]
    assert inverse_layouts.deinterleave_rows(numbered(4, 1)).flatten().tolist() == [0, 2, 1, 3]
    assert inverse_layouts.deinterleave_rows(numbered(6, 1)).flatten().tolist() == [
        0,
        2,
        4,
        1,
        3,
        5,
    ]
    assert layouts.shuffle_rows(numbered(16, 1), 64).flatten().tolist()[:9] == [*range(0, 16, 2), 1]
    assert layouts.pack_nibbles(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [
        [0x21, 0x0F]
    ]
    assert layouts.block_major(numbered(2, 256)).shape == (2, 2, 128)
    assert layouts.block_major(numbered(2, 256, dtype=torch.bfloat16)).shape == (4, 2, 64)


@pytest.mark.parametrize("tile", [64, 128])
def test_shuffled_rows_are_those_of_flashinfer(tile):
    utils = independent("flashinfer.utils")
    matrix = noise(256, 64)
    theirs = matrix[utils.get_shuffle_matrix_a_row_indices(matrix, tile)]
    assert torch.equal(layouts.shuffle_rows(matrix, tile), theirs)


def test_interleaved_rows_are_those_of_flashinfer():
    core = independent("flashinfer.fused_moe.core")
    matrix = noise(256, 64)
    assert torch.equal(
        layouts.interleave_rows(matrix), core.reorder_rows_for_gated_act_gemm(matrix)
    )


@pytest.mark.parametrize(("dtype", "columns"), [(torch.uint8, 128), (torch.bfloat16, 64)])
def test_block_major_is_that_of_flashinfer(dtype, columns):
    core = independent("flashinfer.fused_moe.core")
    matrix = noise(64, 256).to(dtype)
    theirs = core.convert_to_block_layout(matrix, columns)
    assert torch.equal(layouts.block_major(matrix), theirs)


@pytest.mark.parametrize("shape", [(128, 4), (256, 12), (130, 5), (1, 1)])
def test_swizzled_scales_are_those_of_torchao(shape):
    utils = independent("torchao.prototype.mx_formats.utils")
    scales = noise(*shape)
    swizzled = layouts.swizzle_scales(scales)
    assert torch.equal(swizzled, utils.to_blocked(scales).flatten())
    assert torch.equal(inverse_layouts.unswizzle_scales(swizzled, *shape), scales)


def test_each_expert_is_swizzled_by_itself():
    scales = noise(3, 130, 6)
    swizzled = layouts.swizzle_scales(scales)
    assert torch.equal(swizzled[1], layouts.swizzle_scales(scales[1]))
    assert torch.equal(inverse_layouts.unswizzle_scales(swizzled, 130, 6), scales)


@pytest.mark.parametrize(
    ("layout", "rows", "message"),
    [
        (layouts.swap_halves, (3, 4), "rows of a gated weight: found 3"),
        (layouts.interleave_rows, (3, 4), "rows of a gated weight: found 3"),
        (layouts.shuffle_rows, (48, 4), "rows to shuffle: found 48, expected a multiple of 32"),
        (layouts.block_major, (4, 100), "found 100, expected a multiple of 128"),
        (layouts.pack_nibbles, (4, 3), "found 3, expected a multiple of 2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(layout, rows, message):
    with pytest.raises(QuantizationError, match=message):
        layout(noise(*rows))


def test_other_mistakes_are_named():
    with pytest.raises(QuantizationError, match="epilogue tile: found 96, expected one of 64, 128"):
        layouts.shuffle_rows(noise(32, 4), 96)
    with pytest.raises(QuantizationError, match=r"found torch.float32, expected torch.uint8"):
        layouts.pack_nibbles(torch.zeros(2, 2))
    with pytest.raises(QuantizationError, match=r"found torch.float32, expected torch.uint8"):
        layouts.unpack_nibbles(torch.zeros(2, 2))


def test_weights_for_hopper_lie_where_flashinfers_kernel_puts_them():
    """The loops of `interleave_fp4_weights_for_sm90_mixed_gemm_kernel`, byte by byte."""
    rows, columns = 32, 128
    given = torch.arange(rows * columns // 2).remainder(251).to(torch.uint8)
    moved = torch.zeros_like(given)
    for block in range(rows // 2):
        for part in range(columns // 64):
            for lane in range(16):
                row = block // 8 * 16 + block % 8
                column = part * 32 + lane // 4 * 8 + lane % 4
                first = row * columns // 2 + column
                second = (row + 8) * columns // 2 + column
                to_row = row + lane // 4 % 2 * 8
                to = to_row * columns // 2 + part * 32 + lane // 8 * 16 + lane % 4 * 4
                for byte, source in enumerate((first, second, first + 4, second + 4)):
                    moved[to + byte] = given[source]
    found = layouts.interleave_for_hopper(given.view(1, rows, -1))
    assert torch.equal(found.flatten(), moved)


def test_scales_for_hopper_are_folded():
    """Row r and column c of 64 x 4 scales: line r % 16, byte 4 * (r // 16) + c."""
    scales = torch.arange(128 * 8).remainder(251).to(torch.uint8).view(1, 128, 8)
    folded = layouts.fold_scales(scales)
    assert folded.shape == (1, 2, 2, 16, 16)
    for row, column in ((0, 0), (1, 2), (17, 3), (63, 5), (100, 7)):
        at = 0, row // 64, column // 4, row % 16, 4 * (row % 64 // 16) + column % 4
        assert folded[at] == scales[0, row, column]
