"""Padding of layers whose sizes the kernels do not take, as vLLM 0.33.0 pads them.

Padded rows and columns are zero, so that they add nothing: every activation maps 0 to 0. Sources:
vllm/model_executor/layers/quantization/utils/flashinfer_utils.py (`align_moe_weights_for_fi`,
`align_mxfp8_moe_weights_for_fi_trtllm`), flashinfer_fp4_moe.py
(`prepare_nvfp4_moe_layer_for_fi_or_cutlass`), and fused_moe/oracle/{mxfp4,unquantized}.py
(`..._round_up_hidden_size_and_intermediate_size`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_moe_routing.reference.quantization import Quantized
from pytest_moe_routing.reference.weights import Expert, Experts


@dataclass(frozen=True)
class Alignment:
    """What sizes are rounded up to a multiple of.

    Attributes:
        gated: The intermediate size of a gated activation.
        plain: The intermediate size of another one.
        hidden: The hidden size; hidden states are padded as well, and the output is cut.
        scale: The byte that padded block scales hold.
    """

    gated: int = 1
    plain: int = 1
    hidden: int = 1
    scale: int = 0


#: By scheme; vLLM pads no layer of another one.
ALIGNMENTS: Mapping[str, Alignment] = {
    "bf16": Alignment(128, 128),
    "fp8_per_tensor": Alignment(16, 128),
    "mxfp8": Alignment(128, 128, 256, scale=127),
    "nvfp4": Alignment(64, 128, 256),
    "mxfp4": Alignment(128, 128, 256),
    "mxfp4_bf16": Alignment(128, 128, 256),
}


def alignment_of(scheme: str) -> Alignment:
    """Return how vLLM aligns the sizes of a scheme's layers."""
    return ALIGNMENTS.get(scheme, Alignment())


@dataclass(frozen=True)
class PaddedExperts:
    """A layer's experts with the sizes that a scheme's kernel gets.

    Attributes:
        experts: The layer, as its checkpoint has it.
        scheme: The quantization scheme.
        gated: Whether the first GEMM has gate and up rows, each padded on its own.
    """

    experts: Experts
    scheme: str
    gated: bool

    def __len__(self) -> int:
        return len(self.experts)

    def __getitem__(self, expert: int, /) -> Expert:
        given = self.experts[expert]
        alignment = alignment_of(self.scheme)
        hidden, inner = given.gemm2.shape[-2:]
        wide, high = padded_sizes(hidden, inner, self.scheme, self.gated)
        if (wide, high) == (hidden, inner):
            return given
        halves = 2 if self.gated else 1
        return replace(
            given,
            gemm1=_pad(given.gemm1, (halves, high), wide, alignment.scale),
            gemm2=_pad(given.gemm2, (1, wide), high, alignment.scale),
            bias1=None if given.bias1 is None else _pad_rows(given.bias1, halves, high),
            bias2=None if given.bias2 is None else _pad_rows(given.bias2, 1, wide),
        )


def padded_sizes(hidden: int, inner: int, scheme: str, gated: bool) -> tuple[int, int]:
    """Return the hidden and the intermediate size that a scheme's kernel gets."""
    alignment = alignment_of(scheme)
    high = _round_up(inner, alignment.gated if gated else alignment.plain)
    return _round_up(hidden, alignment.hidden), high


def misaligned(hidden: int, inner: int, scheme: str, gated: bool) -> str:
    """Return why no kernel takes a layer of these sizes, padded or not; empty if one does."""
    wide, high = padded_sizes(hidden, inner, scheme, gated)
    rows = high * (2 if gated else 1)
    # BatchedGemmOptions.h of flashinfer-cubin: "M must be divisible by TileM", which is 128.
    if wide % 128 == 0 and rows % 128 == 0:
        return ""
    return (
        f"the {scheme} kernel requires weight rows in multiples of 128, and frameworks do not pad "
        f"to it: found {rows} and {wide} rows"
    )


def pad_hidden(hidden: Quantized, width: int) -> Quantized:
    """Return hidden states with zeros for the columns that padded weights have more."""
    if hidden.shape[-1] == width:
        return hidden
    return _pad(hidden, (1, hidden.shape[-2]), width, scale=0)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(matrix: Quantized, rows: tuple[int, int], columns: int, scale: int) -> Quantized:
    """Pad each of `rows[0]` blocks of rows to `rows[1]` of them, and all columns."""
    packing = 2 if matrix.format.packed else 1
    data = _pad_matrix(matrix.data, rows, columns // packing, 0)
    if matrix.scales is None or matrix.format.block[1] == 0:
        # A scale over a whole matrix, or over one of its halves, stays.
        return replace(matrix, data=data)
    width = columns // matrix.format.block[1]
    return replace(matrix, data=data, scales=_pad_matrix(matrix.scales, rows, width, scale))


def _pad_matrix(matrix: Tensor, rows: tuple[int, int], columns: int, value: int) -> Tensor:
    blocks, high = rows
    raw = matrix.view(torch.uint8)
    size = matrix.element_size()
    padded = raw.new_full((blocks, high, columns * size), value)
    given = raw.view(blocks, -1, raw.shape[-1])
    padded[:, : given.shape[1], : given.shape[2]] = given
    return padded.view(blocks * high, -1).view(matrix.dtype)


def _pad_rows(bias: Tensor, blocks: int, high: int) -> Tensor:
    return _pad_matrix(bias.unsqueeze(1).contiguous(), (blocks, high), 1, 0).squeeze(1)
