"""A checkpoint of random bytes whose values are known by their place.

Bytes are random as only their order matters: two orders of the same rows differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from math import prod
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn

from pytest_moe_routing.targets import scales

#: So many experts differ; they repeat.
_DIFFERENT = 5
#: Exponents of scales, in bytes.
EXPONENTS = (100, 140)
#: What turns the offset binary of checkpoints' 4-bit integers into two's complement, two a byte.
_SIGNS = 0x88
#: Integers by how many bytes they have.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
#: What tells apart the mantissas of random bytes.
_STRIDE = 32749
#: What checkpoints call the parts of an expert.
MATRICES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
#: What a kernel is given of a matrix, block scales after its weights.
KINDS = ("weights", "scale", "bias")
#: What is quantized again where gate and up rows get one scale: E4M3 numbers.
_REQUANTIZED = torch.float8_e4m3fn


@dataclass(frozen=True)
class Padded:
    """How many times as large as in a checkpoint sizes are, in a call.

    Attributes:
        hidden: The hidden size.
        inner: The intermediate size.
    """

    hidden: Fraction = Fraction(1)
    inner: Fraction = Fraction(1)

    def __bool__(self) -> bool:
        return self.hidden != 1 or self.inner != 1

    def pad(self, name: str, part: Tensor) -> Tensor:
        """Return the bytes of a part of a matrix with zeros after its rows and columns."""
        is_first, raw = name.startswith("w13"), part.view(torch.uint8)
        rows, columns = (self.inner, self.hidden) if is_first else (self.hidden, self.inner)
        if "bias" in name:
            columns = Fraction(1)
        lengths = int(columns * raw.shape[1]), int(rows * raw.shape[0])
        return nn.functional.pad(raw, (0, lengths[0] - raw.shape[1], 0, lengths[1] - raw.shape[0]))


@dataclass
class MarkedCheckpoint:
    """What a layer's weights are loaded from.

    Attributes:
        parts: Its tensors of each expert, by the name of the layer's parameter and the name of the
            part of a gated expert (`w1` gate, `w3` up), or `w2`.
        halves: The scale of the whole of each part of the first GEMM, of each expert, if such parts
            have scales of their own.
        larger: The half of gated experts whose input has the larger scales.
        is_tied: Whether kernels are given one scale for both parts of an expert: the larger one.
    """

    parts: dict[str, dict[str, list[Tensor]]] = field(default_factory=dict)
    halves: dict[str, list[float]] = field(default_factory=dict)
    larger: str = "w1"
    is_tied: bool = False

    def make(self, name: str, part: str, experts: int, like: Tensor) -> list[Tensor]:
        """Return a tensor of each expert with the shape and dtype of another.

        Numbers use all bits of their format, and float32 scales those of small weights.
        """
        shape = (min(experts, _DIFFERENT), *like.shape)
        different = list(_made(f"{name} {part}", shape, like.dtype))
        found = [different[expert % len(different)] for expert in range(experts)]
        self.parts.setdefault(name, {})[part] = found
        return found

    def make_factors(self, name: str, part: str, experts: int, *, are_apart: bool) -> list[Tensor]:
        """Return a scale of a whole tensor of each expert, as a checkpoint has it.

        Args:
            are_apart: Whether gate and up rows, or their inputs, have scales that differ.
        """
        kind, gemm = "a" if "input" in name else "w", 1 if name.startswith("w13") else 2
        half = part if are_apart else ""
        if kind == "a" and self.larger == "w3":
            half = {"w1": "w3", "w3": "w1"}.get(half, half)
        values = scales.of_part(f"{kind}{gemm}_scale", half, experts)
        if kind == "w" and gemm == 1:
            self.halves[part] = values.tolist()
        # compressed-tensors has the factor that values were multiplied by.
        return list(1 / values if "global_scale" in name else values)

    def as_given(self, arguments: Mapping[str, Any]) -> MarkedCheckpoint:
        """Return the checkpoint as a call of one of TRT-LLM's entry points has to hold it.

        A kernel multiplies gate and up rows by factors of their own. Where a call has equal ones,
        rows that had another scale have to be stored for that of the call.
        """
        of_halves = [*self.halves.values()]
        for name in ("scale", "scales"):
            gate = arguments.get(f"output1_{name}_gate_scalar")
            up = arguments.get(f"output1_{name}_scalar")
            are_apart = len(of_halves) > 1 and of_halves[0] != of_halves[1]
            if are_apart and isinstance(gate, Tensor) and isinstance(up, Tensor):
                (of_output,) = {*scales.GIVEN["a2_scale"]}
                if not torch.allclose(up.float() * of_output, gate.float(), rtol=1e-5):
                    return self
        return replace(self, is_tied=True)

    def halves_apart(self) -> dict[str, list[float]]:
        """Return the scales of both parts of gated experts, if kernels are given both."""
        return {} if self.is_tied else self.halves

    def matrix(self, name: str, expert: int, padded: Padded) -> Tensor:
        """Return a matrix of an expert as kernels read it, gate before up; biases as a column.

        Rows and columns that are padded are zero.
        """
        parts = self.parts[name]
        every = [self._stored(name, part, expert) for part in ("w1", "w3", "w2") if part in parts]
        if every[0].ndim == 1:
            every = [each.unsqueeze(1) for each in every]
        raw = torch.cat([padded.pad(name, each) for each in every], -2)
        if every[0].dtype == torch.int32:
            return raw ^ _SIGNS
        return raw.view(every[0].dtype)

    def _stored(self, name: str, part: str, expert: int) -> Tensor:
        """Return a part of a matrix, for the scale that its kernel is given."""
        stored = self.parts[name][part][expert]
        if not self.is_tied or part not in self.halves or stored.dtype != _REQUANTIZED:
            return stored
        if not name.startswith("w13"):
            return stored
        # A power of two, see `scales.of_part`: what is stored then has no error.
        ratio = self.halves[part][expert] / max(each[expert] for each in self.halves.values())
        return (stored.float() * ratio).to(stored.dtype)

    def known(self, name: str, padded: Padded) -> Tensor:
        """Return which elements of a matrix the checkpoint has: 1 there, else 0."""
        parts = self.parts[name].values()
        ones = [torch.ones_like(each[0], dtype=torch.uint8) for each in parts]
        return torch.cat([padded.pad(name, each) for each in ones], -2)

    def padded(self, arguments: Mapping[str, Any]) -> Padded:
        """Return by how much a call's weights are larger than those of the checkpoint."""
        weights = [arguments.get(f"{gemm}_weights") for gemm in ("gemm1", "gemm2")]
        return self.padded_to(
            *(w.shape[-2] if isinstance(w, Tensor) and w.ndim > 1 else None for w in weights)
        )

    def padded_to(self, *rows: int | None) -> Padded:
        """Return the same of weights of both GEMMs with so many rows; None if that is not known."""
        inner, hidden = (self._times(*each) for each in zip(("gemm1", "gemm2"), rows, strict=True))
        return Padded(hidden, inner) if min(hidden, inner) >= 1 else Padded()

    def _times(self, gemm: str, rows: int | None) -> Fraction:
        """Return how many times as many rows as in the checkpoint weights have."""
        parameter = self.named(gemm, KINDS[0])
        if parameter is None or rows is None:
            return Fraction(1)
        return Fraction(rows, sum(len(part[0]) for part in self.parts[parameter].values()))

    def named(self, gemm: str, kind: str) -> str | None:
        """Return the parameter with a GEMM's weights, block scales or biases; see `KINDS`."""
        start = "w13" if gemm in ("gemm1", "fc1") else "w2"
        names = (name for name in self.parts if name.startswith(start))
        return next((name for name in names if kind_of(name) == kind), None)


