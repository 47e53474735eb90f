"""Which code of SGLang has its own router, or another runner, serve a block that a kernel could."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

from pytest_moe_routing.targets.answers import RuleAnswer
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe import world
from pytest_moe_routing.targets.sglang.probe.default_runner import FIELD
from pytest_moe_routing.targets.sglang.probe.raised import place_of


def rule(names: Names, run: Callable[[], Any]) -> RuleAnswer | None:
    """Return the function that keeps the kernel from routing; None if it is not known.

    It is the last predicate on the config of TopK that says no, with the line of its answer, or
    else the caller of SGLang's own router.

    Args:
        run: Builds and runs the block.
    """
    config = names.get("router-topk-config") if names.has("router-topk-config") else None
    said_no: list[RuleAnswer] = []
    routed: list[RuleAnswer] = []

    def watch(frame: FrameType, event: str, value: Any) -> None:
        if event == "call" and frame.f_code is world.select_experts.__code__:
            assert frame.f_back is not None
            routed.append(place_of(frame.f_back))
        elif event == "return" and value is False and not routed and _is_asked(frame, config):
            said_no.append(place_of(frame))

    _watched(run, watch)
    return next(iter(said_no[-1:] or routed), None)


def runner_rules(names: Names, choose: Callable[[], Any]) -> list[RuleAnswer]:
    """Return the functions that may name a runner, in order; `instead` is the runner, if any.

    Args:
        choose: Resolves the arguments of a server.
    """
    asked: list[RuleAnswer] = []
    # Some functions return what they declare, others call one that declares it.
    declares = None
    if names.expects("overrides-declare"):
        declares = names.get("overrides-declare").__code__

    def watch(frame: FrameType, event: str, value: Any) -> None:
        if event == "return" and isinstance(value, dict) and FIELD in frame.f_code.co_consts:
            asked.append({**place_of(frame), "instead": str(value.get(FIELD, ""))})
        elif event == "call" and frame.f_code is declares and frame.f_back is not None:
            runner = frame.f_locals["fields"].get(FIELD, "")
            if runner and _gives_field(frame.f_back.f_code):
                asked.append({**place_of(frame.f_back), "instead": str(runner)})

    _watched(choose, watch)
    # Several servers may be asked.
    return [rule for at, rule in enumerate(asked) if rule not in asked[:at]]


def _gives_field(code: CodeType) -> bool:
    """Return whether a function calls others with the runner by its name."""
    return any(isinstance(names, tuple) and FIELD in names for names in code.co_consts)


def _watched(run: Callable[[], Any], watch: Callable[[FrameType, str, Any], None]) -> None:
    """Run something, and tell `watch` of each call and each return."""
    sys.setprofile(watch)
    try:
        run()
    finally:
        sys.setprofile(None)


def _is_asked(frame: FrameType, config: Any) -> bool:
    """Return whether a frame is a function of SGLang that is given a config of TopK."""
    code = frame.f_code
    if config is None or not frame.f_globals.get("__name__", "").startswith("sglang."):
        return False
    given = code.co_varnames[: code.co_argcount]
    return any(isinstance(frame.f_locals.get(name), config) for name in given)


def line_of_model(models: str) -> str:
    """Return file and line of the model's code that is constructing a layer."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and not frame.f_globals.get("__name__", "").startswith(models):
        frame = frame.f_back
    if frame is None:
        return "?"
    name = frame.f_globals["__name__"].removeprefix("sglang.srt.").replace(".", "/")
    return f"{name}.py:{frame.f_lineno}"
