"""Runs vLLM's modular experts on marked tokens: prepare, experts, finalize, and a kernel between.

Everything but the kernel, the collectives and the quantization of activations is vLLM's own: the
layer's quantization method, the modular kernel, the step before the experts that vLLM makes for the
parallel config, the experts, and what is done with their output.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.targets import marked, scales
from pytest_moe_routing.targets.marked import Marked, Received, UnusableArgumentError
from pytest_moe_routing.targets.recorder import Reached, input_scale, returned
from pytest_moe_routing.targets.vllm.probe import factory
from pytest_moe_routing.targets.vllm.probe import release as release
from pytest_moe_routing.targets.vllm.probe.capture import counts_of_ranks, recorded
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES
from pytest_moe_routing.targets.vllm.probe.gates import experts_of
from pytest_moe_routing.targets.vllm.probe.layer import (
    HIDDEN,
    Layer,
    layer_of,
)
from pytest_moe_routing.targets.vllm.probe.method import methods_of
from pytest_moe_routing.targets.vllm.probe.prepared import prepare_finalize
from pytest_moe_routing.targets.vllm.probe.ranks import TOKENS, Ranks
from pytest_moe_routing.targets.vllm.probe.release import names


def capture_modular(model: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """Return what becomes of marked tokens on each way through the modular kernel.

    The ways are those of `capture`, and as rank 1 of 2 whose tokens are gathered first, where the
    experts take that. Besides what `capture` says of a call, it has whether its tokens were
    `dispatched`, and what `oracle.modular.misapplied` reads.

    Raises:
        Unsupported: The release has no such experts, or none that a layer calls.
    """
    names().require("modular", scheme)
    row = SCHEMES[scheme]
    experts = experts_of(row, modular=True)
    callers = methods_of(row.modular_methods, model)
    if not callers:
        raise Unsupported(f"no layer of this release calls {experts.__name__}")
    method = factory.classify(model)[0]
    ways = [(count, False) for count in counts_of_ranks(model)]
    if len(ways) > 1:
        ways.append((2, True))
    calls = []
    for count, dispatched in ways:
        for caller in callers:
            layer = layer_of(model, row, method, Ranks(count, dispatched))
            if not experts._supports_parallel_config(layer.config.moe_parallel_config):
                break
            way = {
                "by": caller.__qualname__.split(".")[0],
                "shards": count,
                "dispatched": dispatched,
                "intermediate_size": layer.sizes[1],
            }
            scales.quantized_by.clear()
            answer = Run(experts, caller, layer, dispatched).answer()
            calls.append({**way, **answer, **input_scale()})
    return {"calls": calls, "router_factor": release.router_factor(model)}


class Run:
    """One call of a layer's method.

    Args:
        make: Makes the layer's experts; None for those of the layer itself.
    """

    def __init__(
        self,
        experts: Any,
        caller: Any,
        layer: Layer,
        dispatched: bool,
        make: Callable[[], Any] | None = None,
    ) -> None:
        self._caller, self._layer, self._dispatched = caller, layer, dispatched
        self._experts = experts
        self._make = make or partial(layer.made, experts, caller)
        self._given = Marked.make(TOKENS, HIDDEN, layer.global_num_experts, layer.top_k)
        self._at_kernel = self._given.gathered() if dispatched else self._given
        self._reached: Reached | None = None
        self._received: Received | None = None
        self._unusable: UnusableArgumentError | None = None
        self._output: Tensor | None = None
        self._places: dict[str, str] = {}

    def answer(self) -> dict[str, Any]:
        """Run it, and say what came of it."""
        at = self._at_kernel
        chosen = {"ids": at.ids, "weights": at.weights, "packed": at.packed()}
        named = {**chosen, **self._layer.named_of_experts()}
        found = recorded(self._call, named, self._experts.__name__)
        if self._unusable is not None:
            found["unusable"] = vars(self._unusable)
        if self._received is not None and self._output is not None:
            found |= self._applied(self._received, self._output)
        return {**found, "places": self._places}

    @property
    def arguments(self) -> Mapping[str, Any]:
        """Those that the kernel was given; none if it was not called."""
        return {} if self._reached is None else self._reached.arguments

    def _call(self) -> None:
        """Run the layer's method; always ends in an exception, if the kernel is called."""
        layer = self._layer
        with patch.object(release, "answer", self._kernel), self._stand_ins():
            kernel, fused = None, self._make()
            if fused is not None:
                prepare = prepare_finalize(layer.config, fused)
                kernel = names().get("kernel")(prepare, fused)
                self._places = {
                    "prepare": _place(type(prepare).prepare),
                    "experts": _place(type(fused).apply),
                    "finalize": _place(type(prepare).finalize),
                }
            output, made_of = layer.hand_on(kernel, self._caller, self._given)
        if self._reached is not None:
            self._output, self._reached.output = output, made_of
            raise self._reached

    def _stand_ins(self) -> Any:
        """Replace what the experts' module has imported from others: a kernel, and the config."""
        module, found = vars(sys.modules[self._experts.__module__]), {}
        if names().has("pack"):
            # A Triton kernel in some releases.
            found[names().spelling("pack").path] = marked.pack
        config = names().spelling("vllm-config")
        if config.path in module:
            found[config.path] = getattr(import_module(config.module), config.path)
        return patch.dict(module, found)

    def _kernel(self, function: str, arguments: Mapping[str, Any]) -> Any:
        """Compute what FlashInfer's entry point computes, as far as it can be told."""
        at = release.line_of_call()
        self._reached, entry = Reached(function, arguments, at), given_experts(function)
        if entry is None and "topk_ids" not in arguments:
            raise self._reached
        if arguments.get("do_finalize") is False:
            raise Unsupported(
                f"not judged: {function} leaves the sum over the experts to its caller"
            )
        try:
            received = marked.given(arguments, entry) if entry else marked.routed(arguments)
        except UnusableArgumentError as error:
            self._unusable = error
            raise self._reached from None
        self._received = received
        output = received.output.bfloat16()
        # That of the last token is the shared experts'.
        output[[0, -1] if self._dispatched else [-1]] = 0
        return returned(function, arguments, output)

    def _applied(self, received: Received, output: Tensor) -> dict[str, Any]:
        """How often the weight was applied before, in and after the kernel, and what came out."""
        layer, at, given = self._layer, self._at_kernel, self._given
        on_input = layer.apply_router_weight_on_input
        local = layer.local_num_experts
        first = layer.global_num_experts - local
        wanted = given.output(first, local, on_input=on_input)
        # Of several experts a token has no one weight.
        is_one = layer.top_k == 1
        per_token = given.weights[:-1] if is_one else 1.0
        at_token = at.weights if is_one else 1.0
        ones, mine = torch.ones_like(at.weights), received.output[-len(given.hidden) : -1]
        factor = layer.routed_scaling_factor
        return {
            "applied": {
                "prepare": marked.times(received.hidden, at.hidden.float(), at_token, factor),
                "experts": marked.times(received.weights, ones, at.weights, factor),
                "finalize": marked.times(output[:-1].float(), mine, per_token, factor),
            },
            "same": marked.times(output[:-1].float(), wanted[:-1]) is not None,
        }


def _place(function: Any) -> str:
    """Where a function of vLLM begins, and its name."""
    code = inspect.unwrap(function).__code__
    return f"{release.vllm_path(code.co_filename)}:{code.co_firstlineno} {function.__qualname__}"
