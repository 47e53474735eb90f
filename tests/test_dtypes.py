"""Through which dtypes router logits go, whatever computes them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Linear, Parameter, functional

from pytest_moe_routing.targets.dtypes import Dtypes

TOKENS, HIDDEN, EXPERTS = 4, 8, 16
BF16 = torch.bfloat16
X = torch.ones(TOKENS, HIDDEN, dtype=BF16)
GATE = torch.ones(EXPERTS, HIDDEN, dtype=BF16)


def in_a_buffer():
    buffer = torch.zeros(2 * TOKENS, EXPERTS)
    buffer[:TOKENS].copy_(X @ GATE.t())
    return buffer


ROUNDED = {
    "a module": lambda: Linear(HIDDEN, EXPERTS, dtype=BF16)(X).float(),
    "F.linear": lambda: functional.linear(X, GATE).float(),
    "F.linear with a bias": lambda: functional.linear(
        X, GATE, torch.zeros(EXPERTS, dtype=BF16)
    ).float(),
    "F.linear of a batch": lambda: functional.linear(X[None], GATE).float(),
    "torch.matmul": lambda: torch.matmul(X, GATE.t()).float(),
    "torch.mm": lambda: torch.mm(X, GATE.t()).to(torch.float32),
    "torch.mm to a buffer": lambda: torch.mm(
        X, GATE.t(), out=torch.empty(TOKENS, EXPERTS, dtype=BF16)
    ).float(),
    "torch.addmm": lambda: torch.addmm(torch.zeros(EXPERTS, dtype=BF16), X, GATE.t()).float(),
    "torch.bmm": lambda: torch.bmm(X[None], GATE.t()[None])[0].float(),
    "einsum": lambda: torch.einsum("th,eh->te", X, GATE).float(),
    "@": lambda: (X @ GATE.t()).type(torch.float32),
    "@ from the left": lambda: (GATE @ X.t()).t().float(),
    "a sum": lambda: (X[:, None] * GATE).sum(-1).float(),
    "a copy": in_a_buffer,
    "a cast afterwards": lambda: (X.float() @ GATE.float().t()).to(BF16).float(),
    "a scaled product": lambda: (X @ GATE.t() * 2).float() + 1,
}


@pytest.mark.parametrize("way", ROUNDED)
def test_logits_that_were_bfloat16_are_noticed(way):
    with torch.no_grad(), Dtypes() as dtypes:
        logits = ROUNDED[way]()
    assert logits.dtype is torch.float32
    assert dtypes.of(logits) == {"bfloat16", "float32"}


def test_what_the_factors_were_is_theirs():
    """Hidden states are bfloat16, also those that a product made."""
    with torch.no_grad(), Dtypes() as dtypes:
        narrow = X @ torch.ones(HIDDEN, HIDDEN, dtype=BF16)
        logits = functional.linear(narrow.float(), GATE.float())
        widened = narrow.float()
    assert dtypes.of(logits) == {"float32"}
    assert dtypes.of(widened) == {"bfloat16", "float32"}
    assert dtypes.of(X) == set()


def test_another_dtype_is_named():
    with torch.no_grad(), Dtypes() as dtypes:
        logits = (X.float() @ GATE.float().t()).half().float()
    assert dtypes.of(logits) == {"float16", "float32"}


def weight_of(dtype):
    """A block whose router's weight has this dtype."""
    block = Linear(HIDDEN, EXPERTS, bias=False)
    block.weight = Parameter(GATE.to(dtype))
    return block


@pytest.mark.parametrize(
    ("dtype", "through", "product"),
    [
        (torch.float32, {"float32"}, lambda w: X.float() @ w.t()),
        (torch.float32, {"float32"}, lambda w: functional.linear(X.float(), w).bfloat16().float()),
        (BF16, {"bfloat16", "float32"}, lambda w: functional.linear(X.float(), w.float())),
        (BF16, {"bfloat16"}, lambda w: (X @ w.t()).float()),
        (torch.float32, {"bfloat16", "float32"}, lambda w: X.float() @ w.to(BF16).float().t()),
        (torch.float32, {"float32"}, lambda w: torch.einsum("th,eh->te", X.float(), w) * 2 + 1),
        (torch.float32, set(), lambda w: X.float() @ GATE.float().t()),
    ],
)
def test_the_dtypes_of_the_weight_are_told(dtype, through, product):
    block = weight_of(dtype)
    with torch.no_grad(), Dtypes() as dtypes:
        logits = product(block.weight)
    assert dtypes.of_weight(logits, block) == through


def test_a_weight_of_an_earlier_product_and_a_bias_are_not_the_routers():
    block = torch.nn.Sequential(
        Linear(HIDDEN, HIDDEN, dtype=BF16), Linear(HIDDEN, EXPERTS, dtype=torch.float32)
    )
    block[1].bias = Parameter(torch.zeros(EXPERTS, dtype=BF16))
    with torch.no_grad(), Dtypes() as dtypes:
        logits = functional.linear(block[0](X).float(), block[1].weight, block[1].bias.float())
    assert dtypes.of_weight(logits, block) == {"float32"}
