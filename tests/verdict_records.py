"""Verdict records made by hand, for tests of reports."""

from __future__ import annotations

from pytest_moe_routing.oracle.record import Reach, VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict


def verdict(model="m", scheme="nvfp4", verdict=Verdict.EXACT, **changes):
    """A record of vllm 0.32.0; a bad verdict fails its test."""
    given = {
        "target": "vllm",
        "release": "0.32.0",
        "flashinfer": "0.7.0",
        "judged_as": "0.7.0",
        "reach": Reach.PUBLISHED,
        "router": "softmax -> top 8",
        "method": "Default",
        "path": ("scoring_func is softmax", "not renormalize"),
        "gates": ("device", "activation"),
        "outcome": "passed" if verdict in ("exact", "fallback") else "failed",
    }
    return VerdictRecord(
        model=model, scheme=scheme, verdict=Verdict(verdict), **{**given, **changes}
    )
