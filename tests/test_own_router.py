"""How a framework's own router reads a config, found by running it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.oracle.own_router import reading_of

SOFTMAX = RouterConfig(
    num_experts=64, top_k=6, scoring_func="softmax", correction_bias=None, renormalize=True,
    logits_dtype="float32", routed_scaling_factor=2.5,
)  # fmt: skip
GROUPED = replace(
    SOFTMAX, scoring_func="sigmoid", correction_bias="float32",
    n_group=8, topk_group=4, group_score="top2_sum",
)  # fmt: skip


def softmax_router(scale):
    def route(logits, bias):
        weights, ids = logits.softmax(1).topk(6)
        return scale * weights / weights.sum(1, keepdim=True), ids.to(torch.int32)

    return route


def rounded(router):
    """Return a router that gives its weights in bfloat16."""

    def route(logits, bias):
        weights, ids = router(logits, bias)
        return weights.to(torch.bfloat16), ids

    return route


def grouped_router(score, *, scale=2.5, heeds_bias=True, groups=8):
    def route(logits, bias):
        scores = logits.sigmoid()
        keys = scores + bias if heeds_bias else scores
        best = keys.view(len(keys), groups, -1).topk(2).values
        ranks = best.sum(-1) if score == "top2_sum" else best[..., 0]
        out = torch.ones_like(ranks, dtype=torch.bool).scatter(1, ranks.topk(4).indices, False)
        keys = keys.masked_fill(out.repeat_interleave(64 // groups, 1), -torch.inf)
        ids = keys.topk(6, sorted=False).indices
        weights = scores.gather(1, ids)
        return scale * weights / weights.sum(1, keepdim=True), ids

    return route


@pytest.mark.parametrize(
    ("router", "config", "expected"),
    [
        (softmax_router(2.5), SOFTMAX, {}),
        (softmax_router(1.0), SOFTMAX, {"routed_scaling_factor": 1.0}),
        (rounded(softmax_router(2.5)), SOFTMAX, {}),
        (rounded(softmax_router(1.0)), SOFTMAX, {"routed_scaling_factor": 1.0}),
        (grouped_router("top2_sum"), GROUPED, {}),
        (grouped_router("max"), GROUPED, {"group_score": "max"}),
        (
            grouped_router("max", scale=1.0),
            GROUPED,
            {"group_score": "max", "routed_scaling_factor": 1.0},
        ),
        (grouped_router("top2_sum", heeds_bias=False), GROUPED, {"correction_bias": None}),
        (
            softmax_router(2.5),
            replace(SOFTMAX, n_group=8, topk_group=4, group_score="max"),
            {"n_group": None, "topk_group": None, "group_score": None},
        ),
        # No router can be what this config says, and a framework has to make something of it.
        (
            softmax_router(2.5),
            replace(SOFTMAX, n_group=7, topk_group=4, group_score="max"),
            {"n_group": None, "topk_group": None, "group_score": None},
        ),
    ],
)
def test_what_a_router_has_otherwise(router, config, expected):
    assert reading_of(router, config) == expected


def test_what_no_known_change_explains():
    with pytest.raises(Unsupported, match="computes neither what the config states"):
        reading_of(grouped_router("top2_sum", groups=16), GROUPED)


def test_a_router_that_fails():
    with pytest.raises(Unsupported, match="RuntimeError: no kernel for this"):
        reading_of(raising(RuntimeError("no kernel for this")), SOFTMAX)
    with pytest.raises(Unsupported, match=r"^a GPU alone$"):
        reading_of(raising(Unsupported("a GPU alone")), SOFTMAX)


def raising(error):
    def route(logits, bias):
        raise error

    return route
