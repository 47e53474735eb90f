"""The scales that a probe gives to a layer's experts: values by which a kernel's scales are known.

No two products of these, or quotients, are equal, as far as a framework may compute them. Those of
whole tensors, which are float32, have bits that no shorter format has: a cast shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_LONG = 1 + 2.0**-12
#: Scales of the first experts' whole tensors, which repeat; see `flashinfer/scales.yaml`. Those of
#: inputs are the same for all experts: frameworks load one, or take the largest.
GIVEN: Mapping[str, tuple[float, ...]] = {
    "w1_scale": tuple(value * _LONG for value in (3.0, 5.0, 7.0, 9.0)),
    "a1_scale": (0.5 * _LONG,) * 4,
    "w2_scale": tuple(value * _LONG for value in (11.0, 13.0, 15.0, 14.0)),
    "a2_scale": (2.0**-11 * _LONG,) * 4,
}
#: What scales of gate and up rows, or of their inputs, are divided by where they differ. Those of
#: weights are powers of two: rows that are stored again for the larger scale are exact in E4M3.
_APART: Mapping[str, Mapping[str, tuple[float, ...]]] = {
    "w1_scale": {"w1": (1.0, 2.0, 1.0, 4.0), "w3": (2.0, 1.0, 4.0, 1.0)},
    "a1_scale": {"w1": (3.0, 5.0, 1.0, 7.0), "w3": (5.0, 9.0, 2.0, 3.0)},
}
#: What scales of inputs are divided by where those of both halves are equal. The largest counts.
_OF_INPUTS = (3.0, 5.0, 1.0, 7.0)
#: The experts after which they repeat.
FIRST = range(4)
#: Scales of whole tensors that quantizers of activations were given since this was cleared; None
#: where one was given none.
quantized_by: list[Tensor | None] = []


def per_expert(name: str, experts: int) -> Tensor:
    """Return a scale of each expert: float32, `[experts]`."""
    import torch

    values = torch.tensor(GIVEN[name], dtype=torch.float32)
    return values.repeat(-(-experts // len(values)))[:experts]


def of_part(name: str, part: str, experts: int) -> Tensor:
    """Return a scale of each expert as a checkpoint has it: float32, `[experts]`.

    Args:
        name: One of `GIVEN`.
        part: `w1` for gate and `w3` for up rows, or for their inputs, if these have other scales
            than the other half; else anything else.
    """
    import torch

    usual = _OF_INPUTS if name.startswith("a") else (1.0,)
    less = torch.tensor(_APART.get(name, {}).get(part, usual))
    return per_expert(name, experts) / less.repeat(-(-experts // len(less)))[:experts]


def note(scale: Tensor | None) -> None:
    """Note the scale of a whole tensor that a quantizer is given, or that it is given none."""
    quantized_by.append(None if scale is None else scale.float().flatten())
