"""The gates that a release of vLLM puts before a scheme's monolithic experts, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.probe.config import activation_name, moe_config
from pytest_moe_routing.targets.vllm.probe.experts import (
    KEYS,
    LAYERS,
    MOE,
    SCHEMES,
    ServedScheme,
)
from pytest_moe_routing.targets.vllm.probe.release import accepted, real


def experts_of(scheme: ServedScheme, *, modular: bool = False) -> Any:
    """A scheme's monolithic experts, see `VllmBackend.experts`: a class, or a function.

    Args:
        modular: The class that is given ids and weights instead.

    Raises:
        Unsupported: The release has none.
    """
    places = scheme.modular if modular else scheme.experts
    for module, name in places:
        below = LAYERS if module.startswith("quantization.") else MOE
        try:
            return getattr(real(f"{below}.{module}"), name)
        except (Unsupported, AttributeError):
            continue
    missing = places[0][1] if places else "modular experts for this scheme"
    raise Unsupported(f"this release has no {missing}")


def quant_keys(scheme: ServedScheme) -> tuple[Any, Any]:
    """The quantization keys of a scheme's weights and activations.

    Raises:
        Unsupported: This release does not know the scheme.
    """
    known = real(KEYS)
    for name in scheme.keys:
        if name and not hasattr(known, name):
            raise Unsupported(f"this release has no quantization key {name}")
    weight, activation = (getattr(known, name) if name else None for name in scheme.keys)
    return weight, activation


def gates(
    model: Mapping[str, Any], scheme: str, method: str, modular: bool = False
) -> list[list[Any]]:
    """Every gate of the scheme's experts as [name, answer, reason], then all of them at once."""
    row = SCHEMES[scheme]
    owner = experts_of(row, modular=modular)
    weight, activation_key = quant_keys(row)
    try:
        layer = moe_config(model, method)
    except Unsupported as unknown:
        return [["activation", False, str(unknown)]]
    name = owner.__name__
    quantized = " x ".join(key or "none" for key in row.keys)
    given = {
        "activation": layer.activation,
        "weight_key": weight,
        "activation_key": activation_key,
        "moe_parallel_config": layer.moe_parallel_config,
        "routing_method": layer.routing_method,
        "routing_method_type": layer.routing_method,
        "router_logits_dtype": layer.router_logits_dtype,
        "hidden_dim": layer.hidden_dim,
    }
    asked = [
        ("device", "current_device", "Blackwell"),
        ("gated experts", "no_act_and_mul", f"gated={model['experts']['gated']}"),
        ("activation", "activation", activation_name(model)),
        ("quantization scheme", "quant_scheme", quantized),
        ("parallel config", "parallel_config", "one GPU"),
        ("routing method", "routing_method", method),
        ("router logits dtype", "router_logits_dtype", model["router"]["logits_dtype"]),
        ("shape", "shape", f"hidden size {layer.hidden_dim}"),
    ]
    answers: list[list[Any]] = []
    for gate, function, what in asked:
        found = _gate(owner, f"_supports_{function}")
        if found is None:
            continue
        answer = found(**accepted(found, given))
        if gate == "gated experts" and model["experts"]["gated"]:
            answer = True
        answers.append([gate, bool(answer), f"{name} does not take {what}"])
    supported, reason = _all_at_once(owner, layer, given)
    return [*answers, ["is_supported_config", bool(supported), reason or ""]]


def _gate(owner: Any, name: str) -> Any:
    """One gate of a class, or of those that a function calls; None when there is none."""
    if isinstance(owner, type):
        return getattr(owner, name, None)
    called = [other for other in owner.__code__.co_names if other.startswith(name)]
    return owner.__globals__[called[0]] if called else None


def _all_at_once(owner: Any, layer: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(owner, type):
        keys = given["weight_key"], given["activation_key"]
        return owner.is_supported_config(owner, layer, *keys, owner.activation_format())  # type: ignore[attr-defined]
    standard = real(f"{MOE}.modular_kernel").FusedMoEActivationFormat.Standard
    given = {**given, "moe_config": layer, "activation_format": standard}
    return owner(**accepted(owner, given))
