"""The number formats of MoE checkpoints and kernels: quantize and dequantize, bit for bit.

A format is a row of data: how an element is stored, which block of elements shares a scale, and how
the scale is stored. Arithmetic is float32, as in kernels' epilogues; rounding is to nearest, ties
to even; values beyond the largest one saturate. Sources: OCP Microscaling Formats 1.0 (elements,
ue8m0), PTX ISA `cvt` (saturation, NaN), FlashInfer 0.7.2.post1 quantization kernels (scales).

Not finite numbers: infinity saturates. NaN makes its block's scale NaN where the scale comes from
the block; an e4m3 element stays NaN; an e2m1 element, which has none, becomes 6 as in hardware, and
an int4 element becomes 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, unflatten

from pytest_moe_routing.errors import QuantizationError
from pytest_moe_routing.reference.layouts import pack_nibbles, unpack_nibbles

#: Largest magnitude of an element that needs a scale.
ELEMENT_MAX: Mapping[str, float] = {"e4m3": 448.0, "e2m1": 6.0, "int4": 7.0}

#: A block that is the whole matrix.
WHOLE = (0, 0)

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Format:
    """One number format.

    Attributes:
        name: Its key in `FORMATS`.
        element: `float32`, `bf16`, `e4m3`, `e2m1` or `int4` (two's complement); the last two lie
            two to a byte, even columns low.
        block: Rows and columns that share a scale, 0 for all of them; `WHOLE` for one scale per
            matrix.
        scale: How a block's scale is stored: `none`, `float32`, `bf16`, `e4m3` (with a float32
            scale over the whole matrix on top), or `ue8m0` (a power of two: uint8, 127 is 1).
        least: The largest magnitude of a block is taken to be no smaller, which keeps a block of
            tiny numbers from having a tiny scale.
        by_row: Whether the float32 scale on top is one of each row, made from its numbers.
    """

    name: str
    element: str
    block: tuple[int, int] = WHOLE
    scale: str = "none"
    least: float = 0.0
    by_row: bool = False

    @property
    def is_static(self) -> bool:
        """Whether a kernel is given a scale over the whole matrix, which it could not make."""
        if self.scale == "e4m3":
            return not self.by_row
        return self.block == WHOLE and self.scale != "none"

    @property
    def packed(self) -> bool:
        """Whether two elements share a byte."""
        return self.element in ("e2m1", "int4")

    @property
    def storage(self) -> torch.dtype:
        """The dtype of stored elements."""
        names = {
            "float32": torch.float32,
            "bf16": torch.bfloat16,
            "e4m3": torch.float8_e4m3fn,
        }
        return names.get(self.element, torch.uint8)

    @property
    def scale_storage(self) -> torch.dtype:
        """The dtype of stored scales."""
        return _SCALE_DTYPES[self.scale]

    def scale_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the shape of the scales of a matrix.

        Raises:
            QuantizationError: the matrix is empty, or not made of whole blocks.
        """
        high, wide = self.block[0] or rows, self.block[1] or columns
        if not rows or not columns or rows % high or columns % wide:
            raise QuantizationError(
                f"{self.name}: found {rows} x {columns} elements, "
                f"expected whole blocks of {high or 1} x {wide or 1}"
            )
        return rows // high, columns // wide


_SCALE_DTYPES: Mapping[str, torch.dtype] = {
    "none": torch.float32,
    "float32": torch.float32,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "ue8m0": torch.uint8,
}

FORMATS: Mapping[str, Format] = {
    f.name: f
    for f in (
        Format("float32", "float32"),
        Format("bf16", "bf16"),
        Format("fp8", "e4m3", WHOLE, "float32"),
        Format("fp8_1x128", "e4m3", (1, 128), "float32"),
        Format("fp8_128x128", "e4m3", (128, 128), "float32"),
        Format("fp8_channel", "e4m3", (1, 0), "float32"),
        # Scales from 1 / (448 * 512) on: MIN_SCALING_FACTOR of FlashInfer's quantTypeUtils.cuh.
        Format("fp8_token", "e4m3", (1, 0), "float32", least=2.0**-9),
        Format("mxfp8", "e4m3", (1, 32), "ue8m0"),
        Format("nvfp4", "e2m1", (1, 16), "e4m3"),
        Format("nvfp4_token", "e2m1", (1, 16), "e4m3", by_row=True),
        Format("mxfp4", "e2m1", (1, 32), "ue8m0"),
        Format("mxint4", "int4", (1, 32), "bf16"),
    )
}


