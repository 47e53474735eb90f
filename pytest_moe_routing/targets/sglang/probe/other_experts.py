"""Runs a model's MoE block with another runner than TRT-LLM's, up to FlashInfer's kernel.

SGLang's router is replaced by one that gives recognizable ids and weights. A layer's scales are in
memory of their own, so that a call shows which is which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import preparation
from pytest_moe_routing.flashinfer.given import given_experts, refused_on
from pytest_moe_routing.targets.recorder import plain, roles_of
from pytest_moe_routing.targets.sglang.probe.device import BLACKWELL, DEVICES
from pytest_moe_routing.targets.sglang.probe.handed_over import Chosen, router
from pytest_moe_routing.targets.sglang.probe.other_ways import Blocks, Told, Way, accepted
from pytest_moe_routing.targets.sglang.probe.ranks import EP_SIZE
from pytest_moe_routing.targets.sglang.probe.requests import MARKED, Own, requesting

#: What the attributes of a layer are to a kernel, see `flashinfer/given.yaml`. Where a layer has
#: several of one role, it hands over the last.
_ROLES: Mapping[str, str] = {
    "w13_weight_scale": "fc1 weights",
    "w13_weight_scale_inv": "fc1 weights",
    "w2_weight_scale": "fc2 weights",
    "w2_weight_scale_inv": "fc2 weights",
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
#: What FlashInfer's documentation of Humming's weights has their residuals multiplied by.
_HUMMING = 64.0
#: How the names of FlashInfer's runners begin.
_FLASHINFER = "flashinfer"
_OF_WEIGHTS = ("w13_blockscale_swizzled", "w2_blockscale_swizzled")


class _InAnyOrder(Own):
    """The functions that order weights and scales, of which FlashInfer's leave them as they are."""

    _FUNCTIONS: ClassVar[Mapping[str, Callable[..., Any]]] = {
        **dict.fromkeys(preparation.HOPPER, lambda x, *_, **__: x),
        "block_scale_interleave": lambda scales: scales,
        "preprocess_moe_weights_for_sm90_mixed_gemm_humming": lambda weight, scales: (
            *(weight, scales),
            preparation.residual(scales),
        ),
    }

    def get(self, name: str, other: Any) -> Any:
        """Return one of them, or else another function."""
        return self._FUNCTIONS.get(name) or super().get(name, other)


def other_experts(blocks: Blocks, *, scale: float, told: Told, **question: Any) -> dict[str, Any]:
    """Return the call of the kernel on each way on which a server accepts the runner.

    Args:
        scale: The factor by which a model's own code may multiply the weights.
        question: The arguments of `main.Blocks.capture` but for the runner.

    Raises:
        Unsupported: The block calls no kernel of the runner, or cannot be run here.
    """
    calls = []
    for way, switches in accepted(blocks, told):
        if told["elsewhere"] and not _may_call(blocks, way["runner"], question):
            continue
        call = _call(blocks, way, scale, question, elsewhere=told["elsewhere"])
        # A server that does not start with a runner that is named has rejected it.
        if not (call.pop("rejected", False) and switches):
            calls.append({**call, "switches": switches, "requests": bool(switches)})
    return {"calls": calls}


def options_of(blocks: Blocks, way: Way) -> dict[str, Any]:
    """Return what a block is requested to be run with on a way, besides its router."""
    options = dict[str, Any](way["options"])
    if way["device"] != BLACKWELL:
        # Weights are prepared from beginning to end, and `layouts` looks at their order.
        options[MARKED] = _InAnyOrder(blocks.names)
    return options


def _may_call(blocks: Blocks, runner: str, question: Mapping[str, Any]) -> bool:
    """Return whether a layer that a server makes for a runner may call FlashInfer's kernels."""
    try:
        return blocks.layer_runner(**question, runner=runner).startswith(_FLASHINFER)
    except Unsupported:
        # Of a layer that calls kernels without a runner, the run will tell.
        return runner.startswith(_FLASHINFER)


def _call(
    blocks: Blocks, way: Way, scale: float, question: Mapping[str, Any], *, elsewhere: bool
) -> dict[str, Any]:
    """Return the call of the kernel on one way, which a server that does not start has `rejected`.

    Args:
        elsewhere: Whether no kernel of FlashInfer's is known to serve the checkpoint.
    """
    chosen: list[Chosen] = []
    layers: list[Any] = []
    runner, options = way["runner"], options_of(blocks, way)
    kept = partial(_keep, layers)
    with requesting(router=router(blocks.names, chosen), prepared=kept, **options):
        answer = blocks.capture(**question, runner=runner)
    about = {
        "experts": f"{runner} runner",
        "device": way["device"],
        "by": runner,
        "stored": way["stored"],
        "has_biases": hasattr(layers[-1], "w13_weight_bias") if layers else False,
        "shards": EP_SIZE,
    }
    is_rejected = elsewhere and answer["refused"] is not None and not blocks.calls
    if answer["failed"] or is_rejected:
        told = answer["failed"] or answer["refused"]
        raised = {"message": told, "where": "", "code": answer["raised_in"]}
        kind = "start" if is_rejected else "forward"
        return {**about, "raised": {"type": kind, **raised}, "rejected": is_rejected}
    if elsewhere:
        function = blocks.calls[-1][0]
        return {**about, "elsewhere": True, "function": function}
    capability = "{}.{}".format(*DEVICES[way["device"]])
    calls_trtllm = any(given_experts(function) is None for function, _ in blocks.calls)
    if calls_trtllm and refused_on(None, question["scheme"], capability) is not None:
        return {**about, "capability": capability}
    if not answer["by_choice"] or len(blocks.calls) != 1:
        raise Unsupported(answer["refused"] or f"the block calls {len(blocks.calls)} kernels")
    # A block is run twice if that decides where its shared experts are; the last run counts.
    ((function, arguments),), choice = blocks.calls, chosen[-1]
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
    roles = roles_of(arguments, known)
    if way["options"]:
        _name_residuals(roles, arguments, layers[-1])
    call: dict[str, Any] = {"function": function, "arguments": described, "roles": roles}
    call |= {"router_factor": choice.factor * scaled, "scale_after": answer["scale_after"]}
    unprepared = [name for name in answer["unprepared"] if name in entry.parameters]
    return {**about, **call, "unprepared": unprepared, "at": blocks.calls[0].at}


def _name_residuals(
    roles: dict[str, list[str | None]], arguments: Mapping[str, Any], layer: Any
) -> None:
    """Name the factors of experts that come of their block scales, or that do not."""
    residuals = {}
    for gemm, name in (("fc1", "w13"), ("fc2", "w2")):
        of_blocks = (getattr(layer, f"{name}_weight_scale{end}", None) for end in ("", "_inv"))
        scales = next(each for each in of_blocks if each is not None)
        residuals[f"{gemm} residual"] = _HUMMING * preparation.residual(scales.view(torch.uint8))
    for argument, found in roles.items():
        for at, role in enumerate(found):
            value = arguments[argument][at] if isinstance(arguments[argument], list) else None
            if role is None and isinstance(value, Tensor) and value.ndim:
                same = (name for name, factor in residuals.items() if torch.equal(value, factor))
                found[at] = next(same, "other values")


def _keep(layers: list[Any], layer: Any) -> None:
    """Keep a prepared layer, with scales where loading a checkpoint would have made them."""
    for name in _OF_WEIGHTS:
        if hasattr(layer, name):
            layer._parameters.pop(name, None)
            # Four of them are read as one integer.
            setattr(layer, name, torch.ones(1, 1, 4, dtype=torch.uint8))
    layers.append(layer)
