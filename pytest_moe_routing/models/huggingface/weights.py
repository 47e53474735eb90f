"""Names of the schemes for what quantization configs state about weights and activations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_moe_routing.escape import shorten
from pytest_moe_routing.models.huggingface.document import Section, show
from pytest_moe_routing.schemes import SCHEMES, CheckpointNames

_ROWS: Mapping[str, CheckpointNames] = {
    name: row.checkpoint for name, row in SCHEMES.items() if row.checkpoint
}
#: Schemes by ModelOpt's `quant_algo` (vllm 0.33.0 quantization/modelopt.py reads the same names).
ALGORITHMS: Mapping[str, str] = {a: scheme for scheme, row in _ROWS.items() for a in row.modelopt}
#: Schemes by the `quant_method` that names them by itself.
METHODS: Mapping[str, str] = {
    method: scheme for scheme, row in _ROWS.items() for method in row.quant_methods
}
#: Integer weights, of as many bits as `bits` says.
INTEGER_METHODS = ("awq", "gptq", "awq_marlin", "gptq_marlin")
_BLOCK = [128, 128]

#: Schemes by what compressed-tensors states about the weights.
WEIGHTS: Mapping[tuple[str, int, str, int | None], str] = {
    weights: scheme for scheme, row in _ROWS.items() for weights in row.compressed_tensors
}
#: The bits of the activations that a scheme's kernels quantize to; None for none.
_ACTIVATION_BITS: Mapping[str, tuple[int | None, ...]] = {
    "fp8_block": (8,),
    "fp8_per_tensor": (8,),
    "fp8_per_channel": (8,),
    "mxfp8": (None, 8),  # vllm 0.33.0 has one method for both, which quantizes activations
    "mxfp4": (None, 4, 8),
    "nvfp4": (4,),
    "mxint4": (None,),
    "int4": (None, 4, 8),
    "int8": (None, 8),
}


class UnknownWeights(Exception):
    """Weights that match no known scheme, in words."""


def fp8(found: Section, text: Section) -> str:
    """Return the scheme of `quant_method: fp8`.

    Raises:
        UnknownWeights: It has no name here.
    """
    # DeepSeek-V4: FP8 everywhere but in the experts.
    expert_dtype = text.get("expert_dtype")
    if expert_dtype not in (None, "fp4", "fp8"):
        raise UnknownWeights(f"expert_dtype {show(expert_dtype)} is not known")
    if expert_dtype == "fp4":
        return "mxfp4"
    block = found.get("weight_block_size")
    if block is None:
        return "fp8_per_tensor"
    if block != _BLOCK:
        raise UnknownWeights(f"fp8 in blocks of {shorten(str(block))} is not known")
    return "fp8_block"


def auto_round(found: Section) -> str:
    """Return the scheme of `quant_method: auto-round` (vllm 0.33.0 quantization/inc).

    Raises:
        UnknownWeights: It has no name here.
    """
    kind, bits = found.get("data_type", "int"), found.get("bits")
    group, act_bits = found.get("group_size"), found.get("act_bits", 16)
    names = {
        ("mx_fp", 4, 32): "mxfp4",
        ("mx_fp", 8, 32): "mxfp8",
        ("nv_fp", 4, 16): "nvfp4" if act_bits == 4 else "w4a16_nvfp4",
        ("fp8", 8, -1): "fp8_per_channel",
        ("fp", 8, -1): "fp8_per_channel",
        ("fp8", 8, 0): "fp8_per_tensor",
        ("fp", 8, 0): "fp8_per_tensor",
    }
    base = kind if isinstance(kind, str) else show(kind)
    base = next((k for k in ("mx_fp", "nv_fp") if base.startswith(k)), base)
    scheme: str | None = None
    if base == "int" and bits in (4, 8) and type(bits) is int:
        scheme = f"int{bits}"
    elif isinstance(bits, int) and isinstance(group, int):
        scheme = names.get((base, bits, group))
    if base in ("fp8", "fp") and found.get("weight_block_size", group) == _BLOCK:
        scheme = "fp8_block"
    if scheme is None:
        raise UnknownWeights(f"auto-round {base} of {show(bits)} bits, group {show(group)}")
    if scheme in ("mxfp8", "fp8_per_channel", "fp8_per_tensor", "fp8_block") and act_bits != 8:
        raise UnknownWeights(f"auto-round {scheme} with activations of {show(act_bits)} bits")
    return scheme


def group_scheme(group: Section) -> str:
    """Return the scheme of one of compressed-tensors' `config_groups`.

    Raises:
        UnknownWeights: It has no name here.
    """
    weights = group.section("weights")
    if weights is None:
        raise UnknownWeights(f"{group.name} has no weights")
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("group" if size else "tensor")
    kind: tuple[Any, ...] = (weights.get("type"), weights.get("num_bits"), strategy)
    described = f"{show(kind[0])} of {show(kind[1])} bits by {show(strategy)}, group {show(size)}"
    try:
        scheme = WEIGHTS.get((*kind, size)) or WEIGHTS.get((*kind, None))
    except TypeError:  # a list or object among them
        scheme = None
    if scheme is None:
        raise UnknownWeights(f"weights {described} match no known scheme")
    if scheme == "fp8_block" and weights.get("block_structure", _BLOCK) not in (_BLOCK, None):
        raise UnknownWeights(f"weights {described} in other blocks than {_BLOCK}")
    if scheme == "mxint4" and weights.get("symmetric", True) is not True:
        scheme = "int4"
    inputs = group.section("input_activations")
    bits = inputs.get("num_bits") if inputs else None
    if scheme == "nvfp4" and bits is None:
        return "w4a16_nvfp4"
    if bits not in _ACTIVATION_BITS[scheme]:
        raise UnknownWeights(f"weights {described} with activations of {show(bits)} bits")
    return scheme
