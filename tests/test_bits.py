"""Comparisons of tensors by their bytes."""

from __future__ import annotations

import pytest
import torch

from pytest_moe_routing.targets.bits import have_same_bits


def numbered(*shape, dtype):
    count = torch.Size(shape).numel() * dtype.itemsize
    return (torch.arange(count) % 251).to(torch.uint8).view(dtype).view(shape)


@pytest.mark.parametrize("shape", [(3, 5), (64, 96), (67, 96, 1), (4097,)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64])
def test_every_byte_counts(shape, dtype):
    x = numbered(*shape, dtype=dtype)
    assert have_same_bits(x, x.clone())
    for place in (0, x.nbytes // 2, -1):
        other = x.clone()
        other.flatten().view(torch.uint8)[place] += 1
        assert not have_same_bits(x, other)


def test_what_is_no_number_is_equal_to_itself():
    x = torch.full((4096,), float("nan"))
    assert have_same_bits(x, x.clone())
    assert not have_same_bits(x, -x)


def test_strides_and_places_in_memory_do_not_count():
    x = numbered(96, 64, dtype=torch.bfloat16)
    assert have_same_bits(x.t().contiguous().t(), x)
    # Its first byte is no multiple of eight.
    assert have_same_bits(torch.cat([x[:1, :3].flatten(), x.flatten()])[3:].view(96, 64), x)


def test_a_shape_counts():
    x = numbered(64, 96, dtype=torch.float32)
    assert not have_same_bits(x, x.view(96, 64))
