"""Runs a model's MoE block with experts that SGLang's own router chose, up to FlashInfer's kernel.

SGLang's router is replaced by one that gives recognizable ids and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.recorder import input_scale, plain
from pytest_moe_routing.targets.sglang.probe.calls import Call
from pytest_moe_routing.targets.sglang.probe.requests import requesting
from pytest_moe_routing.targets.sglang.probe.world import packed


class Ran(Protocol):
    """What the run of a block leaves behind.

    Attributes:
        calls: Those of entry points.
        experts: Tensors of its experts, by the names that answers use.
    """

    calls: list[Call]
    experts: dict[str, Tensor | None]


@dataclass(frozen=True)
class Chosen:
    """What the stand-in for SGLang's router gave.

    Attributes:
        ids: int32, [tokens, top_k].
        weights: float32, [tokens, top_k], not multiplied by any factor.
        factor: The factor by which SGLang's own router would have multiplied the weights.
    """

    ids: Tensor
    weights: Tensor
    factor: float


def router(names: Names, chosen: list[Chosen]) -> Callable[..., Any]:
    """Return a router that gives recognizable ids and weights, and appends them to `chosen`."""

    def route(*, router_logits: Tensor, topk_config: Any, **_: Any) -> Any:
        tokens, experts = router_logits.shape
        places = torch.arange(tokens * topk_config.top_k).reshape(tokens, -1)
        ids, weights = (places % experts).int(), (places / 7 + 1 / 3).float()
        is_scaled = topk_config.apply_routed_scaling_factor_on_output
        factor = topk_config.routed_scaling_factor if is_scaled else None
        chosen.append(Chosen(ids, weights, 1.0 if factor is None else factor))
        return names.get("router-output")(weights, ids, router_logits)

    return route


def handed_over(
    names: Names, run: Callable[[], Mapping[str, Any]], ran: Ran, scale: float
) -> dict[str, Any]:
    """Return the call of the kernel, or what was `refused` or `failed`.

    Args:
        run: Builds and runs a block; the answer of `main.Blocks.capture`.
        ran: What the last run left behind.
        scale: The factor by which a model's own code may multiply the weights.

    Raises:
        Unsupported: More than one kernel is called, or the block's run cannot be judged.
    """
    # A block is run twice if that decides where its shared experts are; the last run counts.
    chosen: list[Chosen] = []
    with requesting(router=router(names, chosen)):
        answer = run()
    if answer["failed"]:
        return {name: answer[name] for name in ("failed", "raised_in")}
    if not (answer["by_choice"] and ran.calls):
        return {"refused": answer["refused"] or "the kernel routes"}
    if len(ran.calls) != 1:
        raise Unsupported(f"the block calls {len(ran.calls)} kernels, not one")
    ((function, arguments),), choice = ran.calls, chosen[-1]
    named: dict[str, Tensor | None] = {"ids": choice.ids, **ran.experts}
    given, scaled = arguments.get("topk_ids"), 1.0
    for factor in (scale, 1.0):
        each = choice.weights * factor
        parts = {"weights": each, "packed": packed(choice.ids, each)}
        if any(part.get("is") in parts for part in _parts(plain(given, parts))):
            named |= parts
            scaled = factor
    return {
        "function": function,
        "at": ran.calls[0].at,
        **input_scale(),
        "arguments": {name: plain(value, named) for name, value in arguments.items()},
        "unprepared": answer["unprepared"],
        "shared": answer["shared"],
        "router_factor": choice.factor * scaled,
        "scale_after": answer["scale_after"],
    }


def _parts(given: Any) -> list[Any]:
    """Return the descriptions of ids and weights, in one tensor or in two."""
    return [part for part in (given if isinstance(given, list) else [given]) if part]
