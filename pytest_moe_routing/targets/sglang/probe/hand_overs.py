"""Which quantization methods hand their weights to kernels, when blocks of models are run."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.recorder import Made
from pytest_moe_routing.targets.sglang.answers import Callers
from pytest_moe_routing.targets.sglang.probe.handed_over import router
from pytest_moe_routing.targets.sglang.probe.other_experts import options_of
from pytest_moe_routing.targets.sglang.probe.other_ways import Blocks, Told, accepted
from pytest_moe_routing.targets.sglang.probe.requests import CALLERS, requesting

_SOURCES = "sglang/srt/"


def hand_overs(
    blocks: Blocks, *, told: Told, runners: list[str], **question: Any
) -> list[list[Callers]]:
    """Return what called kernels with each runner, and then on each way that is told of.

    Args:
        told, question: The arguments of `other_experts`.
        runners: Those of TRT-LLM's kernels, which are no ways to other kernels.
    """
    blocks.names.require("verdicts", question["scheme"])
    found = [_run(blocks, runner, {}, question) for runner in runners]
    for way in told["ways"]:
        options = {**options_of(blocks, way), "prepared": lambda _: None}
        runs = accepted(blocks, {**told, "ways": [way]})
        called = [_run(blocks, way["runner"], options, question) for _ in runs]
        found.append([each for run in called for each in run])
    return found


def _run(
    blocks: Blocks, runner: str, options: Mapping[str, Any], question: Mapping[str, Any]
) -> list[Callers]:
    """Return the callers of each kernel on a way, where SGLang's router may choose the experts."""
    found: list[Callers] = []

    def note(kernel: str) -> None:
        found.append(callers(kernel))

    for given in ({}, {"router": router(blocks.names, [])}):
        try:
            with requesting(**{CALLERS: note}, **given, **options):
                blocks.capture(**question, runner=runner)
        except Unsupported:  # The tests that judge the way count why.
            continue
    return found


def callers(kernel: str) -> Callers:
    """Return what is calling a kernel now."""
    owners, given = dict[tuple[str, str], None](), {kernel: None}
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        _, found, file = code.co_filename.replace("\\", "/").rpartition(_SOURCES)
        if found:
            owner, _, name = code.co_qualname.partition(".")
            given[name or owner] = None
            if name:
                owners[_SOURCES + file, owner] = None
            given.update(dict.fromkeys(type(each).__name__ for each in frame.f_locals.values()))
        elif isinstance(made := frame.f_locals.get("self"), Made):
            given.update(dict.fromkeys(made.makers))
        frame = frame.f_back  # type: ignore[assignment]
    return {"owners": [[*owner] for owner in owners], "given": [*given]}
