"""What a child says about the order of a kernel's weights and scales."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict

from pytest_moe_routing.oracle.layouts import layout_findings
from pytest_moe_routing.oracle.target import LaidOut


class WrongOrder(TypedDict):
    """A tensor that lies otherwise than its kernel reads it; see `marked_weights.orders`."""

    name: str
    read: dict[str, Any]
    found: dict[str, Any] | None
    told: dict[str, int]


class _Factors(TypedDict, total=False):
    """Where whole tensors have scales: what comes of them, and what a quantizer is given."""

    factors: dict[str, Any]
    input_scale: dict[str, Any]


class LaidOutAnswer(_Factors):
    """The entry point, the code that prepares its weights, and what lies wrongly."""

    function: str
    method: str
    orders: list[WrongOrder]


class LaidOutElsewhere(LaidOutAnswer):
    """The same on a GPU, or for a server, that makes another kernel run.

    Attributes:
        switches: Those without which the call is not made.
    """

    device: str
    switches: list[str]


def laid_out(answer: LaidOutAnswer, switches: Iterable[str] | None, device: str = "") -> LaidOut:
    """Read an answer.

    Args:
        switches: Those without which the call is not made; None if that cannot be asked.
        device: The GPU, if it is not the usual one.
    """
    function, method = answer["function"], answer["method"]
    return LaidOut(
        function,
        method,
        layout_findings(answer["orders"], function),
        None if switches is None else tuple(switches),
        device,
    )
