"""What vLLM's child process recorded of calls, as findings of a judgement have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pytest_moe_routing.oracle.arguments import RecordedLayer
from pytest_moe_routing.oracle.finding import Finding, Kind, at_line
from pytest_moe_routing.targets import scales

#: With them, each rank has tokens of its own, which are gathered for the experts.
_GATHERED = "--enable-expert-parallel --data-parallel-size 2"


def layer_of(record: Mapping[str, Any]) -> RecordedLayer:
    """Return the layer that a call was recorded in."""
    return RecordedLayer(
        rank=record["shards"] - 1,
        shards=record["shards"],
        intermediate_size=record["intermediate_size"],
        scale_after=record.get("scale_after"),
        shared=record.get("shared"),
        reduced=tuple(record.get("reduced", ())),
        are_summed=record.get("are_summed", 0),
        scales=scales.GIVEN,
        told_otherwise=tuple((n, *both) for n, both in record.get("told_otherwise", {}).items()),
        misread=tuple(record.get("misread", ())),
    )


def raised(record: Mapping[str, Any]) -> Finding:
    """Return that the layer raised an exception before it called a kernel."""
    said = record["raised"]
    where, code = said["where"], said["code"]
    return Finding(Kind.RAISED, said["type"], None, said["message"], where, "", code)


def site_of(record: Mapping[str, Any]) -> str:
    """Name the layer's method and the entry point that it calls, if it gets there."""
    return "->".join(filter(None, (record["by"], record.get("function", ""))))


def at_site(finding: Finding, record: Mapping[str, Any]) -> Finding:
    """Return a finding with the path on which the call was made."""
    dispatched = record["dispatched"]
    switches = _GATHERED if dispatched else ""
    if finding.kind is Kind.RAISED:
        return replace(finding, switches=switches)
    shards = record["shards"]
    rank = f", rank {shards - 1} of {shards}" if shards > 1 else ""
    gathered = ", tokens gathered" if dispatched else ""
    where = at_line(f"{site_of(record)}{rank}{gathered}", record)
    return replace(finding, where=where, switches=switches)
