"""Reads the answers about experts of other kernels than TRT-LLM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Required, TypedDict

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.arguments import RecordedLayer, misscaled, read_routed
from pytest_moe_routing.oracle.finding import Finding, Kind, at_line
from pytest_moe_routing.oracle.given import not_for, read_given, refusal
from pytest_moe_routing.oracle.modular import misapplied
from pytest_moe_routing.oracle.scales import Scales
from pytest_moe_routing.oracle.target import OtherCall
from pytest_moe_routing.targets import scales

#: Schemes whose checkpoints have scales of whole tensors. Those of others are 1.
_WITH_WHOLE_SCALES = ("fp8_per_tensor", "nvfp4")
_WITHOUT: Scales = {"w1_scale": (1.0,)}


class OtherCallAnswer(TypedDict, total=False):
    """A call as a child recorded it; see `oracle.given` and `oracle.modular`.

    Attributes:
        experts, device, switches, requests: Those of `OtherCall`.
        by: What calls the experts.
        at: File and line of the call.
        raised: The exception that ended the call, where no kernel was called.
        elsewhere: Whether no kernel of FlashInfer's is known to serve the checkpoint.
        capability: That of the GPU, where FlashInfer does not run the kernel: `function`, or one of
            TRT-LLM's if there is none.
        router_factor: The scaling factor that the weights have, where no marked tokens show it.
        scale_after: The factor by which the layer multiplies the kernel's output; None if the
            layer's output is something else.
    """

    experts: Required[str]
    device: Required[str]
    switches: Required[list[str]]
    requests: Required[bool]
    by: Required[str]
    at: str
    stored: Required[str]
    has_biases: Required[bool]
    shards: Required[int]
    dispatched: bool
    parts: int
    function: str
    arguments: dict[str, Any]
    roles: dict[str, list[str | None]]
    unprepared: list[str]
    places: dict[str, str]
    unusable: dict[str, str]
    applied: dict[str, list[int] | None]
    same: bool
    raised: dict[str, str]
    elsewhere: bool
    capability: str
    router_factor: float
    scale_after: float | None
    intermediate_size: int
    input_scale: dict[str, Any] | None


def _of_trtllm(
    model: ModelSpec, record: Mapping[str, Any], flashinfer: FlashInfer
) -> list[Finding]:
    """Return what is wrong with a call of one of TRT-LLM's kernels that are given experts."""
    layer = RecordedLayer(
        rank=record["shards"] - 1,
        shards=record["shards"],
        intermediate_size=record["intermediate_size"],
        scales=scales.GIVEN,
    )
    return list(read_routed(model, record["stored"], record, layer, flashinfer))


class OtherCallsAnswer(TypedDict):
    """Every call that a child recorded."""

    calls: list[OtherCallAnswer]


def other_call(model: ModelSpec, record: Mapping[str, Any], flashinfer: FlashInfer) -> OtherCall:
    """Return a recorded call, with what is wrong with it."""
    return OtherCall(
        record["experts"],
        record["device"],
        tuple(record["switches"]),
        record["requests"],
        tuple(_findings(model, record, flashinfer)),
    )


def _findings(
    model: ModelSpec, record: Mapping[str, Any], flashinfer: FlashInfer
) -> Iterator[Finding]:
    if "capability" in record:
        refused = refusal(record.get("function"), record["stored"], record["capability"])
        if refused is not None:
            yield refused
        return
    if "raised" in record:
        raised = record["raised"]
        where, code = raised["where"], raised.get("code", "")
        yield Finding(Kind.RAISED, raised["type"], None, raised["message"], where, raised_in=code)
        return
    if record.get("elsewhere"):
        if (wrong := not_for(record.get("function"), record["stored"])) is None:
            raise Unsupported(f"not judged: what {record['function']} is given elsewhere")
        yield wrong
        return
    shards = record["shards"]
    ranks = f", rank {shards - 1} of {shards}" if shards > 1 else ""
    if record.get("parts", 1) > 1:
        ranks = f", rank 1 of {record['parts']} that split experts"
    if record.get("dispatched"):
        ranks += ", tokens gathered"
    given = scales.GIVEN if record["stored"] in _WITH_WHOLE_SCALES else _WITHOUT
    if given_experts(record["function"]) is None:
        found = _of_trtllm(model, record, flashinfer)
    else:
        found = list(read_given(model, {**record, "scales": given}, flashinfer))
    found += misapplied(model, record, explained=bool(found))
    if "router_factor" in record:
        layer = RecordedLayer(scale_after=record["scale_after"])
        found += misscaled(model, record["router_factor"], layer)
    for finding in found:
        where = f"{record['by']}->{record['function']}{ranks}"
        yield replace(finding, where=at_line(where, record))
