"""Ways in which SGLang runs a router besides the plain one, tried on routers with one mistake each."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.routers import (
    Deviation,
    RouterRun,
    WrongAnswer,
    WronglyCaptured,
    causes,
    compare_router,
)
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets.sglang.probe import ways
from pytest_moe_routing.targets.sglang.probe.around import placement
from pytest_moe_routing.targets.sglang.probe.world import requested

EXPERTS = 16
RECIPE = Recipe(top_k=4, score="sigmoid", bias=True, normalize="sum", scale=2.5)
HIDDEN = torch.zeros(8, 4)


class Output(NamedTuple):
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor


def router(capture=True, places=True, captures_physical=False, shared=False):
    """SGLang's TopK, or one with a mistake."""

    def forward(hidden, logits, expert_location_dispatch_info=None):
        routing = route(logits.float(), replace(RECIPE, bias=False, scale=1.0), None)
        ids = routing.topk_ids.int()
        if shared:
            ids = torch.cat([ids, torch.full((len(ids), 1), EXPERTS, dtype=torch.int32)], 1)
        physical = ids
        if places:
            routed = ids[:, :4]
            routed = ways.located(routed, expert_location_dispatch_info)
            physical = torch.cat([routed, ids[:, 4:]], 1)
        if capture:
            requested("capturer").capture(0, physical if captures_physical else ids)
        return Output(routing.topk_weights, physical)

    return ways.placed(forward, EXPERTS)


@pytest.fixture
def logits():
    return torch.randn(8, EXPERTS, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shared", [False, True])
def test_placed_experts_come_back_as_logical_ones(logits, shared):
    output = router(shared=shared)(HIDDEN, logits)
    wanted = logits.topk(4).indices.int()
    assert torch.equal(output.topk_ids[:, :4], wanted)
    assert output.topk_ids[:, 4:].unique().tolist() == [EXPERTS] * shared


def test_a_placement_that_is_ignored_gives_other_experts(logits):
    output = router(places=False, capture=False)
    with pytest.raises(WronglyCaptured, match="no selected experts are captured"):
        output(HIDDEN, logits)
    # Ids that are not placed are taken for physical ones: nothing that is captured fits them.
    with pytest.raises(WronglyCaptured, match="not the logical ones"):
        router(places=False)(HIDDEN, logits)


def test_physical_experts_are_not_what_is_to_be_captured(logits):
    with pytest.raises(WronglyCaptured, match="not the logical ones"):
        router(captures_physical=True)(HIDDEN, logits)


def test_shared_experts_have_no_place():
    table = placement(EXPERTS)
    with pytest.raises(WrongAnswer, match="expert 16 is looked up in a placement of 16"):
        ways.located(torch.tensor([[3, 16]]), table)
    assert ways.located(torch.tensor([[3, 16]])).tolist() == [[3, 16]]
    assert ways.located(torch.tensor([[3, 0]]), table).tolist() == [[12, 15]]


def test_the_report_tells_captured_experts_from_chosen_ones(logits):
    found = compare_router(
        lambda logits, _: router(capture=False)(HIDDEN[:1].expand(len(logits), -1), logits),
        replace(RECIPE, bias=False, scale=1.0),
        EXPERTS,
        torch.float32,
        patterns=ways.PLAIN,
    )
    text = "no selected experts are captured"
    assert found == [Deviation("captured", "plain", text, text)]
    run = RouterRun("HashTopK", "HashTopK", "cuda", "deepseek-v4-flash", "opt-in", (), tuple(found))
    (cause,) = causes([run], ["captured"])
    assert cause.lines()[:2] == [
        "HashTopK (cuda): does not pass the selected experts on to --enable-return-routed-experts",
        "  because  no selected experts are captured",
    ]


class Table:
    """A layer that routes by a table: the experts of a token are an entry."""

    def __init__(self, shift=0):
        self.tid2eid, self.shift = torch.zeros(32, 4, dtype=torch.int32), shift

    def __call__(self, hidden, logits, input_ids):
        ids = (self.tid2eid[input_ids] + self.shift) % EXPERTS
        scores = logits.sigmoid().gather(1, ids.long())
        return Output(scores / scores.sum(1, keepdim=True), ids)


@pytest.mark.parametrize(("shift", "kinds"), [(0, set()), (1, {"experts"})])
def test_a_table_holds_what_the_recipe_chooses(shift, kinds):
    recipe = replace(RECIPE, scale=1.0)
    forward, config = ways.hashed(Table(shift), recipe, EXPERTS, {})

    def answer(logits, bias):
        config.correction_bias = bias
        return forward(torch.zeros(len(logits), 4), logits)

    found = compare_router(answer, recipe, EXPERTS, torch.float32, patterns=ways.PLAIN)
    assert {deviation.kind for deviation in found} == kinds


def block(factor, shared=None):
    def op_output(state):
        output = state.pop("hidden_states_after_combine") * factor
        added = state.pop("shared_output")
        assert (added is None) == (shared is None)
        state.hidden_states_mlp_output = output if added is None else added + output

    return SimpleNamespace(op_output=op_output, shared_experts=shared)


@pytest.mark.parametrize("shared", [None, "a layer"])
def test_an_overlapped_block_multiplies_once_more(logits, shared):
    plain = route(logits, replace(RECIPE, bias=False), None)
    weights, ids = plain.topk_weights, plain.topk_ids
    once = ways.overlapped(lambda *_: Output(weights, ids), block(2.5, shared), 2.5)
    assert torch.equal(once(HIDDEN, logits).topk_weights, weights * 2.5)
    # Measured in bfloat16, the factor is that of the config if it is near.
    near = ways.overlapped(lambda *_: Output(weights, ids), block(2.496), 2.5)
    assert torch.equal(near(HIDDEN, logits).topk_weights, weights * 2.5)


def test_an_overlapped_block_that_does_more_is_not_judged(logits):
    uneven = block(torch.arange(1.0, 5.0))
    router = ways.overlapped(lambda *_: Output(logits, logits), uneven, 2.5)
    with pytest.raises(Unsupported, match="op_output does more than scale its input"):
        router(HIDDEN, logits)
