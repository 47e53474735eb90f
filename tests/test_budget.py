"""The error budget's terms, each against what it stands for."""

import math
from dataclasses import replace

import pytest
import torch

from pytest_moe_routing.compare import compare_moe
from pytest_moe_routing.compare.budget import (
    FLASHINFER,
    Bounded,
    _activation_error,
    _store,
    bounded_moe,
)
from pytest_moe_routing.logits import bell
from pytest_moe_routing.reference.moe import MoELayer, Stages
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.quantization import quantize
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.weights import Expert

#: Nothing is rounded between the sums.
EXACT = replace(FLASHINFER, intermediate=0.0)


def summed(sign):
    """One expert without rounding, whose products all have one sign: partial sums grow and grow."""
    layer = MoELayer.of("float32", "relu2")
    gemm1 = quantize(bell(32, 4096, seed=1).abs() / 64, "float32")
    gemm2 = quantize(sign * bell(4096, 32, seed=2).abs(), "float32")
    routing = Routing(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1))
    hidden = bell(3, 4096, seed=3).abs()
    return MoEProblem.of(hidden, [Expert(gemm1, gemm2)], layer, routing)


def one_by_one(problem, cut=0.0):
    """float32, one product after the other; each sum may lose a share of itself."""
    expert = problem.experts[0]

    def dot(x, matrix):
        total = torch.zeros(len(x), len(matrix))
        for k in range(x.shape[1]):
            total = (total + x[:, k : k + 1] * matrix[:, k]) * (1 - cut)
        return total

    inner = dot(problem.hidden.data, expert.gemm1.data).clamp_min(0) ** 2
    return dot(inner, expert.gemm2.data)


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_in_float32_lie_within_the_accumulators_budget(sign):
    problem = summed(sign)
    output = one_by_one(problem)
    found = compare_moe(output, problem, arithmetic=EXACT, output_format="float32", diagnose=False)
    assert not found.wrong_tokens, found.message()
    assert found.use > 0.01


def test_the_budget_of_negative_sums_is_that_of_positive_ones():
    bounds = [
        bounded_moe(p.hidden, p.experts, p.routing, p.layer, EXACT, output="float32")
        for p in (summed(1), summed(-1))
    ]
    assert torch.equal(bounds[0].value, -bounds[1].value)
    assert bounds[0].error.min() > 0
    torch.testing.assert_close(bounds[0].error, bounds[1].error)


def test_sums_of_less_than_float32_do_not():
    """Accumulators of 14 bits, as those of Hopper's FP8 tensor cores."""
    problem = summed(1)
    output = one_by_one(problem, 2.0**-15)
    found = compare_moe(output, problem, arithmetic=EXACT, output_format="float32", diagnose=False)
    assert found.wrong_tokens == 3


@pytest.mark.parametrize("gate", [-3.0, -0.01, 0.0, 1e-6, 0.5, 4.0])
@pytest.mark.parametrize("error", [1e-5, 1e-3, 0.1])
def test_no_gate_and_sigmoid_within_their_errors_exceed_the_activations_budget(gate, error):
    act = MoELayer.of("bf16", "silu")
    x = torch.tensor([[gate, 2.0]], dtype=torch.float64)
    value = gate / (1 + math.exp(-gate)) * 2.0
    stages = Stages(x, x, torch.tensor([[value]], dtype=torch.float64), x, x, x)
    bounded = Bounded(x, torch.tensor([[error, 0.0]], dtype=torch.float64))
    budget = _activation_error(bounded, act, stages, EXACT).item()
    reached = max(
        abs(2.0 * (gate + move) * (1 / (1 + math.exp(-gate - move)) + off) - value)
        for move in (-error, 0.0, error)
        for off in (-2.5e-4, 0.0, 2.5e-4)
    )
    # Twice half of the largest second derivative of the functions, which is 0.8 of gelu.
    assert reached <= budget <= 1.05 * reached + 2 * 0.8 / 2 * error**2 + 1e-9


@pytest.mark.parametrize(("ulps", "crosses"), [(2.0, True), (4.0, False)])
def test_a_quotient_by_a_scale_may_be_off_by_two_approximate_reciprocals(ulps, crosses):
    """1.1875 lies between 1.125 and 1.25 of E4M3; its own last place is 2**-23."""
    x = torch.tensor([[1.1875 - ulps * 2.0**-23]], dtype=torch.float64)
    stored = _store(x, torch.zeros_like(x), "fp8", 1.0, FLASHINFER)
    assert stored.value.item() == 1.125
    assert stored.error.item() == (0.125 if crosses else 0.0)
