"""Gives a block the TopK that a decoder layer makes for it again, after the block was made.

Only Intern-S1-Pro's does: its base class makes Qwen3's block, and it replaces the block's TopK.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from torch import nn

from pytest_moe_routing.targets import stubs

#: The attribute of a decoder layer that is its block of experts.
_BLOCK = "mlp"
#: Among the arguments of a block, where the class is that makes its TopK again: module and name.
WITHIN = "within"
#: The attribute of a TopK that is replaced.
_REPLACED = "is_replaced"


class _Absent(nn.Module):
    """A part of a decoder layer that has nothing to do with experts."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def remade(block: nn.Module, known: Mapping[str, Any]) -> nn.Module:
    """Return a block after what its decoder layer's constructor does to it.

    Args:
        block: What the base class of the layer makes.
        known: The arguments of the block, `WITHIN` among them if a layer does something to it.
    """
    if WITHIN not in known:
        return block
    module, name = known[WITHIN]
    code = stubs.real_module(module)
    layer_class = getattr(code, name)

    def make(layer: nn.Module, config: Any, *_: Any, **__: Any) -> None:
        nn.Module.__init__(layer)
        setattr(layer, _BLOCK, block)
        layer.hidden_size = config.hidden_size

    parts: dict[str, Any] = {
        key: _Absent
        for key, part in vars(code).items()
        if inspect.isclass(part)
        and issubclass(part, nn.Module)
        and part.__module__ == module
        and part is not layer_class
    }
    for each in block.modules():
        setattr(each, _REPLACED, True)
    base = layer_class.__mro__[1]
    with patch.object(base, "__init__", make), patch.dict(vars(code), parts):
        layer_class(known["config"], known["layer_id"])
    return block


def is_replaced(topk: Any) -> bool:
    """Return whether a block's TopK was there when its decoder layer made another."""
    return bool(getattr(topk, _REPLACED, False))
