"""Where a checkpoint's elements lie in calls of other entry points than TRT-LLM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pytest_moe_routing.flashinfer.given import GivenExperts
from pytest_moe_routing.targets.marked_weights import (
    KINDS,
    Argument,
    MarkedCheckpoint,
    Order,
    Padded,
    wrong_orders,
)


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
    kinds = dict(zip(KINDS, entry.orders[stored], strict=False))
    found = []
    for gemm, matrix in entry.matrices.items():
        halves = gated and gemm == "fc1"
        given = {"weights": (matrix, arguments[matrix])}
        given |= dict(_scales_and_biases(entry, stored, gemm, arguments))
        for kind, (name, value) in given.items():
            parameter, order = checkpoint.named(gemm, kind), kinds.get(kind, "rows")
            if kind == "bias" and parameter is None:
                continue
            hopper = {"weights": "weights", "scale": "scales"}[kind] if order == "hopper" else ""
            read = Order(halves, tiled=order == "tiles", hopper=hopper)
            # At the sizes of a layer here, CUTLASS kernels need no padding.
            found.append(Argument(name, value, parameter, read, halves, is_padded=False))
    return wrong_orders(found, checkpoint, Padded(), {})


def _scales_and_biases(
    entry: GivenExperts, stored: str, gemm: str, arguments: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield the block scales and the biases of a product, if its kernel has such."""
    for name, roles in entry.scales[stored].items() if len(entry.orders[stored]) > 1 else ():
        at = list(roles).index(f"{gemm} weights")
        yield "scale", (f"{name}[{at}]", arguments[name][at])
    for name, role in entry.biases.items():
        if role == f"{gemm} biases":
            yield "bias", (name, arguments[name])
