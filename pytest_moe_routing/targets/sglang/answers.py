"""The types of the answers that SGLang's child process gives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from pytest_moe_routing.targets.answers import (
    PlacementsAnswer,
    RequestAnswer,
    RuleAnswer,
    ServedAnswer,
)
from pytest_moe_routing.targets.layouts import LaidOutAnswer, LaidOutElsewhere, SplitAnswer
from pytest_moe_routing.targets.other_experts import OtherCallsAnswer
from pytest_moe_routing.targets.sglang.handed_over import HandedOver


class _Call(TypedDict, total=False):
    """The call of the kernel, or where a forward pass `failed`, if there is one."""

    function: str
    #: File and line of the call.
    at: str
    arguments: dict[str, Any]
    input_scale: dict[str, Any] | None
    logits_dtype: str
    scale_after: float
    #: Arguments whose values are not SGLang's own.
    unprepared: list[str]
    bias_is_loaded: bool
    raised_in: str


class Callers(TypedDict):
    """What called a kernel.

    Attributes:
        owners: The file and the class of each method that was running.
        given: The kernel, the functions that were running, now and when an object of FlashInfer's
            was made that calls the kernel, and the classes of what they had.
    """

    owners: list[list[str]]
    given: list[str]


class Answer(_Call):
    place: str
    declared: str | None
    refused: str | None
    failed: str | None
    by_choice: bool
    shared: int


#: The type of each answer of the child.
ANSWERS: Mapping[str, Any] = {
    "method_numbers": dict[str, int],
    "accepted_quantizations": list[str | None] | None,
    "replaced_runner": str,
    "capture": Answer,
    "with_tokens": Answer,
    "around": dict[str, RequestAnswer],
    "handed_over": HandedOver,
    "other_experts": OtherCallsAnswer,
    "layouts": LaidOutAnswer,
    "other_layouts": list[LaidOutElsewhere],
    "split_layouts": list[SplitAnswer],
    "rule": RuleAnswer | None,
    "runner_rules": list[RuleAnswer],
    "placements": PlacementsAnswer,
    "placement_rule": RuleAnswer,
    "default_runner": str,
    "defaults_elsewhere": list[list[str]],
    "rewritten": dict[str, Any],
    "checkpoint": ServedAnswer,
    "keeps_shared_apart": bool,
    "layer_runner": str,
    "hand_overs": list[list[Callers]],
}
