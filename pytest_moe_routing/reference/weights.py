"""Where experts' weights come from: one expert at a time, so that a layer need not fit in memory.

Rows of the first GEMM are in the order of checkpoints, gate before up; `layouts` has what kernels
want instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pytest_moe_routing.errors import LayerError
from pytest_moe_routing.logits import integers
from pytest_moe_routing.reference.quantization import (
    ELEMENT_MAX,
    Quantized,
    find_format,
)
from pytest_moe_routing.schemes import SCHEMES, storage_of


@dataclass(frozen=True)
class Expert:
    """The weights of one expert.

    Attributes:
        gemm1: `[2 * intermediate, hidden]`, gate rows before up rows; `[intermediate, hidden]`
            where the activation is not gated.
        gemm2: `[hidden, intermediate]`.
        bias1, bias2: `[rows of gemm1]` and `[hidden]`, any floating dtype, or None.
        intermediate_scale: Static scale of the intermediate, in the checkpoint: what a quantized
            one stands for (per-tensor FP8), or the factor over block scales (NVFP4). None: from the
            numbers at hand.
    """

    gemm1: Quantized
    gemm2: Quantized
    bias1: Tensor | None = None
    bias2: Tensor | None = None
    intermediate_scale: float | None = None


#: Largest intermediate that `static_scale` leaves room for: what loud tokens make.
_LARGEST = 1024.0


def static_scale(format: str) -> float | None:
    """Return a static scale for an intermediate of this format that suits `logits.loud`.

    None for formats whose scales follow from the numbers at hand.
    """
    fmt = find_format(format)
    if not fmt.is_static:
        return None
    scales = ELEMENT_MAX["e4m3"] if fmt.scale == "e4m3" else 1.0
    return _LARGEST / (ELEMENT_MAX[fmt.element] * scales)


class Experts(Protocol):
    """A layer's experts, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, expert: int, /) -> Expert: ...


