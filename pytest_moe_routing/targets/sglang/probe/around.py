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
from pytest_moe_routing.targets.sglang.probe.calls import Call
from pytest_moe_routing.targets.sglang.probe.handed_over import router
from pytest_moe_routing.targets.sglang.probe.raised import NotBuiltError
from pytest_moe_routing.targets.sglang.probe.ranks import sharing_out
from pytest_moe_routing.targets.sglang.probe.requests import COMPILED, requesting
from pytest_moe_routing.targets.shares import uneven_count

#: The argument of TopK that tells how many rows are tokens.
PADDING = "num_token_non_padded"
_PLACEMENT = "expert_location_dispatch_info"
_EXPERT_PARALLEL = "--ep-size 2"
_REDUNDANT = "--ep-num-redundant-experts 1"


class Capturer:
    """Keeps the ids that it is told, as SGLang's own does."""

    def __init__(self) -> None:
        self.told: list[torch.Tensor] = []

    def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
        self.told.append(topk_indices)


def placement(num_experts: int, redundant: int = 0, algorithm: str = "dynamic") -> Any:
    """Return where experts lie: in reverse order, and redundant ones once more at the end.

    It has what SGLang's own `ExpertLocationDispatchInfo` has.

    Args:
        algorithm: How SGLang chooses among the places of an expert.
    """
    physical = torch.arange(num_experts, dtype=torch.int32).flip(0)
    every = physical.unsqueeze(1).repeat(1, 2)
    every[:redundant, 1] = torch.arange(num_experts, num_experts + redundant)
    count = torch.ones(num_experts, dtype=torch.int32)
    count[:redundant] = 2
    return stubs.known(
        "placement",
        ep_dispatch_algorithm=algorithm,
        partial_logical_to_rank_dispatch_physical_map=physical,
        partial_logical_to_all_physical_map=every,
        partial_logical_to_all_physical_map_num_valid=count,
        num_physical_experts=num_experts + redundant,
        rank_invariant=True,
    )


def around(
    names: Names,
    run: Callable[[], Mapping[str, Any]],
    calls: Sequence[Call],
    rejects: Callable[[Mapping[str, Any]], str | None],
    num_experts: int,
    *,
    compiles: bool = False,
) -> dict[str, dict[str, Any]]:
    """Return what becomes of each request that this release knows.

    Each has an `answer`, `why`, and the `switches` with which a user makes the request.

    Args:
        run: Builds and runs a block whose kernel routes; the answer of `main.Blocks.capture`.
        calls: Those of entry points in the last run.
        rejects: Returns why a server does not start with these options; None if it starts.
        num_experts: The number of routed experts of the block.
        compiles: Whether the runner is used as well when the server compiles the model: not for
            unquantized experts, whose method has an implementation of its own then.
    """

    def ask(
        switches: Sequence[str],
        handed_on: str,
        routed: Callable[[], dict[str, str]],
        given: Mapping[str, Any],
        **options: Any,
    ) -> dict[str, Any]:
        try:
            with requesting(**given, **options):
                answer = run()
            verdict = _verdict(answer, handed_on) or routed()
            if verdict["answer"] in ("ignored", "failed") and (why := rejects(options)):
                verdict = {"answer": "rejected", "why": why}
            elif verdict["answer"] == "ignored" and calls:
                verdict = {**verdict, "source": calls[-1].at}
        except NotBuiltError as reason:
            verdict = {"answer": "rejected", "why": str(reason)}
        except Unsupported as reason:
            verdict = {"answer": "not judged", "why": str(reason)}
        return {**verdict, "switches": [*switches]}

    found = {}
    found["padding rows"] = ask(
        [_EXPERT_PARALLEL],
        PADDING,
        lambda: {"answer": "ignored", "why": "the kernel is given every row"},
        {PADDING: torch.tensor(1, dtype=torch.int32)},
    )
    for more in ((), (_REDUNDANT,)):
        found["expert placement by load (EPLB)"] = placed = ask(
            [_EXPERT_PARALLEL, "--enable-eplb", *more],
            _PLACEMENT,
            lambda: {"answer": "ignored", "why": "the kernel is given logical experts"},
            {"placement": placement(num_experts, len(more))},
            enable_eplb=True,
        )
        if placed["answer"] not in ("honored", "rejected"):
            break
    if (count := uneven_count(num_experts)) is not None:
        with sharing_out(count):
            found["experts that ranks cannot share out evenly"] = ask(
                [f"--tp-size {count}", f"--ep-size {count}"],
                "",
                lambda: _shared_out(calls, num_experts, num_experts // count),
                {},
            )
    if names.expects("stand-ins.capturer"):
        capturer = Capturer()
        found["captured expert ids"] = ask(
            ["--enable-return-routed-experts"],
            "",
            lambda: _captured(calls, capturer),
            {"capturer": capturer},
            enable_return_routed_experts=True,
        )
    if compiles:
        found["--enable-torch-compile"] = ask(
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


def _shared_out(calls: Sequence[Call], num_experts: int, local: int) -> dict[str, str]:
    """Return whether the kernel is given the experts of the last rank, which has so many."""
    ((_, arguments),) = calls
    first, given = arguments["local_expert_offset"], arguments["local_num_experts"]
    if (first, given) == (num_experts - local, local):
        return {"answer": "honored", "why": "local_expert_offset"}
    why = f"the kernel is given {given} experts from {first} on, of {num_experts}"
    return {"answer": "ignored", "why": why}


def _captured(calls: Sequence[Call], capturer: Capturer) -> dict[str, str]:
    """Return whether ids that the kernel wrote got to the capturer."""
    ((_, arguments),) = calls
    written = arguments.get("routing_replay_out")
    if written is None:
        return {"answer": "ignored", "why": "the kernel is given no routing_replay_out"}
    if any(ids.shape == written.shape and bool((ids == written).all()) for ids in capturer.told):
        return {"answer": "honored", "why": "routing_replay_out"}
    return {"answer": "ignored", "why": "the ids that the kernel writes reach no consumer"}
