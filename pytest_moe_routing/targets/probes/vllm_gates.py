"""The gates that a release of vLLM puts before a backend's monolithic experts, one by one."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.probes.vllm_backends import BACKENDS, KEYS, MOE, VllmBackend
from pytest_moe_routing.targets.probes.vllm_config import moe_config
from pytest_moe_routing.targets.probes.vllm_release import real


def experts_of(backend: VllmBackend) -> Any:
    """The class of a backend's monolithic experts, or the module whose functions are its gates."""
    return find(backend.experts)


def find(places: tuple[tuple[str, str], ...]) -> Any:
    """The first class, or module, of those named that this release has.

    Raises:
        Unsupported: It has none of them.
    """
    for module, name in places:
        try:
            found = real(f"{MOE}.{module}")
        except Unsupported:
            continue
        if not name or hasattr(found, name):
            return getattr(found, name) if name else found
    raise Unsupported(f"this release has no {' or '.join(name or m for m, name in places)}")


def quant_keys(backend: VllmBackend) -> tuple[Any, Any]:
    """The quantization keys of a backend's weights and activations.

    Raises:
        Unsupported: This release does not know the scheme.
    """
    known = real(KEYS)
    for name in backend.keys:
        if name and not hasattr(known, name):
            raise Unsupported(f"this release has no quantization key {name}")
    weight, activation = (getattr(known, name) if name else None for name in backend.keys)
    return weight, activation


def gates(model: Mapping[str, Any], backend: str, method: str) -> list[list[Any]]:
    """Every gate of the backend's experts as [name, answer, reason], then all of them at once."""
    row = BACKENDS[backend]
    owner = experts_of(row)
    weight, activation_key = quant_keys(row)
    try:
        layer = moe_config(model, method)
    except Unsupported as unknown:
        return [["activation", False, str(unknown)]]
    name = owner.__name__.rpartition(".")[2]
    quantized = " x ".join(key or "none" for key in row.keys)
    asked: list[tuple[str, str, tuple[Any, ...], str]] = [
        ("device", "_supports_current_device", (), "Blackwell"),
        ("gated experts", "_supports_no_act_and_mul", (), f"gated={model['experts']['gated']}"),
        ("activation", "_supports_activation", (layer.activation,), layer.activation.value),
        ("quantization scheme", "_supports_quant_scheme", (weight, activation_key), quantized),
        ("parallel config", "_supports_parallel_config", (layer.moe_parallel_config,), "one GPU"),
        (
            "routing method",
            "_supports_routing_method",
            (layer.routing_method, weight, activation_key),
            method,
        ),
        (
            "router logits dtype",
            "_supports_router_logits_dtype",
            (layer.router_logits_dtype, layer.routing_method),
            model["router"]["logits_dtype"],
        ),
        ("shape", "_supports_shape", (layer.hidden_dim,), f"hidden size {layer.hidden_dim}"),
    ]
    answers: list[list[Any]] = []
    for gate, function, arguments, what in asked:
        answer = _ask(owner, function, arguments)
        if gate == "gated experts" and model["experts"]["gated"]:
            answer = True
        if answer is not None:
            answers.append([gate, bool(answer), f"{name} does not take {what}"])
    supported, reason = _all_at_once(owner, layer, weight, activation_key)
    return [*answers, ["is_supported_config", bool(supported), reason or ""]]


def _ask(owner: Any, function: str, arguments: tuple[Any, ...]) -> Any:
    """A gate's answer; None when the owner has no such gate."""
    gate = next((g for n, g in inspect.getmembers(owner) if n.startswith(function)), None)
    if gate is None:
        return None
    return gate(*arguments[: len(inspect.signature(gate).parameters)])


def _all_at_once(owner: Any, layer: Any, weight: Any, activation: Any) -> Any:
    standard = real(f"{MOE}.modular_kernel").FusedMoEActivationFormat.Standard
    if isinstance(owner, ModuleType):
        return owner.is_supported_config_trtllm_bf16(layer, standard)
    return owner.is_supported_config(owner, layer, weight, activation, owner.activation_format())
