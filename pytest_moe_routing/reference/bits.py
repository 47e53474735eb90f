"""Whether tensors are the same, bit by bit."""

from __future__ import annotations

import torch
from torch import Tensor

#: Dtypes whose values are compared as bits, by bytes of a value.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def are_same(x: Tensor | None, y: Tensor | None) -> bool:
    """Return whether two tensors, or none, have the same dtype, shape and bits.

    NaN is the same as itself, and 0 is not the same as -0.
    """
    if x is None or y is None:
        return x is y
    if x.dtype != y.dtype or x.shape != y.shape:
        return False
    # In values of the same size, as they need not be contiguous.
    bits = _BITS[x.itemsize]
    return torch.equal(x.view(bits), y.view(bits))
