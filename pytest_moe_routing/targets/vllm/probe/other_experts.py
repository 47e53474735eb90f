"""Runs modular experts that call other kernels of FlashInfer than TRT-LLM's, on marked tokens.

They are run as `modular` runs TRT-LLM's, and only where a selector of the release takes them: on
each GPU that they are for, by default or for `--moe-backend`, with expert parallelism and without
it. Each of their scales is in memory of its own, so that a call shows which is which, and those of
whole tensors have the values of `targets.scales`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.given import refused_on
from pytest_moe_routing.targets import scales
from pytest_moe_routing.targets.recorder import roles_of
from pytest_moe_routing.targets.vllm.probe import factory, server_defaults
from pytest_moe_routing.targets.vllm.probe.capture import counts_of_ranks
from pytest_moe_routing.targets.vllm.probe.choice import (
    Selector,
    experts_taken,
    on_capability,
    selector_of,
)
from pytest_moe_routing.targets.vllm.probe.config import (
    NoActivation,
    activation_parameters,
    parallel_config,
)
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES, ServedScheme
from pytest_moe_routing.targets.vllm.probe.factory import Ranks
from pytest_moe_routing.targets.vllm.probe.gates import quant_keys
from pytest_moe_routing.targets.vllm.probe.layer import Layer, layer_of
from pytest_moe_routing.targets.vllm.probe.method import methods_of
from pytest_moe_routing.targets.vllm.probe.modular import Run
from pytest_moe_routing.targets.vllm.probe.release import names


@dataclass(frozen=True)
class _Kind:
    """One class of experts.

    Attributes:
        key: Its row of the contract.
        backend: The value of `--moe-backend` that asks for it.
        function: The entry point of FlashInfer that it calls.
    """

    key: str
    backend: str
    function: str


@dataclass(frozen=True)
class _Way:
    """How a server runs a layer, and the flags that make it do so."""

    ranks: Ranks
    flags: tuple[str, ...] = ()


_KINDS = (_Kind("modular-flashinfer-cutlass", "flashinfer_cutlass", "cutlass_fused_moe"),)
#: The compute capability of each GPU that the selectors are asked for.
_DEVICES = {"Blackwell": (10, 0), "Hopper": (9, 0)}
_EXPERT_PARALLEL = "--enable-expert-parallel"
_WAYS = (
    _Way(Ranks()),
    _Way(Ranks(2), (_EXPERT_PARALLEL, "--tensor-parallel-size 2")),
    _Way(Ranks(2, dispatched=True), (_EXPERT_PARALLEL, "--data-parallel-size 2")),
)
#: What the arguments of a quantization config are to a kernel, see `flashinfer/given.yaml`.
_ROLES: Mapping[str, str] = {
    "w1_scale": "fc1 weights",
    "w2_scale": "fc2 weights",
    "g1_alphas": "fc1 dequantization",
    "g2_alphas": "fc2 dequantization",
    "a1_gscale": "fc1 quantization",
    "a2_gscale": "fc2 quantization",
    "a1_scale": "fc1 input",
    "a2_scale": "fc2 input",
    "w1_bias": "fc1 biases",
    "w2_bias": "fc2 biases",
}
#: The scales that all experts share. Others have one value for each expert, those of weights more.
_UNQUANTIZED_ACTIVATIONS = "mxfp4_bf16"
_SHARED = {"float8_e4m3fn": ("a1_scale", "a2_scale", "a1_gscale", "a2_gscale")}
_OF_WEIGHTS = ("w1_scale", "w2_scale")
_BIASES = ("w1_bias", "w2_bias")
#: Schemes whose methods give a layer the biases of its experts.
_WITH_BIASES = ("bf16", "fp8_block", "mxfp4")
#: What a record has besides where the kernel cannot be called.
_NO_CALL: Mapping[str, Any] = {"by": "", "has_biases": False}
_OF_BOTH = ("g1_alphas", "g2_alphas", "a1_gscale", "a2_gscale")


def other_experts(model: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """Return what becomes of marked tokens in each class that a server takes for the model.

    Each of the `calls` is as those of `capture_modular`, with the name of the `experts`, the
    `device`, the `switches` that a user needs, what the call is `stored` as (see
    `flashinfer/given.yaml`) and the `roles` of its tensors. Where FlashInfer does not run the
    kernel, nothing is run, and the record has the `capability` of the GPU.

    Raises:
        Unsupported: The release has no such experts, or nothing that chooses them.
    """
    if SCHEMES[scheme].modular is None:
        return {"calls": []}
    names().require("modular", scheme)
    if not _kinds(scheme):
        return {"calls": []}
    row, method = SCHEMES[scheme], factory.classify(model)[0]
    try:
        selector = selector_of(model, scheme, method)
    except NoActivation:
        return {"calls": []}
    callers = methods_of(row.modular_methods, model)
    if selector is None or not callers:
        raise Unsupported("no selector of this release chooses modular experts for the scheme")
    calls = []
    for (kind, stored), devices in _kinds(scheme).items():
        experts = names().get(kind.key)
        for way in _ways(model):
            found = []
            for device in devices:
                with on_capability(*_DEVICES[device]):
                    switches = _switches(selector, kind, experts, way)
                if switches is None:
                    continue
                about = {"experts": experts.__name__, "device": device, "stored": stored}
                about |= {"switches": switches, "requests": switches != list(way.flags)}
                capability = "{}.{}".format(*_DEVICES[device])
                if refused_on(kind.function, stored, capability) is None:
                    found.append(about)
                else:
                    about |= {"function": kind.function, "capability": capability}
                    calls.append({**about, **_NO_CALL, "shards": way.ranks.count})
            if not found:
                continue
            # A class is the same on each of them: the one is taken that needs the least.
            about = min(found, key=lambda about: (len(about["switches"]), about["device"]))
            with on_capability(*_DEVICES[about["device"]]):
                layer = layer_of(model, row, method, way.ranks)
                calls.append({**about, **_call(experts, callers[0], layer, way, stored)})
    return {"calls": calls}


@cache
def _kinds(scheme: str) -> dict[tuple[_Kind, str], list[str]]:
    """Return the GPUs of each class that a release has for a scheme, and how it stores that.

    Cached, as a release does not change.
    """
    found: dict[tuple[_Kind, str], list[str]] = {}
    for kind in _KINDS:
        for device in _DEVICES if names().has(kind.key) else ():
            with on_capability(*_DEVICES[device]):
                stored = _stored(names().get(kind.key), scheme)
            if stored:
                found.setdefault((kind, stored), []).append(device)
    return found


def _ways(model: Mapping[str, Any]) -> Iterator[_Way]:
    counts = counts_of_ranks(model)
    yield from (way for way in _WAYS if way.ranks.count in counts)


def _stored(experts: Any, scheme: str) -> str:
    """Return how a class of experts has the scheme on this GPU; nothing if it does not."""
    weight, activation = quant_keys(SCHEMES[scheme])
    if experts._supports_current_device():
        if experts._supports_quant_scheme(weight, activation):
            return scheme
        if scheme == "mxfp4" and experts._supports_quant_scheme(weight, None):
            return _UNQUANTIZED_ACTIVATIONS
    return ""


def _switches(selector: Selector, kind: _Kind, experts: Any, way: _Way) -> list[str] | None:
    """Return what has to be switched on for a server to take a class; None if it never does."""
    config, ranks = selector.config, way.ranks
    if ranks.count > 1:
        parallel = parallel_config(ranks.count, dispatched=ranks.dispatched)
        config = replace(config, moe_parallel_config=parallel)
    default = server_defaults.moe_backend()
    for backend in dict.fromkeys((default, kind.backend)):
        if experts_taken(selector, replace(config, moe_backend=backend), ()) is experts:
            return [*way.flags, *([] if backend == default else [f"--moe-backend {backend}"])]
    return None


def _call(experts: Any, caller: Any, layer: Layer, way: _Way, stored: str) -> dict[str, Any]:
    """Return what becomes of the tokens."""
    row = layer.row
    if stored == _UNQUANTIZED_ACTIVATIONS:
        row = replace(row, quantization=("", *row.quantization[1:]))
    sources, ranks = _sources(row, layer, stored), way.ranks
    named = {_ROLES[name]: tensor for name, tensor in sources.items()}
    make = partial(_made, experts, layer, row, sources)
    run = Run(experts, caller, layer, ranks.dispatched, make)
    about = {"by": caller.__qualname__.split(".")[0], "shards": ranks.count}
    about |= {"dispatched": ranks.dispatched}
    about |= {"has_biases": _BIASES[0] in sources}
    return {**about, **run.answer(), "roles": roles_of(run.arguments, named)}


def _sources(row: ServedScheme, layer: Layer, stored: str) -> dict[str, Tensor]:
    """Return the scales and biases of a layer, by the arguments of a quantization config."""
    activations, weights, block = row.quantization
    found: dict[str, Tensor] = {}
    local = layer.local_num_experts
    per_tensor = activations in _SHARED and block is None
    if activations or weights:
        shape = (local,) if per_tensor else (local, 1, 1)
        found |= {name: torch.ones(shape) for name in _OF_WEIGHTS}
    if activations == "nvfp4" or per_tensor:
        w1, a1, w2, a2 = (scales.per_expert(name, local) for name in scales.GIVEN)
        values = {"g1_alphas": w1 * a1, "g2_alphas": w2 * a2}
        values |= {"a1_gscale": 1 / a1, "a2_gscale": 1 / a2, "a1_scale": a1, "a2_scale": a2}
        shared = _SHARED.get(activations, ())
        of_each = {name: values[name] for name in _OF_BOTH if name not in shared}
        found |= of_each | {name: values[name][0].clone() for name in shared}
    if layer.model["experts"]["bias"] and stored.startswith(_WITH_BIASES):
        found |= {name: torch.zeros(local, 1) for name in _BIASES}
    return found


def _made(experts: Any, layer: Layer, row: ServedScheme, sources: Mapping[str, Tensor]) -> Any:
    """Return the experts of a layer with these scales and biases."""
    activations, weights, block = row.quantization
    arguments = {
        "quant_dtype": getattr(torch, activations, activations) if activations else None,
        "weight_dtype": weights or None,
        "block_shape": list(block) if block else None,
        **sources,
        **activation_parameters(layer.model, layer.asked.swiglu_limit),
    }
    config = names().get("quant-config")(**names().accepted("quant-config", arguments))
    return experts(layer.config, config)
