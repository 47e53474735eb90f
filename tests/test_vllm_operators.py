"""vLLM's compiled operators in torch, on numbers whose result is worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.operators import in_torch

#: Logits, by the function that scores them.
LOGITS = {
    "topk_softmax": [math.log(x) for x in (0.5, 0.25, 0.125, 0.125)],
    "topk_sigmoid": [math.log(x / (1 - x)) for x in (0.5, 0.25, 0.125, 0.125)],
    "topk_hash_softplus_sqrt": [math.log(math.expm1(x**2)) for x in (0.5, 0.25, 0.125, 0.125)],
}


def flat(name, **arguments):
    weights, ids = torch.empty(1, 2), torch.empty(1, 2, dtype=torch.int32)
    nothing, logits = torch.empty(1, 2), torch.tensor([LOGITS[name]], dtype=torch.float64)
    in_torch("cuda")[name](weights, ids, nothing, logits, **arguments)
    return ids[0].tolist(), weights[0].tolist()


@pytest.mark.parametrize("name", LOGITS)
@pytest.mark.parametrize(
    ("arguments", "ids", "weights"),
    [
        ({}, [0, 1], [0.5, 0.25]),
        ({"renormalize": True}, [0, 1], [2 / 3, 1 / 3]),
        ({"routed_scaling_factor": 2.5}, [0, 1], [1.25, 0.625]),
        ({"e_score_correction_bias": torch.tensor([0.0, 0, 0, 1])}, [3, 0], [0.125, 0.5]),
    ],
    ids=["plain", "renormalize", "factor", "bias"],
)
def test_operators_without_groups(name, arguments, ids, weights):
    found = flat(name, **arguments)
    assert found == (ids, pytest.approx(weights, rel=1e-5))


def test_a_table_of_experts_is_not_computed():
    with pytest.raises(Unsupported, match="experts are looked up in a table, not chosen by logits"):
        flat("topk_hash_softplus_sqrt", hash_indices_table=torch.zeros(1, 2))


@pytest.mark.parametrize("scoring_func", [0, 1], ids=["scores", "logits"])
@pytest.mark.parametrize(
    ("kept", "renormalize", "factor", "bias", "ids", "weights"),
    [
        # The second group has the larger sum, 1.1 against 1.
        (1, False, 1.0, [0.0, 0, 0, 0], [2, 3], [0.6, 0.5]),
        (1, True, 2.0, [0.0, 0, 0, 0], [2, 3], [12 / 11, 10 / 11]),
        (1, False, 1.0, [0.0, 1, 0, 0], [1, 0], [0.1, 0.9]),
        (2, False, 1.0, [0.0, 0, 0, 0], [0, 2], [0.9, 0.6]),
    ],
)
def test_the_operator_with_groups(scoring_func, kept, renormalize, factor, bias, ids, weights):
    given = torch.tensor([[0.9, 0.1, 0.6, 0.5]], dtype=torch.float64)
    given = given.logit() if scoring_func else given
    operator = in_torch("cuda")["grouped_topk"]
    got = operator(given, 2, kept, 2, renormalize, factor, torch.tensor(bias), scoring_func)
    assert got[0][0].tolist() == pytest.approx(weights, rel=1e-6)
    assert (got[1][0].tolist(), got[1].dtype) == (ids, torch.int32)


@pytest.mark.parametrize(
    ("on_output", "weights"), [(False, [2 / 3, 1 / 3]), (True, [5 / 3, 2.5 / 3])]
)
def test_the_operator_of_cpus(on_output, weights):
    logits = torch.tensor([LOGITS["topk_sigmoid"]], dtype=torch.float64)
    got = in_torch("cpu")["biased_topk_cpu"](
        None, logits, torch.zeros(4), 2, True, "sigmoid", 0, 2.5, on_output
    )
    assert got[0][0].tolist() == pytest.approx(weights, rel=1e-6)
    assert (got[1][0].tolist(), got[1].dtype) == ([0, 1], torch.int32)
