"""Which tensors of a block the weights of a checkpoint fill."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.layers import is_loaded, loaded_dtype


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(8, dtype=torch.float32))
        self.register_buffer("table", torch.zeros(4, 8))


class Router(nn.Module):
    """A router that reads what it is made with."""

    def __init__(self, bias):
        super().__init__()
        self.bias = bias


def block_of(read):
    block = nn.Module()
    block.gate = Gate()
    block.router = Router(read(block.gate))
    return block


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (lambda gate: gate.bias, True),
        (lambda gate: gate.bias.data, True),
        # A conversion to the dtype that a tensor has makes no copy.
        (lambda gate: gate.bias.to(torch.float32), True),
        (lambda gate: gate.table[1], True),
        (lambda gate: gate.bias.to(torch.bfloat16), False),
        (lambda gate: gate.bias.detach().clone(), False),
        # No weight of a checkpoint has the name of the router's own parameter.
        (lambda gate: nn.Parameter(gate.bias.to(torch.bfloat16)), False),
    ],
)
def test_a_copy_is_not_loaded(read, expected):
    block = block_of(read)
    assert is_loaded(block.router.bias, block, block.router) is expected
    # As a loader of weights does.
    with torch.no_grad():
        block.gate.bias.fill_(3)
        block.gate.table.fill_(3)
    assert (block.router.bias == 3).all().item() is expected


def copying(parameter, weight):
    parameter.data.copy_(weight)


def rounding(parameter, weight):
    parameter.data.copy_(weight.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("loader", "dtype"),
    [(None, torch.float32), (copying, torch.float32), (rounding, torch.bfloat16)],
)
@pytest.mark.parametrize("read", [lambda bias: bias, lambda bias: bias.data, lambda bias: bias[:]])
@pytest.mark.parametrize("default", [torch.float32, torch.bfloat16])
def test_a_loader_may_round_what_it_is_given(loader, dtype, read, default):
    block = block_of(lambda gate: gate.bias)
    if loader is not None:
        block.gate.bias.weight_loader = loader
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        assert loaded_dtype(read(block.gate.bias), block) is dtype
    finally:
        torch.set_default_dtype(before)
    # What the parameter held, it holds.
    assert not block.gate.bias.any()


def test_a_bias_that_is_stored_in_bfloat16_keeps_its_dtype():
    block = nn.Module()
    block.bias = nn.Parameter(torch.zeros(8, dtype=torch.bfloat16))
    block.bias.weight_loader = rounding
    assert loaded_dtype(block.bias, block) is torch.bfloat16


def test_a_loader_that_does_something_else_is_not_judged():
    block = block_of(lambda gate: gate.bias)
    block.gate.bias.weight_loader = lambda parameter, weight: parameter.data.copy_(-weight)
    with pytest.raises(Unsupported, match="makes of a bias is not known"):
        loaded_dtype(block.gate.bias, block)
