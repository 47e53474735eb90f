"""The stand-in of vLLM's MoE layer, which records what the code of a model asks of it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.targets.vllm.probe.world import world

#: Rows of the contract for what the code of a model calls to make its layer.
_LAYERS = ("code-layer", "code-shared-layer")


class Recorder(nn.Module):
    """The MoE layer's stand-in: remembers its arguments, and returns ones.

    Args:
        stated: The names of those that are no defaults of the layer.

    Attributes:
        logits, hidden_states: Those of the last call; None before the first.
        returned: What each element of the output is.
    """

    def __init__(
        self, arguments: Mapping[str, Any], hidden_size: int, stated: Collection[str] = ()
    ) -> None:
        super().__init__()
        self.arguments = arguments
        self.stated = frozenset(stated)
        self.hidden_size = hidden_size
        self.moe_config = SimpleNamespace(
            hidden_dim=arguments.get("hidden_size"),
            is_sequence_parallel=False,
            should_defer_moe_finalize=lambda num_tokens: False,
        )
        self.is_internal_router = arguments.get("gate") is not None
        self.logits: Tensor | None = None
        self.hidden_states: Tensor | None = None
        # In float32, so that a factor on it is not rounded.
        self.returned = torch.ones(())

    def forget(self) -> None:
        """Forget the last call."""
        self.logits = self.hidden_states = None

    def forward(self, hidden_states: Tensor, router_logits: Tensor, **_: Any) -> Tensor:
        # A layer that was given the gate calls it itself.
        if self.is_internal_router:
            router_logits, _bias = self.arguments["gate"](hidden_states)
        self.logits, self.hidden_states = router_logits, hidden_states
        return self.returned.repeat(len(hidden_states), self.hidden_size)


def _layers() -> Iterator[str]:
    """Yield the names by which the code of models makes its layers."""
    names = world().names
    return (names.spelling(key).path for key in _LAYERS if names.has(key))


@contextmanager
def recording(block: type, layers: list[Recorder], hidden_size: int) -> Iterator[None]:
    """Put recorders where the code of a block, and of what it derives from, makes MoE layers."""

    def recorder_of(real: Any) -> Callable[..., Recorder]:
        signature = inspect.signature(real)

        def make_recorder(*args: Any, **kwargs: Any) -> Recorder:
            bound = signature.bind(*args, **kwargs)
            stated = tuple(bound.arguments)
            bound.apply_defaults()
            layers.append(Recorder(bound.arguments, hidden_size, stated))
            return layers[-1]

        return make_recorder

    with ExitStack() as stack:
        for module in {sys.modules[cls.__module__] for cls in block.__mro__}:
            for name in _layers():
                if hasattr(module, name):
                    recorder = recorder_of(getattr(module, name))
                    stack.enter_context(patch.object(module, name, recorder))
        stack.enter_context(world().linear_layers(block))
        # Streams and events of a GPU that is not here; the work is done in order.
        stack.enter_context(patch.multiple(torch.cuda, Event=MagicMock, Stream=MagicMock))
        yield
