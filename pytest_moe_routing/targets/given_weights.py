"""Where a checkpoint's elements lie in calls of other entry points than TRT-LLM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from pytest_moe_routing.flashinfer.given import GivenExperts
from pytest_moe_routing.targets.marked_checkpoint import KINDS, MarkedCheckpoint, Padded
from pytest_moe_routing.targets.marked_weights import Argument, Order, wrong_orders
from pytest_moe_routing.targets.recorder import plain


def orders_of_given(
    entry: GivenExperts,
    stored: str,
    arguments: Mapping[str, Any],
    checkpoint: MarkedCheckpoint,
    *,
    gated: bool,
) -> list[dict[str, Any]]:
    """Return where a call's weights, scales and biases lie otherwise than its kernel reads them.

    What is returned and raised is that of `marked_weights.orders`.

    Args:
        stored: What the call is stored as, see `flashinfer/given.yaml`.
    """
    # Its kernels are given one scale for gate and up rows.
    checkpoint = replace(checkpoint, is_tied=True)
    kinds = dict(zip(KINDS, entry.orders[stored], strict=False))
    found = []
    for gemm, matrix in entry.matrices.items():
        halves = gated and gemm == "fc1"
        given = {"weights": (matrix, arguments[matrix])}
        given |= dict(_scales_and_biases(entry, stored, gemm, arguments))
        for kind, (name, value) in given.items():
            parameter, order = checkpoint.named(gemm, kind), kinds.get(kind, "rows")
            # `test_other_experts` says that a call lacks biases.
            if kind == "bias" and (parameter is None or value is None):
                continue
            hopper = {"weights": "weights", "scale": "scales"}[kind] if order == "hopper" else ""
            read = Order(halves, tiled=order == "tiles", hopper=hopper)
            # At the sizes of a layer here, CUTLASS kernels need no padding.
            found.append(Argument(name, value, parameter, read, halves, is_padded=False))
    return wrong_orders(found, checkpoint, Padded(), {})


def scales_of(entry: GivenExperts, stored: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the scales of whole tensors that a call has, by what they are to its kernel."""
    found = {}
    for name, roles in entry.scales[stored].items():
        for role, value in zip(roles, arguments[name] or (), strict=False):
            if role in entry.factors and role not in entry.ones.get(stored, ()):
                found[role] = plain(value, {})
    return found


def _scales_and_biases(
    entry: GivenExperts, stored: str, gemm: str, arguments: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield the block scales and the biases of a product, if its kernel has such."""
    for name, roles in entry.scales[stored].items() if len(entry.orders[stored]) > 1 else ():
        at, given = list(roles).index(f"{gemm} weights"), arguments[name] or ()
        # That of a shorter list is not given: `test_other_experts` counts them.
        yield "scale", (f"{name}[{at}]", given[at] if at < len(given) else None)
    for name, role in entry.biases.items():
        if role == f"{gemm} biases":
            yield "bias", (name, arguments[name])