# Methods of the same scheme are given the same.
@cache
def _made(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return a tensor of a parameter; see `MarkedCheckpoint.make`."""
    random = torch.Generator().manual_seed(crc32(name.encode()))
    count = prod(shape)
    # Random integers of 64 bits take as long as bytes do.
    raw = torch.randint(-(2**63), 2**63 - 1, (-(-count // 8),), generator=random)
    values = _values(dtype, is_scale="scale" in name)
    at = raw.view(torch.uint8)[:count].int()
    return values.view(_BITS[dtype.itemsize])[at].view(dtype).reshape(shape)


@cache
def _values(dtype: torch.dtype, *, is_scale: bool) -> Tensor:
    """Return the value of each random byte."""
    byte = torch.arange(256)
    if dtype in (torch.uint8, torch.int8, torch.int32):
        # Exponents of scales stay in the range of every format.
        low, high = EXPONENTS if is_scale else (0, 128)
        return (low + byte % (high - low)).to(dtype)
    # Scales of float32 reach down to those of small weights.
    range_ = 28 if is_scale and dtype == torch.float32 else 7
    steps = round(1 / torch.finfo(dtype).eps)
    # Not in torch's default dtype, which a framework may set.
    fraction = (byte * _STRIDE % steps).float() / steps
    made = torch.exp2((3 - byte % range_).float()) * (1 + fraction)
    return (made if is_scale else made * (1 - byte // 128 * 2)).to(dtype)


def kind_of(parameter: str) -> str:
    """Return which of `KINDS` a parameter of a layer is."""
    return next((kind for kind in KINDS[1:] if kind in parameter), KINDS[0])
