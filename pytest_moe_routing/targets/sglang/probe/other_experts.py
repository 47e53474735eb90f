"""Runs a model's MoE block with another runner than TRT-LLM's, up to FlashInfer's kernel.

SGLang's router is replaced by one that gives recognizable ids and weights. A layer's scales are in
memory of their own, so that a call shows which is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol, Unpack

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.recorder import plain, roles_of
from pytest_moe_routing.targets.sglang.probe.default_runner import FIELD, Checkpoint
from pytest_moe_routing.targets.sglang.probe.handed_over import Chosen, router
from pytest_moe_routing.targets.sglang.probe.ranks import EP_SIZE
from pytest_moe_routing.targets.sglang.probe.requests import requesting
from pytest_moe_routing.targets.sglang.probe.sources import Sources
from pytest_moe_routing.targets.sglang.probe.world import Call

#: What the attributes of a layer are to a kernel, see `flashinfer/given.yaml`.
_ROLES: Mapping[str, str] = {
    "w13_input_scale_quant": "fc1 quantization",
    "w13_blockscale_swizzled": "fc1 weights",
    "g1_alphas": "fc1 dequantization",
    "w2_input_scale_quant": "fc2 quantization",
    "w2_blockscale_swizzled": "fc2 weights",
    "g2_alphas": "fc2 dequantization",
    "fc1_dequant": "fc1 dequantization",
    "fc2_quant": "fc2 quantization",
    "fc2_dequant": "fc2 dequantization",
    "fc1_input_dequant": "fc1 input",
    "w13_weight_bias": "fc1 biases",
    "w2_weight_bias": "fc2 biases",
}
_OF_WEIGHTS = ("w13_blockscale_swizzled", "w2_blockscale_swizzled")


class _Blocks(Protocol):
    """What answers about the MoE blocks of a release; see `main.Blocks`."""

    names: Names
    sources: Sources
    calls: list[Call]

    def method_numbers(self) -> dict[str, int]: ...

    def rejection(self, server: Checkpoint, options: Mapping[str, Any]) -> str | None: ...

    def default_runner(self, **checkpoint: Unpack[Checkpoint]) -> str: ...

    def capture(
        self,
        architecture: str,
        config: dict[str, Any],
        scheme: str,
        quantization: Mapping[str, Any] | None,
        runner: str,
    ) -> dict[str, Any]: ...


def other_experts(
    blocks: _Blocks, *, server: Checkpoint, scale: float, served_as: str | None, **question: Any
) -> dict[str, Any]:
    """Return the call of the runner's kernel; no `calls` if a server does not accept the runner.

    Args:
        server: What a server is told to which no runner is named.
        scale: The factor by which a model's own code may multiply the weights.
        served_as: The value of `--quantization`.
        question: The arguments of `main.Blocks.capture`.

    Raises:
        Unsupported: The block calls no kernel of the runner, or cannot be run here.
    """
    runner = question["runner"]
    allowed = blocks.sources.accepted_quantizations(runner)
    if allowed is not None and served_as not in allowed:
        return {"calls": []}
    blocks.method_numbers()
    if blocks.rejection(server, {FIELD: runner}):
        return {"calls": []}
    chosen: list[Chosen] = []
    layers: list[Any] = []
    with requesting(router=router(blocks.names, chosen), prepared=partial(_keep, layers)):
        answer = blocks.capture(**question)
    switches = [] if _is_default(blocks, server, runner) else [f"--moe-runner-backend {runner}"]
    about = {
        "experts": f"{runner} runner",
        "device": "Blackwell",
        "switches": switches,
        "requests": bool(switches),
        "by": runner,
        "stored": question["scheme"],
        "has_biases": hasattr(layers[-1], "w13_weight_bias") if layers else False,
        "shards": EP_SIZE,
    }
    if answer["failed"]:
        raised = {"type": "forward", "message": answer["failed"], "where": "forward"}
        return {"calls": [{**about, "raised": raised}]}
    if not answer["by_choice"] or len(blocks.calls) != 1:
        raise Unsupported(answer["refused"] or f"the block calls {len(blocks.calls)} kernels")
    ((function, arguments),), (choice,) = blocks.calls, chosen
    entry = given_experts(function)
    if entry is None:
        raise Unsupported(f"not judged: the arguments of {function} are not known")
    named: dict[str, Tensor | None] = {"ids": choice.ids, "weights": choice.weights}
    if not isinstance(plain(arguments[entry.weights], named), dict):
        raise Unsupported(f"not judged: {entry.weights} is no tensor")
    scaled = 1.0
    if plain(arguments[entry.weights], named).get("is") is None:
        named["weights"] = choice.weights * scale
        scaled = scale if plain(arguments[entry.weights], named).get("is") else 1.0
    sources = ((role, getattr(layers[-1], name, None)) for name, role in _ROLES.items())
    known = {role: tensor for role, tensor in sources if isinstance(tensor, Tensor)}
    described = {name: plain(value, named) for name, value in arguments.items()}
    call: dict[str, Any] = {
        "function": function,
        "arguments": described,
        "roles": roles_of(arguments, known),
    }
    call |= {"router_factor": choice.factor * scaled, "scale_after": answer["scale_after"]}
    unprepared = [name for name in answer["unprepared"] if name in entry.parameters]
    return {"calls": [{**about, **call, "unprepared": unprepared}]}


def _keep(layers: list[Any], layer: Any) -> None:
    """Keep a prepared layer, with scales where loading a checkpoint would have made them."""
    for name in _OF_WEIGHTS:
        if hasattr(layer, name):
            layer._parameters.pop(name, None)
            # Four of them are read as one integer.
            setattr(layer, name, torch.ones(1, 1, 4, dtype=torch.uint8))
    layers.append(layer)


def _is_default(blocks: _Blocks, server: Checkpoint, runner: str) -> bool:
    """Return whether a server takes the runner by itself, as far as its code says."""
    try:
        return blocks.default_runner(**server) == runner
    except Unsupported:
        return False
