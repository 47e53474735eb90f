"""Asks the TRT-LLM runner for what lies around routing, on the MoE block of a model.

SGLang's TopK hands the requests on to the runner together with the logits. The runner may have
SGLang's own router choose experts instead, or raise: it rejects the request. When the kernel routes
all the same, its arguments show whether the request got there: FlashInfer's kernels route every row
that they are given, and know experts by their number alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.world import Call, requesting

#: The argument of TopK that tells how many rows are tokens.
PADDING = "num_token_non_padded"
_EXPERT_PARALLEL = "--ep-size 2"


class Capturer:
    """Keeps the ids that it is told, as SGLang's own does."""

    def __init__(self) -> None:
        self.told: list[torch.Tensor] = []

    def capture(self, layer_id: int, topk_indices: torch.Tensor) -> None:
        self.told.append(topk_indices)


def around(
    names: Names, run: Callable[[], Mapping[str, Any]], calls: Sequence[Call]
) -> dict[str, dict[str, Any]]:
    """Return what becomes of each request that this release knows.

    Each has an `answer`, `why`, and the `switches` with which a user makes the request.

    Args:
        run: Builds and runs a block whose kernel routes; the answer of `main.Blocks.capture`.
        calls: Those of entry points in the last run.

    Raises:
        Unsupported: A request cannot be made here.
    """
    found: dict[str, dict[str, Any]] = {}

    def ask(name: str, switches: Sequence[str], ignored: str, **options: Any) -> None:
        with requesting(**options):
            answer = run()
        why = answer["refused"] or answer["failed"]
        verdict = ("rejected", why) if why else ("ignored", ignored)
        found[name] = dict(zip(("answer", "why"), verdict, strict=True), switches=[*switches])

    rows = torch.tensor(1, dtype=torch.int32)
    ask("padding rows", [_EXPERT_PARALLEL], "the kernel is given every row", **{PADDING: rows})
    placement = stubs.known("placement", ep_dispatch_algorithm="dynamic")
    ask(
        "expert placement by load (EPLB)",
        [_EXPERT_PARALLEL, "--enable-eplb"],
        "the kernel is given logical experts",
        placement=placement,
        enable_eplb=True,
    )
    if names.expects("stand-ins.capturer"):
        name, capturer = "captured expert ids", Capturer()
        options = {"capturer": capturer, "enable_return_routed_experts": True}
        ask(name, ["--enable-return-routed-experts"], "", **options)
        if found[name]["answer"] == "ignored":
            found[name] |= _captured(calls, capturer)
    return found


def _captured(calls: Sequence[Call], capturer: Capturer) -> dict[str, str]:
    """Return whether ids that the kernel wrote got to the capturer."""
    ((_, arguments),) = calls
    written = arguments.get("routing_replay_out")
    if written is None:
        return {"answer": "ignored", "why": "the kernel is given no routing_replay_out"}
    if any(ids.shape == written.shape and bool((ids == written).all()) for ids in capturer.told):
        return {"answer": "honored", "why": "routing_replay_out"}
    return {"answer": "ignored", "why": "the ids that the kernel writes reach no consumer"}
