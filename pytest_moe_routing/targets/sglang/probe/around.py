"""Asks the TRT-LLM runner for what lies around routing, on the MoE block of a model.

SGLang's TopK hands the requests on to the runner together with the logits. SGLang rejects a request
if its code raises before a forward pass, or if the runner has SGLang's own router choose experts
and hands the request on to it. What raises in a forward pass ends a server that has taken requests.
When the kernel routes all the same, its arguments show whether the request got there: FlashInfer's
kernels route every row that they are given, and know experts by their number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.handed_over import router
from pytest_moe_routing.targets.sglang.probe.requests import COMPILED, requesting
from pytest_moe_routing.targets.sglang.probe.world import Call

#: The argument of TopK that tells how many rows are tokens.
PADDING = "num_token_non_padded"
_PLACEMENT = "expert_location_dispatch_info"
_EXPERT_PARALLEL = "--ep-size 2"


class Capturer:
    """Keeps the ids that it is told, as SGLang's own does."""

    def __init__(self) -> None:
        self.told: list[torch.Tensor] = []

    def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
        self.told.append(topk_indices)


def around(
    names: Names,
    run: Callable[[], Mapping[str, Any]],
    calls: Sequence[Call],
    rejects: Callable[[Mapping[str, Any]], str | None],
    *,
    compiles: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return what becomes of each request that this release knows.

    Each has an `answer`, `why`, and the `switches` with which a user makes the request.

    Args:
        run: Builds and runs a block whose kernel routes; the answer of `main.Blocks.capture`.
        calls: Those of entry points in the last run.
        rejects: Returns why a server does not start with these options; None if it starts.
        compiles: Whether the runner is used as well when the server compiles the model: not for
            unquantized experts, whose method has an implementation of its own then.
    """
    found: dict[str, dict[str, Any]] = {}

    def ask(
        name: str,
        switches: Sequence[str],
        handed_on: str,
        routed: Callable[[], dict[str, str]],
        given: Mapping[str, Any],
        **options: Any,
    ) -> None:
        try:
            with requesting(**given, **options):
                answer = run()
            verdict = _verdict(answer, handed_on) or routed()
            if verdict["answer"] in ("ignored", "failed") and (why := rejects(options)):
                verdict = {"answer": "rejected", "why": why}
        except Unsupported as reason:
            verdict = {"answer": "not judged", "why": str(reason)}
        found[name] = {**verdict, "switches": [*switches]}

    ask(
        "padding rows",
        [_EXPERT_PARALLEL],
        PADDING,
        lambda: {"answer": "ignored", "why": "the kernel is given every row"},
        {PADDING: torch.tensor(1, dtype=torch.int32)},
    )
    ask(
        "expert placement by load (EPLB)",
        [_EXPERT_PARALLEL, "--enable-eplb"],
        _PLACEMENT,
        lambda: {"answer": "ignored", "why": "the kernel is given logical experts"},
        {"placement": stubs.known("placement", ep_dispatch_algorithm="dynamic")},
        enable_eplb=True,
    )
    if names.expects("stand-ins.capturer"):
        capturer = Capturer()
        ask(
            "captured expert ids",
            ["--enable-return-routed-experts"],
            "",
            lambda: _captured(calls, capturer),
            {"capturer": capturer},
            enable_return_routed_experts=True,
        )
    if compiles:
        ask(
            "--enable-torch-compile",
            ["--enable-torch-compile"],
            "",
            lambda: {"answer": "honored", "why": "the kernel routes"},
            {"router": router(names, [])},
            **{COMPILED: True},
        )
    return found


def _verdict(answer: Mapping[str, Any], handed_on: str) -> dict[str, str] | None:
    """Return what a block that is run with a request says to it; None if the kernel routes.

    Args:
        handed_on: The argument in which SGLang's own router gets the request, if there is one.
    """
    if answer["failed"]:
        return {"answer": "failed", "why": answer["failed"], "raised_in": answer["raised_in"]}
    if not answer["refused"]:
        return None
    if answer["by_choice"] and handed_on and handed_on not in answer["told"]:
        return {"answer": "ignored", "why": f"SGLang's own top-k is given no {handed_on}"}
    return {"answer": "rejected", "why": answer["refused"]}


def _captured(calls: Sequence[Call], capturer: Capturer) -> dict[str, str]:
    """Return whether ids that the kernel wrote got to the capturer."""
    ((_, arguments),) = calls
    written = arguments.get("routing_replay_out")
    if written is None:
        return {"answer": "ignored", "why": "the kernel is given no routing_replay_out"}
    if any(ids.shape == written.shape and bool((ids == written).all()) for ids in capturer.told):
        return {"answer": "honored", "why": "routing_replay_out"}
    return {"answer": "ignored", "why": "the ids that the kernel writes reach no consumer"}
