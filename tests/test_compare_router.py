"""What the comparison of a router with the model's router finds, and how causes are gathered."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from pytest_moe_routing.compare.routing import compare_routing as compare
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.oracle.routers import (
    PRECISION,
    WRONG,
    Output,
    RouterRun,
    WrongAnswer,
    answer_problem,
    causes,
    compare_router,
)
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.suite.causes import of_router

RECIPE = Recipe(8, "sigmoid", bias=True, normalize="sum", epsilon=1e-20, scale=2.5)


def routed(change=lambda weights, ids: (weights, ids), recipe=RECIPE, read=lambda logits: logits):
    """A router that computes a recipe, and changes what comes of it."""

    def router(logits, bias):
        routing = route(read(logits), recipe, bias)
        return change(routing.topk_weights, routing.topk_ids.to(torch.int32))

    return router


def kinds(router, **arguments):
    found = compare_router(router, RECIPE, 64, torch.float32, Output(), **arguments)
    return {deviation.kind: deviation for deviation in found}


def repeated(weights, ids):
    return weights, torch.cat([ids[:, :-1], ids[:, :1]], 1)


def unwritten(weights, ids):
    return weights, ids.index_fill(0, torch.tensor([0]), -7)


def fails(weights, ids):
    raise AssertionError("no such scoring function")


def loses_a_slot(weights, ids):
    raise WrongAnswer("the last slot holds expert 3")


def test_the_recipe_itself_deviates_nowhere():
    assert kinds(routed()) == {}


@pytest.mark.parametrize(
    ("router", "kind", "words"),
    [
        (routed(lambda w, i: (w / 2.5, i)), "weights", "the routed scaling factor is missing"),
        (
            routed(lambda w, i: (w * 2.5, i)),
            "weights",
            "the routed scaling factor is applied twice",
        ),
        (routed(repeated), "structure", "chosen 2 times"),
        (routed(unwritten), "structure", "expert -7 is not one of 64"),
        (routed(fails), "crash", "AssertionError: no such scoring function"),
        (routed(loses_a_slot), "structure", "the last slot holds expert 3"),
        (routed(lambda w, i: (w[:, :-1], i)), "structure", "expected floating [24, 8]"),
        (routed(lambda w, i: (w.bfloat16(), i)), "output", "weights are bfloat16"),
        (routed(lambda w, i: (w, i.to(torch.int16))), "output", "ids are int16"),
        (routed(recipe=replace(RECIPE, score="softmax")), "experts", ""),
        (routed(recipe=replace(RECIPE, bias_dtype="bfloat16")), PRECISION, "bias is rounded"),
        (routed(read=lambda x: x.bfloat16().float()), PRECISION, "logits are rounded to bfloat16"),
        (routed(recipe=replace(RECIPE, epsilon=0.0)), "epsilon", "underflow"),
        (routed(lambda w, i: (w.bfloat16().float(), i)), "rounded", "rounded to bfloat16"),
    ],
)
def test_a_deviation_has_a_kind_and_a_cause(router, kind, words):
    found = kinds(router)
    assert kind in found
    assert words in found[kind].cause or words in found[kind].text


def test_a_bias_that_is_ignored_is_no_matter_of_precision():
    def router(logits, bias):
        return routed(recipe=replace(RECIPE, bias=False))(logits, None)

    found = kinds(router)
    assert found["experts"].cause == "the router's correction bias is ignored"
    assert PRECISION not in found


def test_equal_experts_may_go_to_any_index():
    """`torch.topk` leaves the order of ties open: the highest index is as good."""

    def router(logits, bias):
        weights, ids = routed()(logits.flip(1), bias.flip(0))
        return weights, 63 - ids

    assert kinds(router, patterns=["ties-at-k"]) == {}


def test_bfloat16_logits_are_no_excuse_for_what_float32_does_wrongly_too():
    lost = routed(lambda w, i: (w / 2.5, i))
    found = compare_router(lost, RECIPE, 64, torch.bfloat16)
    assert [d.kind for d in found if d.kind in (*WRONG, PRECISION)] == ["weights"]


def test_arithmetic_in_the_dtype_of_the_logits_is_a_matter_of_precision():
    def router(logits, bias):
        scores = logits.sigmoid()
        ids = (scores + bias).topk(8).indices
        weights = scores.gather(1, ids)
        return (weights / weights.sum(1, keepdim=True) * 2.5).float(), ids

    found = compare_router(router, replace(RECIPE, epsilon=0.0), 64, torch.bfloat16)
    assert [d.kind for d in found if d.kind != "rounded"] == [PRECISION]


SOFTMAX = Recipe(4, "softmax", normalize="sum")


def capped(logits):
    return 50 * (logits / 50).tanh()


def in_bfloat16(logits):
    scores = logits.bfloat16().softmax(-1)
    weights, ids = scores.topk(4)
    return weights / weights.sum(-1, keepdim=True), ids


@pytest.mark.parametrize(
    ("answer", "is_wrong"),
    [
        (lambda logits: routed(recipe=SOFTMAX)(logits, None), False),
        # What the model's code does to finished weights.
        (lambda logits: routed(lambda w, ids: (w.bfloat16(), ids), SOFTMAX)(logits, None), False),
        (in_bfloat16, True),
        # Near enough to the right weights to be rounded ones, but no bfloat16 numbers.
        (lambda logits: routed(recipe=SOFTMAX, read=capped)(logits, None), True),
    ],
    ids=["right", "rounded", "computed in bfloat16", "capped"],
)
def test_weights_may_be_rounded_but_not_computed_otherwise(answer, is_wrong):
    logits = (4 * torch.randn(32, 64, generator=torch.Generator().manual_seed(0))).bfloat16()
    weights, ids = answer(logits.float())
    problem = answer_problem(weights, ids, logits.float(), None, SOFTMAX)
    assert (problem is not None) == is_wrong, problem


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("assert logits is None", "assert logits is None"),
        (
            "assert (logits.isnan().all() and\n  logits is None)",
            "assert logits.isnan().all() and logits is None",
        ),
    ],
)
def test_an_assertion_without_a_message_is_told_by_its_code_and_line(
    tmp_path, monkeypatch, code, told
):
    (tmp_path / "assertive").mkdir()
    text = f"def route(logits, bias):\n return check(logits)\n\ndef check(logits):\n {code}\n"
    (tmp_path / "assertive/router.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "assertive.router", raising=False)
    route = import_module("assertive.router").route
    (deviation,) = compare_router(route, RECIPE, 64, torch.float32)
    run = RouterRun("Router", "route", "cuda", "one", "model", (), (deviation,), "assertive/x.py:1")
    (failure,) = map(of_router, causes([run], WRONG))
    # Some versions of Python say where the statement begins, others where its condition ends.
    assert failure.source in {f"assertive/router.py:{5 + n}" for n in range(len(code.splitlines()))}
    assert failure.lines[1] == f"  because  AssertionError: {told}"
    assert failure.lines[2] == f"  at       {failure.source}"
    # What raises nothing is where the function begins.
    (wrong,) = compare_router(routed(lambda w, i: (w / 2.5, i)), RECIPE, 64, torch.float32)
    (failure,) = map(of_router, causes([replace(run, deviations=(wrong,))], WRONG))
    assert (failure.source, failure.lines[2]) == ("assertive/x.py:1", "  at       assertive/x.py:1")


def test_one_cause_is_told_once_with_everyone_who_meets_it():
    (deviation,) = compare_router(routed(lambda w, i: (w / 2.5, i)), RECIPE, 64, torch.float32)
    runs = [
        RouterRun("Router", "f", "cuda", subject, reach, (), (deviation,))
        # Switches of a made-up router are no model that it reaches.
        for subject, reach in (("one", "opt-in"), ("sigmoid", "no known model"), ("two", "model"))
    ]
    (cause,) = causes([*runs, RouterRun("Router", "g", "cuda", "three", "model")], WRONG)
    text = "\n".join(cause.lines())
    assert text.startswith("f (cuda): weights differ from the model's router\n")
    assert "because  the routed scaling factor is missing\n" in text
    assert "reach    model: one, two\n" in text
    assert "token" in text
    assert causes(runs, [PRECISION]) == []
    failure = of_router(cause)
    assert failure.cause == "router:weights:f:the-routed-scaling-factor-is-missing"
    assert failure.rank is Rank.SILENT
    # Weights are what is wrong here.
    assert [line.split()[0] for line in failure.brief if "(expert: weight)" in line] == [
        "wanted",
        "got",
    ]
    (opt_in,) = causes(runs[:1], WRONG)
    # What nobody meets by default is one line of the run.
    assert of_router(opt_in).rank is Rank.LATENT
    assert of_router(opt_in).cause == failure.cause


def test_experts_that_are_named_need_no_selection_scores_in_a_terminal():
    found = compare_router(routed(lambda w, i: (w, (i + 1) % 64)), RECIPE, 64, torch.float32)
    run = RouterRun("Router", "f", "cuda", "one", "model", (), tuple(found))
    failure = of_router(causes([run], ("experts",))[0])
    assert any("(expert: selection score)" in line for line in failure.lines)
    assert not any("(expert: selection score)" in line for line in failure.brief)
    (token,) = (line for line in failure.brief if "token " in line and "instead of" in line)
    assert token in failure.lines


def test_a_deviation_is_compared_in_full_once(monkeypatch):
    """Every pattern shows a rounding; which one it is takes no comparison token by token."""
    calls = []

    def compare_routing(*arguments, **options):
        calls.append(options)
        return compare(*arguments, **options)

    monkeypatch.setattr("pytest_moe_routing.compare.routing.compare_routing", compare_routing)
    found = kinds(routed(lambda weights, ids: (weights.bfloat16().float(), ids)))
    assert [*found] == ["rounded"]
    assert len(calls) == 1
