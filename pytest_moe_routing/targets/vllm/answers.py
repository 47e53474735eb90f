"""The types of the answers that vLLM's child process gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Required, TypedDict

from pytest_moe_routing.targets.answers import (
    AcceptedKeysAnswer,
    KeptAnswer,
    PlacementsAnswer,
    RequestAnswer,
    RuleAnswer,
    ServedAnswer,
    TakenExpertsAnswer,
)
from pytest_moe_routing.targets.layouts import LaidOutAnswer, LaidOutElsewhere, SplitAnswer
from pytest_moe_routing.targets.other_experts import OtherCallsAnswer
from pytest_moe_routing.targets.vllm.hand_overs import HandOverAnswer


class _Raised(TypedDict):
    type: str
    message: str
    where: str
    code: str


class _End(TypedDict, total=False):
    """A call ends in a kernel, or in an exception."""

    function: str
    arguments: dict[str, Any]
    raised: _Raised
    tokens: int
    scale_after: float | None
    shared: float | None
    reduced: list[int]
    are_summed: int
    told_otherwise: dict[str, list[str]]
    misread: list[str]


class _Call(_End):
    by: str
    shards: int
    dispatched: bool
    intermediate_size: int


class _ModularCall(_Call, total=False):
    places: Required[dict[str, str]]
    unusable: dict[str, str]
    input_scale: dict[str, Any] | None
    applied: dict[str, list[int] | None]
    same: bool


class _RoutedCalls(TypedDict):
    calls: list[_ModularCall]
    router_factor: float


class _Calls(TypedDict):
    calls: list[_Call]


class _Chosen(TypedDict):
    selector: str
    switches: list[str] | None
    instead: str
    device: list[str]


#: The type of each answer of the child.
ANSWERS: Mapping[str, Any] = {
    "numbers": dict[str, int],
    "classify": list[str],
    "gates": list[tuple[str, bool, str] | tuple[str, bool, str, bool]],
    "around": dict[str, RequestAnswer],
    "choose": _Chosen | None,
    "rule": RuleAnswer | None,
    "placements": PlacementsAnswer,
    "placement_rule": RuleAnswer,
    "taken_experts": TakenExpertsAnswer,
    "kept_out_by": KeptAnswer,
    "accepted_keys": AcceptedKeysAnswer,
    "checkpoint": ServedAnswer,
    "capture": _Calls,
    "capture_modular": _RoutedCalls,
    "other_experts": OtherCallsAnswer,
    "layouts": list[LaidOutAnswer],
    "other_layouts": list[LaidOutElsewhere],
    "split_layouts": list[SplitAnswer],
    "hand_overs": list[HandOverAnswer],
}
