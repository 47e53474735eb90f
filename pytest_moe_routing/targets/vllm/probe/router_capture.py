"""Asks which expert ids a release of vLLM captures where EPLB has placed the experts elsewhere.

A request that asks for its routed experts is to get those that the router selected: whoever replays
the routing, such as a training run, does not know where a server keeps its experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Protocol
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.logits import bell
from pytest_moe_routing.oracle.routers import Deviation
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.probe.router_case import select

WAY = "captured expert ids under --enable-eplb"
_TOKENS, _HIDDEN = 24, 64


class Maker(Protocol):
    """Makes a router from further arguments of the factory."""

    def __call__(self, **arguments: Any) -> Any: ...


def captured_by() -> str:
    """Return the name of what hands ids to whoever captures them.

    Raises:
        Unsupported: Nothing does.
    """
    names = release.names()
    return names.spelling(
        "layer-capture" if names.expects("layer-capture") else "router-capture"
    ).path


def deviations(make: Maker, num_experts: int) -> Iterator[Deviation]:
    """Compare the captured ids with those that the router selects where no expert is placed."""
    logits = bell(_TOKENS, num_experts, seed=1)
    _, selected = select(make(), logits)
    captured, placed = _placed(make, logits)
    if torch.equal(placed, selected):
        raise Unsupported(f"not judged: {captured_by()} does not place experts here")
    if len(captured) == 1 and torch.equal(captured[0], selected):
        return
    cause = "captured expert ids are not those that the router selected"
    if not captured:
        cause = "no expert ids are captured"
    elif torch.equal(captured[-1], placed):
        cause = "captured expert ids are physical ones, after EPLB placed the experts"
    shown = captured[-1][0].tolist() if captured else "nothing"
    text = f"token 0: selected {selected[0].tolist()}, captured {shown}"
    yield Deviation("experts", "bell-shaped", text, cause)


def _placed(make: Maker, logits: Tensor) -> tuple[list[Tensor], Tensor]:
    """Route where each expert is in the next one's place; return captured and placed ids."""
    names, num_experts = release.names(), logits.shape[1]
    arguments = {
        "enable_eplb": True,
        "eplb_state": SimpleNamespace(
            expert_load_view=torch.zeros(num_experts, dtype=torch.int32),
            logical_to_physical_map=torch.arange(num_experts).roll(1).unsqueeze(1),
            logical_replica_count=torch.ones(num_experts, dtype=torch.int64),
            should_record_tensor=torch.tensor(False),
            num_unpadded_tokens_tensors=stubs.Stub("tokens of a batch"),
        ),
    }

    def place(topk_ids: Tensor, logical_to_physical_map: Tensor, **_: Any) -> Tensor:
        return logical_to_physical_map[topk_ids.long(), 0].to(topk_ids.dtype)

    captured: list[Tensor] = []
    # Compiled, or a Triton kernel.
    spelling = names.spelling("router-placement")
    with patch.object(import_module(spelling.module), spelling.path, place):
        router = make(**names.accepted("router-options", arguments))
        if names.expects("layer-capture"):
            return captured, _layer_routes(router, logits, captured)
        names.get("router-capture")(router, lambda ids: captured.append(ids.clone()))
        return captured, select(router, logits)[1]


def _layer_routes(router: Any, logits: Tensor, captured: list[Tensor]) -> Tensor:
    """Run the forward pass of a layer of no experts; return the ids that they would get."""
    given: list[Tensor] = []

    def experts(layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
        given.append(topk_ids.clone())
        return x

    layer = SimpleNamespace(
        router=router,
        quant_method=SimpleNamespace(is_monolithic=False, apply=experts),
        capture=lambda ids: captured.append(ids.clone()),
        gate=None,
        shared_experts=None,
        use_dp_chunking=False,
        dp_size=1,
        pcp_size=1,
        ensure_moe_quant_config_init=lambda: None,
        ensure_dp_chunking_init=lambda: None,
        _maybe_setup_shared_experts_stream=lambda *_: (False, None),
    )
    hidden = torch.zeros(len(logits), _HIDDEN, dtype=torch.bfloat16)
    release.names().get("layer-capture")(layer, hidden, logits)
    return given[0]
