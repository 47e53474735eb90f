"""The scales that a probe gives to a layer's experts: values by which a kernel's scales are known.

No two products of these, or quotients, are equal, as far as a framework may compute them. All are
exact in every number format that scales have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

#: Scales of the first experts' whole tensors, which repeat; see `flashinfer/scales.yaml`. Those of
#: inputs are the same for all experts: frameworks load one, or take the largest.
GIVEN: Mapping[str, tuple[float, ...]] = {
    "w1_scale": (3.0, 5.0, 7.0, 9.0),
    "a1_scale": (0.5,) * 4,
    "w2_scale": (11.0, 13.0, 15.0, 14.0),
    "a2_scale": (2.0**-11,) * 4,
}
#: The experts after which they repeat.
FIRST = range(4)
#: Scales of whole tensors that quantizers of activations were given since this was cleared.
quantized_by: list[Tensor] = []


def per_expert(name: str, experts: int) -> Tensor:
    """Return a scale of each expert: float32, `[experts]`."""
    import torch

    values = torch.tensor(GIVEN[name])
    return values.repeat(-(-experts // len(values)))[:experts]


def note(scale: Tensor | None) -> None:
    """Note the scale of a whole tensor that a quantizer is given, if it is given one."""
    if scale is not None:
        quantized_by.append(scale.float().flatten())
