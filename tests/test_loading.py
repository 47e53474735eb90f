"""Which tensors of a block the weights of a checkpoint fill."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pytest_moe_routing.targets.layers import is_loaded


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
