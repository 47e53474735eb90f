"""What the simulated launchers read off a call: its quantization, and the layout of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_moe_routing.schemes import kernel_of

#: Layouts by `use_shuffled_weight` and `weight_layout`.
_LAYOUTS = {(False, 0): "plain", (True, 0): "shuffled", (True, 2): "blocks"}


def scheme_of(names: Mapping[str, Any]) -> str:
    """Return which quantization a call is about, from the names that `checks.py` derives."""
    if names["entry"] == "fp8_block":
        return "mxfp8" if names["quantization"] == "MxFp8" else "fp8_block"
    if names["entry"] != "fp4":
        entry: str = names["entry"]
        return entry
    if names["act"] == "E2m1":
        return "nvfp4" if names["per_token_scale"] is None else "nvfp4_per_token"
    return "mxfp4_bf16" if names["act"] == "Bfloat16" else "mxfp4"


def layout_of(scheme: str, given: dict[str, Any]) -> str:
    """Return the layout of weights that a call declares.

    Raises:
        RuntimeError: The entry point does not take the layout.
    """
    kernel = kernel_of(scheme)
    if not kernel.takes_layout:
        return kernel.layouts[0]
    shuffled, number = given["use_shuffled_weight"], given["weight_layout"]
    layout = _LAYOUTS.get((shuffled, number), "")
    if layout not in kernel.layouts:
        raise RuntimeError(
            f"simulated launcher: {scheme} does not accept use_shuffled_weight={shuffled} with "
            f"weight_layout={number}"
        )
    return layout
