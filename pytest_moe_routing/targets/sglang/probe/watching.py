"""What SGLang's code makes and calls while a model's MoE block is built and run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe import weights
from pytest_moe_routing.targets.sglang.probe.around import PADDING
from pytest_moe_routing.targets.sglang.probe.remade import is_replaced
from pytest_moe_routing.targets.sglang.probe.requests import requested
from pytest_moe_routing.targets.sglang.probe.rule import line_of_model


@dataclass
class Seen:
    """What happened while a block was built and run."""

    #: The routing method that each MoE layer was given, and where.
    layers: list[tuple[Any, str]] = field(default_factory=list)
    block: Any = None
    #: Those layers themselves.
    made: list[Any] = field(default_factory=list)
    topks: list[Any] = field(default_factory=list)
    #: Where each TopK is made.
    places: list[str] = field(default_factory=list)
    #: The configs of the experts' runners that the block runs, in the order of their calls.
    runners: list[Any] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    #: The method of TopK that the block calls with those logits.
    forward: str = "forward_cuda"
    #: Shared experts that the layer has among the routed ones.
    shared: int = 0
    #: Whether the layer is told to weigh the experts' input.
    on_input: bool = False
    #: Arguments of the kernel's call that the layer was not prepared for.
    unprepared: list[str] = field(default_factory=list)
    #: What experts are given as a weight where TopK weighs 1.
    weight: float = 1.0

    @property
    def place(self) -> str:
        """Where the layer of experts is made, or else the TopK."""
        return self.layers[0][1] if self.layers else self.places[0]


@contextmanager
def watching(names: Names, seen: Seen) -> Iterator[None]:
    """Note what the model's code asks of FusedMoE and TopK, and the logits that it routes by."""
    layer, topk = names.get("layer"), names.get("topk")
    models = names.spelling("models").module
    make_layer, make_topk, call_topk = layer.__init__, topk.__init__, topk.forward_cuda
    call_layer = layer.forward
    signature = inspect.signature(make_layer)

    def layer_init(self: Any, *args: Any, **kwargs: Any) -> None:
        bound = signature.bind(self, *args, **kwargs)
        bound.apply_defaults()
        seen.layers.append((bound.arguments["routing_method_type"], line_of_model(models)))
        seen.shared = bound.arguments.get("num_fused_shared_experts") or 0
        seen.on_input = bool(bound.arguments.get("apply_router_weight_on_input"))
        make_layer(self, *args, **kwargs)
        seen.made.append(self)
        seen.unprepared = weights.stand_in_weights(names, self)

    def layer_call(
        self: Any, hidden_states: Tensor, topk_output: Any, *more: Any, **rest: Any
    ) -> Any:
        if not seen.topks and (router := requested("router")) is not None:
            # Code of the model has chosen the experts.
            config = stubs.known("config", top_k=self.top_k, routed_scaling_factor=None)
            logits = torch.zeros(len(hidden_states), self.num_experts)
            topk_output = router(router_logits=logits, topk_config=config)
        return call_layer(self, hidden_states, topk_output, *more, **rest)

    def topk_init(self: Any, *args: Any, **kwargs: Any) -> None:
        make_topk(self, *args, **kwargs)
        seen.topks[:] = [each for each in seen.topks if not is_replaced(each)]
        seen.topks.append(self)
        seen.places.append(line_of_model(models))

    def topk_call(self: Any, hidden_states: Tensor, router_logits: Tensor, **kwargs: Any) -> Any:
        if isinstance(router_logits, Tensor):
            router_logits = weights.recognisable(*router_logits.shape).to(router_logits.dtype)
            seen.logits.append(router_logits)
        if (tokens := requested(PADDING)) is not None:
            kwargs[PADDING] = tokens
        return call_topk(self, hidden_states, router_logits, **kwargs)

    def called(hidden_states: Tensor, _topk_output: Any, _config: Any) -> Tensor:
        return torch.ones_like(hidden_states)

    layer.__init__, topk.__init__, topk.forward_cuda = layer_init, topk_init, topk_call
    layer.forward = layer_call
    try:
        with experts_called(called):
            yield
    finally:
        layer.__init__, topk.__init__, topk.forward_cuda = make_layer, make_topk, call_topk
        layer.forward = call_layer


#: What is called in the place of SGLang's function that computes experts; the last one counts.
_functions: list[Callable[[Tensor, Any, Any], Tensor]] = []


def replace_function(names: Names) -> None:
    """Have all code that is imported from now on call `experts_called`'s function."""
    if not names.has("experts-function"):
        return
    signature = inspect.signature(names.get("experts-function"))

    def call(*args: Any, **given: Any) -> Tensor:
        bound = signature.bind(*args, **given)
        bound.apply_defaults()
        named = bound.arguments
        config = named["moe_runner_config"]
        return _functions[-1](named["hidden_states"], named["topk_output"], config)

    spelling = names.spelling("experts-function")
    setattr(import_module(spelling.module), spelling.path, call)


@contextmanager
def experts_called(function: Callable[[Tensor, Any, Any], Tensor]) -> Iterator[None]:
    """Have code of models that has no layer of experts call another function as SGLang's.

    Args:
        function: Takes hidden states, what TopK returned, and the config of the runner.
    """
    _functions.append(function)
    try:
        yield
    finally:
        _functions.pop()
