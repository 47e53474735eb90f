"""Runs the MoE block of a model: all of its weights are zero, and so are its hidden states."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

#: More than the largest batch of any special gate kernel.
TOKENS = 64


class Same(nn.Module):
    """A part of a decoder layer that returns the hidden states that it is given."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, *, hidden_states: Tensor, **_: Any) -> Tensor:
        return hidden_states


@contextmanager
def in_bfloat16() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def clear(block: nn.Module, ones: Iterable[str] = ()) -> None:
    """Set all weights of a block to zero.

    Args:
        ones: Those that multiply the whole output, and are one.
    """
    for tensor in (*block.parameters(), *block.buffers()):
        tensor.data.zero_()
    for name in ones:
        getattr(block, name).data.fill_(1)


def run(block: nn.Module, hidden_size: int, **arguments: Any) -> Tensor:
    """Return the block's output, which is its MoE layer's up to a factor: all else is zero.

    Args:
        arguments: Those of the block besides the hidden states.
    """
    names = list(inspect.signature(block.forward).parameters)
    hidden = "hidden_states" if "hidden_states" in names else names[0]
    usual = {
        "positions": torch.arange(TOKENS),
        "residual": None,
        hidden: torch.zeros(TOKENS, hidden_size, dtype=torch.bfloat16),
    }
    given = {**{name: value for name, value in usual.items() if name in names}, **arguments}
    with torch.no_grad():
        output = block(**given)
    if isinstance(output, tuple):
        # A decoder layer returns the residual as well.
        output = output[0]
    if not isinstance(output, Tensor):
        raise TypeError(f"forward returns {type(output).__name__}")
    return output
