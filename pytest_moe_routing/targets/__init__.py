"""Systems under test: one protocol, one registry, adapters that never import each other."""

from pytest_moe_routing.targets.judge import GOOD, VERDICTS, Judgement, judge, story, unjudged
from pytest_moe_routing.targets.protocol import Target
from pytest_moe_routing.targets.registry import (
    check_target,
    load_target,
    pinned_flashinfer,
    target_names,
)

__all__ = [
    "GOOD",
    "VERDICTS",
    "Judgement",
    "Target",
    "check_target",
    "judge",
    "load_target",
    "pinned_flashinfer",
    "story",
    "target_names",
    "unjudged",
]
