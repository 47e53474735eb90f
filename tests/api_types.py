"""What a type checker knows about the public names; `mypy` reads this file, and nothing runs it."""

from typing import assert_type

from torch import Tensor

import pytest_moe_routing as moe_routing
from pytest_moe_routing.reference.quantization import Quantized


def routing(ids: Tensor, weights: Tensor, case: moe_routing.RoutingCase) -> None:
    compared = moe_routing.assert_routing(ids, weights, case.logits, case.recipe, case.bias)
    assert_type(compared, moe_routing.RoutingComparison)
    assert_type(compared.ok, bool)
    assert_type(moe_routing.route(case.logits, case.recipe).topk_ids, Tensor)


def layer(output: Tensor, hidden: Tensor, made: moe_routing.Routing) -> None:
    experts = moe_routing.GeneratedExperts(8, 256, 128)
    problem = moe_routing.MoEProblem.of(
        hidden, experts, moe_routing.MoELayer.of("bf16"), routing=made
    )
    assert_type(problem.hidden, Quantized)
    assert_type(moe_routing.assert_moe(output, problem), moe_routing.MoEComparison)
    moe_routing.assert_moe(output, problem, precision="float32")  # type: ignore[call-arg]


def names() -> None:
    assert_type(moe_routing.__version__, str)
    assert_type(moe_routing.PATTERNS["plain"].shows, str)
    str(moe_routing.nothing)  # type: ignore[attr-defined]
