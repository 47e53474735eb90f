"""Each family of aggregates, and the budget of elements, notices what nothing else notices."""

from dataclasses import replace

import pytest
import torch
from honest_kernel import Honest
from moe_cases import busiest, make

from pytest_moe_routing.compare import aggregates, compare_moe
from pytest_moe_routing.compare.budget import FLASHINFER, bounded_moe
from pytest_moe_routing.compare.spread import pipelines, spread_moe
from pytest_moe_routing.reference.routing import Routing

KERNEL = Honest()


def solve(problem):
    return KERNEL(problem, raw=True)


def larger(*where):
    """The output, some of it 1 % too large."""

    def wrong(problem):
        output = solve(problem)
        output[where] *= 1.01
        return output

    return wrong


def higher(*where):
    """The output, 1 % of each token's size added to some of it."""

    def wrong(problem):
        output = solve(problem)
        size = output.square().mean(1, keepdim=True).sqrt().expand_as(output)
        output[where] += 0.01 * size[where]
        return output

    return wrong


def weighted(*tokens):
    """The router weight of one expert 10 % too large, in some tokens or in all."""

    def wrong(problem):
        ids, weights = problem.routing.topk_ids, problem.routing.topk_weights.clone()
        expert = int(ids[tokens[0], 1]) if tokens else busiest(problem)
        here = slice(tokens[0], tokens[0] + 1) if tokens else slice(None)
        weights[here] *= torch.where(ids[here] == expert, 1.1, 1.0)
        return solve(replace(problem, routing=Routing(ids, weights)))

    return wrong


def scaled(gemm):
    """A row of one expert's block scales 10 % too large."""

    def wrong(problem):
        experts, number = list(problem.experts), busiest(problem)
        matrix = getattr(experts[number], gemm)
        scales = matrix.scales.to(torch.float32)
        scales[5] *= 1.1
        experts[number] = replace(experts[number], **{gemm: replace(matrix, scales=scales)})
        return solve(replace(problem, experts=experts))

    return wrong


def activated(**changed):
    """Other numbers of the activation."""

    def wrong(problem):
        activation = replace(problem.layer.activation, **changed)
        return solve(replace(problem, layer=replace(problem.layer, activation=activation)))

    return wrong


def one_element(problem):
    """One element off by five times its budget."""
    bounds = bounded_moe(
        problem.hidden, problem.experts, problem.routing, problem.layer, FLASHINFER
    )
    output = solve(problem)
    output[4, 7] += 5 * bounds.error[4, 7]
    return output


ELEMENT = ("element", "budget")

#: By what must notice it: what is wrong, and the share of it that nothing else notices.
FAULTS = {
    ("output", "slope"): (larger(slice(None)), 0.106),
    ("output", "mean"): (higher(slice(None)), 0.105),
    ("token", "slope"): (larger(4), 0.38),
    ("token", "mean"): (higher(4), 0.29),
    ("columns", "slope"): (larger(slice(None), slice(128, 256)), 0.17),
    ("columns", "mean"): (higher(slice(None), slice(128, 256)), 0.158),
    ("expert", "slope"): (weighted(), 0.0169),
    ("expert of a token", "slope"): (weighted(20), 0.055),
    ("row of the first GEMM", "slope"): (scaled("gemm1"), 0.15),
    ("row of the second GEMM", "slope"): (scaled("gemm2"), 0.21),
    ("limit", "slope"): (activated(limit=7.035), 0.2),
    ("alpha", "slope"): (activated(alpha=1.73), 0.6),
    ("beta", "slope"): (activated(beta=1.01, alpha=1.695), 0.26),
    ELEMENT: (one_element, 0.25),
}


def problem_of(family):
    act = "swigluoai" if family[0] in ("limit", "alpha", "beta") else "silu"
    return make("mxint4", act=act, seed=3)


def noticed(output, problem):
    found = compare_moe(output, problem, diagnose=False)
    return {(a.family, a.kind) for a in found.aggregates} | (
        {ELEMENT} if found.wrong_tokens else set()
    )


@pytest.mark.parametrize("family", FAULTS, ids=" ".join)
def test_only_one_check_notices(family, monkeypatch):
    """Without it the wrong output passes."""
    problem = problem_of(family)
    right, (wrong, share) = solve(problem), FAULTS[family]
    output = (right + share * (wrong(problem) - right)).to(torch.bfloat16)
    assert noticed(output, problem) == {family}
    every = aggregates.families

    def others(*args):
        return [f for f in every(*args) if (f.name, f.kind) != family]

    monkeypatch.setattr(aggregates, "families", others)
    if family == ELEMENT:
        monkeypatch.setattr(
            "pytest_moe_routing.compare.moe._excess", lambda got, _: torch.zeros_like(got)
        )
    assert compare_moe(output, problem, diagnose=False).ok


def test_every_family_has_a_fault():
    found = {ELEMENT}
    for act in ("silu", "swigluoai", "gelu_tanh", "relu2", "swiglustep"):
        problem = make("mxint4", tokens=5, act=act, seed=3)
        output = solve(problem).to(torch.float64)
        for pipeline in pipelines(problem, FLASHINFER):
            spread = spread_moe(problem, pipeline)
            families = aggregates.families(output, spread, problem, range(5))
            found |= {(family.name, family.kind) for family in families}
    assert found == set(FAULTS)
