"""Compares tensors by their bytes."""

from __future__ import annotations

import torch
from torch import Tensor

#: Bytes in which values are compared; torch takes as long for each as for one byte.
_WORD = torch.int64.itemsize
#: Dtypes of the same size as values have, which may not be numbers, by bytes of a value.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Below as many bytes, taking them as words takes longer than to compare them.
_FEW = 1 << 12


def have_same_bits(x: Tensor, y: Tensor) -> bool:
    """Return whether tensors with values of the same size have the same shape and bytes."""
    if x.shape != y.shape:
        return False
    bits = _BITS[x.itemsize]
    if x.nbytes >= _FEW and x.nbytes % _WORD == 0:
        x, y = (_as_words(tensor.view(bits)) for tensor in (x, y))
        bits = torch.int64
    return torch.equal(x.view(bits), y.view(bits))


def _as_words(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    # Words begin at a multiple of their size.
    return (flat.clone() if flat.storage_offset() else flat).view(torch.int64)
