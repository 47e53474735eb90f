"""Stand-ins for what frameworks read compressed-tensors' configs with, in place of its package."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum
from typing import Any

import torch


class QuantizationType(StrEnum):
    """How a number is stored, as compressed-tensors names it."""

    INT = "int"
    FLOAT = "float"


class QuantizationStrategy(StrEnum):
    """What shares a scale, as compressed-tensors names it."""

    TENSOR = "tensor"
    CHANNEL = "channel"
    GROUP = "group"
    BLOCK = "block"
    TOKEN = "token"
    TENSOR_GROUP = "tensor_group"
    ATTN_HEAD = "attn_head"


class CompressionFormat(Enum):
    """The layout of a checkpoint, as compressed-tensors names it."""

    dense = "dense"
    int_quantized = "int-quantized"
    float_quantized = "float-quantized"
    naive_quantized = "naive-quantized"
    pack_quantized = "pack-quantized"
    marlin_24 = "marlin-24"
    mixed_precision = "mixed-precision"
    nvfp4_pack_quantized = "nvfp4-pack-quantized"
    mxfp4_pack_quantized = "mxfp4-pack-quantized"
    mxfp8_quantized = "mxfp8-quantized"


class QuantizationArgs:
    """A group of a checkpoint's `quantization_config`, with compressed-tensors' defaults."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.num_bits = values.get("num_bits", 8)
        self.type = QuantizationType(values.get("type", "int"))
        self.symmetric = values.get("symmetric", True)
        self.group_size = values.get("group_size")
        self.strategy = QuantizationStrategy(values["strategy"])
        self.block_structure = values.get("block_structure")
        self.dynamic = values.get("dynamic", False)
        self.actorder = values.get("actorder")
        scale_dtype = values.get("scale_dtype")
        self.scale_dtype = scale_dtype and getattr(torch, scale_dtype.removeprefix("torch."))

    def __repr__(self) -> str:
        return f"QuantizationArgs({', '.join(f'{k}={v}' for k, v in vars(self).items())})"

    @classmethod
    def model_validate(cls, values: Mapping[str, Any]) -> QuantizationArgs:
        return cls(values)


#: By the name under which frameworks import them.
STAND_INS: Mapping[str, Any] = {
    "CompressionFormat": CompressionFormat,
    "QuantizationArgs": QuantizationArgs,
    "QuantizationStrategy": QuantizationStrategy,
    "QuantizationType": QuantizationType,
}
