"""Where a checkpoint's elements lie in calls of other entry points than TRT-LLM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.given import GivenExperts
from pytest_moe_routing.targets.marked_checkpoint import KINDS, MarkedCheckpoint, Padded
from pytest_moe_routing.targets.marked_weights import (
    Argument,
    Order,
    order_of_activations,
    wrong_orders,
)
from pytest_moe_routing.targets.recorder import plain

#: Those of a matrix of each expert.
_DIMENSIONS = 3
#: Elements of a byte of weights whose kernel limits sizes.
_PACKED = 2


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
    found, padded = [], _padded(entry, arguments, checkpoint) if entry.sizes else Padded()
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
            group = entry.group if halves else 0
            read = Order(halves, tiled=order == "tiles", hopper=hopper, group=group)
            if order == "tiles" and isinstance(value, Tensor) and value.ndim > _DIMENSIONS:
                value = _in_memory(value, len(arguments[entry.experts]))
            # At the sizes of a layer here, CUTLASS kernels need no padding.
            found.append(Argument(name, value, parameter, read, halves, is_padded=False))
    wrong = wrong_orders(found, checkpoint, padded, {})
    if stored in entry.inputs:
        scales, of_inputs = arguments[entry.scale], Order(tiled=entry.inputs[stored] == "tiles")
        wrong += order_of_activations(entry.scale, scales, of_inputs)
    return wrong


def sizes_of(entry: GivenExperts, arguments: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of a call that its kernel limits, by the names of `given.yaml`."""
    weights = arguments[entry.matrices["fc1"]]
    found = {"number of rows": weights.shape[1], "hidden size": weights.shape[2] * _PACKED}
    return {name: size for name, size in found.items() if name in entry.sizes}


def _padded(
    entry: GivenExperts, arguments: Mapping[str, Any], checkpoint: MarkedCheckpoint
) -> Padded:
    """Return by how much the weights of a call are larger than those of the checkpoint."""
    weights = {gemm: arguments[name] for gemm, name in entry.matrices.items()}
    return checkpoint.padded_to(*(weights[gemm].shape[1] for gemm in ("fc1", "fc2")))


def _in_memory(value: Tensor, experts: int) -> Tensor:
    """Return what lies at the address of a tensor that has more dimensions than a matrix.

    The kernel is handed the address: a view of the tensor in another order changes nothing.
    """
    width = value.numel() // experts
    try:
        return value.as_strided((experts, width), (width, 1))
    except RuntimeError as error:
        raise Unsupported("the memory of a call's scales is not that of whole experts") from error


def scales_of(entry: GivenExperts, stored: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the scales of whole tensors that a call has, by what they are to its kernel."""
    found = {}
    for name, roles in entry.scales[stored].items():
        for role, value in _each(roles, arguments[name]):
            if role in entry.factors and role not in entry.ones.get(stored, ()):
                found[role] = plain(value, {})
    return found


def _scales_and_biases(
    entry: GivenExperts, stored: str, gemm: str, arguments: Mapping[str, Any]
) -> Iterator[tuple[str, tuple[str, Any]]]:
    """Yield the block scales and the biases of a product, if its kernel has such."""
    for name, roles in entry.scales[stored].items() if len(entry.orders[stored]) > 1 else ():
        for at, (role, value) in enumerate(_each(roles, arguments[name])):
            if role == f"{gemm} weights":
                yield "scale", (name if isinstance(roles, str) else f"{name}[{at}]", value)
    for name, role in entry.biases.items():
        if role == f"{gemm} biases":
            yield "bias", (name, arguments[name])


def _each(roles: str | Sequence[str], value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what the scales of an argument are, and their values."""
    if isinstance(roles, str):
        yield roles, value
    else:
        yield from zip(roles, value or (), strict=False)
