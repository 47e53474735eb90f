"""What the simulated launchers read off a call: its quantization, and the layout of its weights."""

from __future__ import annotations

from typing import Any

from pytest_moe_routing.reference.quantization import find_format
from pytest_moe_routing.schemes import KERNEL_SCHEMES, kernel_of, storage_of

#: Layouts by `use_shuffled_weight` and `weight_layout`.
_LAYOUTS = {(False, 0): "plain", (True, 0): "shuffled", (True, 2): "blocks"}


def scheme_of(name: str, given: dict[str, Any]) -> str:
    """Return which quantization a call is about, told apart as the launchers do.

    Raises:
        RuntimeError: The entry point serves nothing that is called so.
    """
    fits = [scheme for scheme in KERNEL_SCHEMES if _serves(scheme, name, given)]
    if not fits:
        raise RuntimeError(f"simulated launcher: {name} has no kernel for these arguments")
    if len(fits) > 1:
        # FP4: by the number of weights that share a scale, then by the dtype of the input.
        per_scale = 2 * given["gemm1_weights"].numel() // given["gemm1_weights_scale"].numel()
        dtype = given["hidden_states"].dtype
        blocks = {scheme: find_format(storage_of(scheme).weight).block[1] for scheme in fits}
        fits = [scheme for scheme in fits if (blocks[scheme] == 16) == (per_scale == 16)]
        inputs = {scheme: find_format(storage_of(scheme).input).storage for scheme in fits}
        fits = [scheme for scheme in fits if inputs[scheme] == dtype] or fits
    return fits[0]


def _serves(scheme: str, name: str, given: dict[str, Any]) -> bool:
    """Whether an entry point, with the arguments that tell schemes apart, serves a scheme."""
    kernel = kernel_of(scheme)
    told = all(given.get(argument) == value for argument, value in kernel.arguments.items())
    return told and name in (kernel.function(), kernel.function(routed=True))


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
            f"simulated launcher: {scheme} takes no use_shuffled_weight={shuffled} with "
            f"weight_layout={number}"
        )
    return layout
