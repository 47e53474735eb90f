"""What is wrong with a call that is given the experts and weights of SGLang's own router."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypedDict

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.arguments import (
    RecordedLayer,
    misscaled,
    read_routed,
    rounded_weights,
)
from pytest_moe_routing.oracle.finding import Finding, Kind, at_line
from pytest_moe_routing.targets import scales
from pytest_moe_routing.targets.sglang.model_configs import configs


class HandedOver(TypedDict, total=False):
    """The call of the kernel, or why there is none: it is `refused`, or the forward pass `failed`.

    Attributes:
        at: File and line of the call.
        unprepared: Arguments whose values are not SGLang's own.
        shared: Shared experts among the routed ones.
        router_factor: The scaling factor that the weights have.
        scale_after: See `RecordedLayer`.
    """

    function: str
    at: str
    arguments: dict[str, Any]
    input_scale: dict[str, Any] | None
    unprepared: list[str]
    shared: int
    router_factor: float
    scale_after: float | None
    refused: str
    failed: str
    raised_in: str


def raised(answer: Mapping[str, Any], where: str = "") -> Finding:
    """Return that the forward pass of a block `failed`."""
    told = answer["failed"]
    return Finding(Kind.RAISED, "forward", None, told, where, raised_in=answer["raised_in"])


def layer_of(shared: int, scale_after: float | None = 1.0) -> RecordedLayer:
    """Return where a layer was run; see `probe.main.Blocks.capture`.

    Args:
        shared: Shared experts among the routed ones.
        scale_after: See `RecordedLayer`.
    """
    rank, ranks = (0, 1) if shared else (1, 2)
    size = configs()["sizes"]["intermediate_size"]
    given = scales.GIVEN
    return RecordedLayer(rank, ranks, size, scale_after, scales=given, fused=shared)


def findings_of(
    answer: HandedOver, model: ModelSpec, scheme: str, flashinfer: FlashInfer
) -> tuple[Finding, ...]:
    """Return what is wrong with a call."""
    if "failed" in answer:
        return (raised(answer, "forward"),)
    layer = layer_of(answer["shared"], answer["scale_after"])
    findings = read_routed(model, scheme, answer, layer, flashinfer)
    known = (finding for finding in findings if finding.field not in answer["unprepared"])
    scaled = misscaled(model, answer["router_factor"], layer)
    found = (*known, *scaled, *rounded_weights(scheme, answer, flashinfer))
    function = answer["function"]
    return tuple(replace(f, where=at_line(f.where or function, answer)) for f in found)