@dataclass(frozen=True)
class Quantized:
    """A matrix in a number format.

    Attributes:
        format: Which one.
        data: `[..., rows, columns]`, or `[..., rows, columns / 2]` bytes of packed elements.
        scales: `[..., block rows, block columns]` as stored; None where the format has none.
        global_scale: float32 factor on top of all scales (NVFP4's second level), or of those of
            each row, `[..., rows, 1]`; None is 1.
    """

    format: Format
    data: Tensor
    scales: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """`[..., rows, columns]` in elements."""
        *lead, columns = self.data.shape
        return torch.Size((*lead, columns * 2 if self.format.packed else columns))

    def rows(self, start: int, stop: int) -> Quantized:
        """Return some rows, from a multiple of the block's height on; nothing is copied.

        Raises:
            QuantizationError: the rows would begin within a block.
        """
        height = self.format.block[0]
        if height and start % height:
            raise QuantizationError(
                f"{self.format.name}: found rows from {start}, expected a multiple of {height}"
            )
        part = replace(self, data=self.data[..., start:stop, :])
        if self.scales is None or not height:
            return part
        blocks = slice(start // height, -(-stop // height))
        scales, overall = self.scales[..., blocks, :], self.global_scale
        if overall is not None and overall.ndim >= 2:
            overall = overall[..., blocks, :]
        return replace(part, scales=scales, global_scale=overall)


def find_format(name: str) -> Format:
    """Return the format of this name.

    Raises:
        QuantizationError: There is none.
    """
    if name not in FORMATS:
        raise QuantizationError(f"unknown format {name!r}; formats: {', '.join(FORMATS)}")
    return FORMATS[name]


def quantize(
    x: Tensor,
    format: str | Format,
    *,
    scales: Tensor | None = None,
    global_scale: Tensor | float | None = None,
    ue8m0: str = "ceil",
) -> Quantized:
    """Quantize a matrix `[..., rows, columns]` of any floating dtype.

    Args:
        x: What to quantize. Rounded to float32 first, which is what a kernel's epilogue holds.
        format: A format or its name.
        scales: Take these scales, as stored, instead of the block's own: static quantization.
        global_scale: NVFP4's factor on top (`amax / (448 * 6)`), of the matrix or `[..., rows, 1]`;
            default: from these numbers.
        ue8m0: How a power-of-two scale follows from the largest magnitude: `ceil`, so that it never
            saturates (NVIDIA's kernels), or `floor`, OCP's rule, which may.

    Raises:
        QuantizationError: The matrix is not made of whole blocks, or not floating.
    """
    fmt = find_format(format) if isinstance(format, str) else format
    if x.ndim < 2 or not x.is_floating_point():
        raise QuantizationError(
            f"{fmt.name}: found {x.dtype} {list(x.shape)}, expected floating [..., rows, columns]"
        )
    shape = fmt.scale_shape(*x.shape[-2:])
    x = x.to(torch.float32)
    if fmt.scale == "none":
        return Quantized(fmt, x.to(fmt.storage))
    blocks = _blocks(x, shape)
    overall: Tensor | None = None
    if fmt.scale == "e4m3":
        given = _global_scale(x, fmt) if global_scale is None else global_scale
        overall = torch.as_tensor(given, dtype=torch.float32, device=x.device)
    if scales is None:
        scales = _scales(blocks, fmt, overall, ue8m0)
    elif tuple(scales.shape[-2:]) != shape or scales.dtype != fmt.scale_storage:
        raise QuantizationError(
            f"{fmt.name} scales: found {scales.dtype} {list(scales.shape)}, "
            f"expected {fmt.scale_storage} {list(shape)}"
        )
    real = _real_scales(fmt, scales, overall)
    # Where a scale is 0 so are all its elements; and 0 / 0 is not.
    real = real.masked_fill(real == 0, torch.inf)[..., :, None, :, None]
    codes = _ENCODE[fmt.element](blocks / real).reshape(x.shape)
    return Quantized(fmt, pack_nibbles(codes) if fmt.packed else codes, scales, overall)


def dequantize(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the real numbers that a quantized matrix stands for, `[..., rows, columns]`.

    `dtype` is float32 or float64. Exact in float64; in float32 each is the rounded product of
    element and scale, which is exact too for power-of-two scales.
    """
    fmt = q.format
    if fmt.packed:
        table = _pairs(fmt.element, dtype, q.data.device)
        pairs = table.index_select(0, q.data.flatten().to(torch.int32))
        values = torch.view_as_real(pairs).view(q.shape)
    else:
        values = q.data.to(dtype)
    if q.scales is None:
        return values
    real = _real_scales(fmt, q.scales, q.global_scale, dtype)
    blocks = _blocks(values, fmt.scale_shape(*values.shape[-2:]))
    blocks.mul_(real[..., :, None, :, None])
    return values


def fake_quantize(x: Tensor, format: str | Format, **how: object) -> Tensor:
    """Quantize and dequantize again, in the dtype of `x`; keywords as for `quantize`."""
    return dequantize(quantize(x, format, **how), x.dtype)  # type: ignore[arg-type]


def real_scales(q: Quantized, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the real scale of each block, `[..., block rows, block columns]`; by default 1."""
    if q.scales is None:
        return torch.ones(*q.data.shape[:-2], 1, 1, dtype=dtype, device=q.data.device)
    return _real_scales(q.format, q.scales, q.global_scale, dtype)


def _blocks(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """View or copy a matrix as `[..., block rows, height, block columns, width]`."""
    return unflatten(unflatten(x, -1, (shape[1], -1)), -3, (shape[0], -1))


def _scales(blocks: Tensor, fmt: Format, overall: Tensor | None, ue8m0: str) -> Tensor:
    """Each block's own scale, as stored, from `[..., block rows, high, block columns, wide]`."""
    if fmt.element == "int4":
        # Two's complement reaches -8: the larger of what either end needs.
        scale = torch.maximum(blocks.amax((-3, -1)) / 7, blocks.amin((-3, -1)) / -8)
        return scale.clamp_min(_TINY).to(torch.bfloat16)
    amax = blocks.abs().amax((-3, -1))
    largest = ELEMENT_MAX[fmt.element]
    if fmt.scale == "ue8m0":
        return _ue8m0_floor(amax, largest) if ue8m0 == "floor" else _ue8m0_ceil(amax / largest)
    if fmt.scale == "e4m3":
        assert overall is not None
        return _encode_e4m3(amax / largest / overall)
    # Never 0, so that an empty block divides well; the same guard as in FlashInfer's activation.
    return (amax.clamp_min(fmt.least) / largest).clamp(_TINY, torch.finfo(torch.float32).max)


def _global_scale(x: Tensor, fmt: Format) -> Tensor:
    amax = x.abs().amax(-1, keepdim=True) if fmt.by_row else x.abs().amax()
    amax = amax.clamp(_TINY, torch.finfo(torch.float32).max)
    return (amax / (ELEMENT_MAX["e4m3"] * ELEMENT_MAX[fmt.element])).clamp_min(_TINY)


#: What each ue8m0 byte stands for. By table, as 2**-127 is subnormal in float32.
_UE8M0 = 2.0 ** (torch.arange(256, dtype=torch.float64) - 127)
_UE8M0[255] = torch.nan


def _real_scales(
    fmt: Format, scales: Tensor, overall: Tensor | None, dtype: torch.dtype = torch.float32
) -> Tensor:
    real = decode_ue8m0(scales, dtype) if fmt.scale == "ue8m0" else scales.to(dtype)
    return real if overall is None else real * overall.to(dtype)


def decode_ue8m0(scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Powers of two from biased exponents; 255 is NaN."""
    return _UE8M0.to(scales.device, dtype)[scales.to(torch.int32)]


def _ue8m0_ceil(x: Tensor) -> Tensor:
    """Return the smallest power of two from `x >= 0` up, as `cvt.rp.satfinite.ue8m0x2.f32`."""
    bits = x.view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Byte 0 is 2**-127, a subnormal float32 with mantissa 2**22: up to there nothing is rounded up.
    up = torch.where(exponent == 0, mantissa > 1 << 22, mantissa > 0)
    return (exponent + up).clamp_max(254).masked_fill(x.isnan(), 255).to(torch.uint8)


def _ue8m0_floor(amax: Tensor, largest: float) -> Tensor:
    """OCP's rule: the exponent of the largest magnitude, less that of the largest element."""
    exponent = (amax.view(torch.int32) >> 23) - (int(largest).bit_length() - 1)
    return exponent.clamp(0, 254).masked_fill(amax.isnan(), 255).to(torch.uint8)


def _encode_e4m3(x: Tensor) -> Tensor:
    # Clamped, as older torch turns what is too large into NaN.
    return x.clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def _encode_e2m1(x: Tensor) -> Tensor:
    x = x.nan_to_num(nan=6.0)
    size = x.abs().clamp_max(6.0)
    # Steps are 0.5, 1 and 2 wide below 2, 4 and 6; two codes lie in each binade.
    binade = (size >= 2).to(torch.float32) + (size >= 4)
    code = (size * (1 - binade).exp2()).round() + 2 * binade
    return code.to(torch.uint8) | (x.signbit().to(torch.uint8) << 3)


def _encode_int4(x: Tensor) -> Tensor:
    return x.nan_to_num(0.0).round().clamp(-8, 7).to(torch.int8).view(torch.uint8) & 15


_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])

_ENCODE = {"e4m3": _encode_e4m3, "e2m1": _encode_e2m1, "int4": _encode_int4}


def _pairs(element: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the two numbers of each byte as one complex number: `[256]`.

    One look-up then moves both, six times faster than one for each element.
    """
    if element == "e2m1":
        values = torch.cat((_E2M1, -_E2M1))
    else:
        values = torch.tensor([*range(8), *range(-8, 0)])
    codes = unpack_nibbles(torch.arange(256, dtype=torch.uint8).unsqueeze(1))
    return torch.view_as_complex(values[codes.to(torch.int64)].to(dtype)).to(device)