@dataclass(frozen=True)
class GeneratedExperts:
    """Experts made from the portable integer generator: the same bits on every machine.

    Elements and scales are drawn as they are stored, so even a layer of hundreds of gigabytes in
    float32 costs nothing but the expert in use. All experts are windows into one pool of bytes,
    each from another place on.

    Attributes:
        num_experts, hidden_size, intermediate_size: Shape of the layer.
        format: Format of both weights.
        gated: Whether the first GEMM has gate and up rows.
        biases: Whether there are expert biases.
        intermediate_scale: As in `Expert`.
        even: Whether scales of a whole matrix differ by at most 1.7 instead of 8, so that every
            expert has a share of the output that rounding does not hide.
        seed: Another one makes another layer.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    format: str = "bf16"
    gated: bool = True
    biases: bool = False
    intermediate_scale: float | None = None
    even: bool = False
    seed: int = 0

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int, /) -> Expert:
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} of {self.num_experts}")
        rows = (2 if self.gated else 1) * self.intermediate_size
        gemm1 = self._matrix(rows, self.hidden_size, 2 * expert)
        gemm2 = self._matrix(self.hidden_size, self.intermediate_size, 2 * expert + 1)
        bias1 = bias2 = None
        if self.biases:
            bias1 = self._bias(rows, 2 * expert)
            bias2 = self._bias(self.hidden_size, 2 * expert + 1)
        return Expert(gemm1, gemm2, bias1, bias2, self.intermediate_scale)

    @cached_property
    def _pool(self) -> Tensor:
        """Random bytes. A prime number of them, so that no row of a matrix is another's copy."""
        largest = 2 * 2 * self.intermediate_size * self.hidden_size
        size = next((size for size in _POOLS if size >= largest), _POOLS[-1])
        return integers(size, seed=self.seed, bits=8).to(torch.uint8)

    def _bytes(self, count: int, draw: int) -> Tensor:
        size = len(self._pool)
        start = draw * 2654435761 % size
        return self._pool.repeat(-(-(start + count) // size))[start : start + count]

    def _matrix(self, rows: int, columns: int, draw: int) -> Quantized:
        """Make a matrix whose elements are about 1/sqrt(K), which keeps activations near 1."""
        fmt = find_format(self.format)
        shape = fmt.scale_shape(rows, columns)
        stored = columns // 2 if fmt.packed else columns
        raw = self._bytes(rows * stored, draw).view(rows, stored)
        size = columns**-0.5
        if fmt.scale == "none":
            return Quantized(fmt, ((raw.to(torch.float32) - 127.5) * (size / 74)).to(fmt.storage))
        if fmt.element == "e4m3":
            # Magnitudes from 1/8 to 15/8: all signs, four exponents, all mantissas.
            raw = (raw & 0x9F | 0x20).view(torch.float8_e4m3fn)
        # The root mean square of the elements drawn.
        spread = {"e4m3": 0.85, "e2m1": 2.9, "int4": 4.6}[fmt.element]
        steps = self._bytes(shape[0] * shape[1], draw + _SCALES) & 3
        # Scales of 1/4 to 2, so that another block's is no small matter; their own is 1.15.
        powers = steps.to(torch.float32) - 2
        if self.even and shape == (1, 1):
            powers = powers / 4
        real = size / spread / 1.15 * torch.exp2(powers).view(shape)
        overall = None
        if fmt.scale == "e4m3":
            overall = torch.tensor(size / spread / 16)
            real = real / overall
        if fmt.scale == "ue8m0":
            return Quantized(fmt, raw, (real.log2().floor() + 127).to(torch.uint8))
        return Quantized(fmt, raw, real.to(fmt.scale_storage), overall)

    def _bias(self, count: int, draw: int) -> Tensor:
        return (self._bytes(count, draw + _BIASES).to(torch.float32) - 127.5) / 256


#: Sizes of pools, all prime: the smallest that holds a layer's largest matrix, else the last.
_POOLS = (65521, 1048573, 4194301)

#: Added to the number of a draw: scales and biases come from other places than elements.
_SCALES, _BIASES = 1 << 20, 1 << 21


@dataclass(frozen=True)
class SafetensorsExperts:
    """Experts in a checkpoint on disk, opened one at a time. Needs the `safetensors` package.

    Attributes:
        folder: Holds `*.safetensors`.
        prefix: What stands before the expert's number: `model.layers.3.mlp.experts`.
        num_experts: How many there are.
        scheme: The quantization scheme of the checkpoint.
        names: Names of the gate, up and down projection; two names where there is no gate.
    """

    folder: Path
    prefix: str
    num_experts: int
    scheme: str
    names: Sequence[str] = ("gate_proj", "up_proj", "down_proj")

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int, /) -> Expert:
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} of {self.num_experts}")
        *first, last = (self._matrix(f"{self.prefix}.{expert}.{name}") for name in self.names)
        scale = self._get(f"{self.prefix}.{expert}.{self.names[-1]}.input_scale", required=False)
        return Expert(
            stack_rows(first),
            last,
            intermediate_scale=None if scale is None else float(scale),
        )

    def _matrix(self, name: str) -> Quantized:
        fmt = find_format(storage_of(self.scheme).weight)
        data = self._get(f"{name}.weight")
        if fmt.scale == "none":
            return Quantized(fmt, data)
        names = SCHEMES[self.scheme].checkpoint
        if names is None or not names.scale:
            raise LayerError(f"the names of the scales in {self.scheme} checkpoints are not known")
        scales = self._get(f"{name}.{names.scale}").view(fmt.scale_shape(*_elements(fmt, data)))
        return Quantized(
            fmt,
            data,
            scales.to(fmt.scale_storage),
            self._get(f"{name}.{names.global_scale}") if names.global_scale else None,
        )

    @cached_property
    def _where(self) -> dict[str, Any]:
        """The open file that holds each tensor."""
        from safetensors import safe_open

        where = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            handle = safe_open(path, framework="pt")
            # `keys` carries no types.
            where.update(dict.fromkeys(handle.keys(), handle))  # type: ignore[no-untyped-call]
        return where

    def _get(self, name: str, *, required: bool = True) -> Any:
        if name not in self._where:
            if required:
                raise LayerError(f"{self.folder} has no tensor {name}")
            return None
        return self._where[name].get_tensor(name)


def _elements(fmt: Any, data: Tensor) -> tuple[int, int]:
    return data.shape[0], data.shape[1] * (2 if fmt.packed else 1)


def stack_rows(parts: Sequence[Quantized]) -> Quantized:
    """Matrices one below the other, `[gate; up]`, each keeping its own scales.

    Where a scale covers a whole matrix it comes to cover a block of its rows.
    """
    if len(parts) == 1:
        return parts[0]
    fmt = parts[0].format
    rows = parts[0].shape[-2]
    data = torch.cat([part.data for part in parts], -2)
    if parts[0].scales is None:
        return Quantized(fmt, data)
    scales = torch.cat([part.scales for part in parts if part.scales is not None], -2)
    overall = None
    if parts[0].global_scale is not None:
        height = parts[0].scales.shape[-2]
        factors = [
            part.global_scale.reshape(1, 1) for part in parts if part.global_scale is not None
        ]
        overall = torch.cat([factor.expand(height, 1) for factor in factors])
    if fmt.block == (0, 0):
        fmt = replace(fmt, block=(rows, 0))
    return Quantized(fmt, data, scales, overall)
