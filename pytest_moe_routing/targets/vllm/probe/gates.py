"""The gates that a release of vLLM puts before a scheme's experts, one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.probe.config import NoActivation, activation_name, moe_config
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES, ServedScheme
from pytest_moe_routing.targets.vllm.probe.release import accepted, names

QUANTIZATION = "_supports_quant_scheme"
#: Gates in the order in which vLLM asks them: title, name of the function, what it is asked about.
GATES = (
    ("device", "_supports_current_device", "{device}"),
    ("gated experts", "_supports_no_act_and_mul", "gated={gated}"),
    ("activation", "_supports_activation", "{activation}"),
    ("quantization scheme", QUANTIZATION, "{quantized}"),
    ("parallel config", "_supports_parallel_config", "{parallel}"),
    ("routing method", "_supports_routing_method", "{method}"),
    ("router logits dtype", "_supports_router_logits_dtype", "{logits_dtype}"),
    ("shape", "_supports_shape", "hidden size {hidden_dim}"),
)

#: All of them at once.
ALL = "is_supported_config"


def experts_of(scheme: ServedScheme, *, modular: bool = False) -> Any:
    """Return a scheme's monolithic experts, see `ServedScheme.experts`: a class, or a function.

    Args:
        modular: The class that is given ids and weights instead.

    Raises:
        Unsupported: The release has none.
    """
    key = scheme.modular if modular else scheme.experts
    if key is None:
        raise Unsupported("vLLM has no modular experts for this scheme")
    return names().get(key)


def quant_keys(scheme: ServedScheme) -> tuple[Any, Any]:
    """Return the quantization keys of a scheme's weights and activations.

    Raises:
        Unsupported: This release does not have the scheme.
    """
    weight, activation = (None if key is None else names().get(key) for key in scheme.keys)
    return weight, activation


def declared_keys(scheme: str, served: ServedScheme) -> dict[str, Any]:
    """Return the quantization keys with which the checkpoints of a scheme ask for experts.

    Raises:
        Unsupported: This release does not have the scheme.
    """
    weight, activation = quant_keys(served)
    # Those of MXFP4 declare none of activations: each backend has its own.
    return {"weight_key": weight, "activation_key": None if scheme == "mxfp4" else activation}


def gates(
    model: Mapping[str, Any], scheme: str, method: str, modular: bool = False
) -> list[list[Any]]:
    """Return every gate of the experts as [name, answer, reason], then all of them at once."""
    names().require("modular" if modular else "verdicts", scheme)
    row = SCHEMES[scheme]
    owner = experts_of(row, modular=modular)
    weight, activation_key = quant_keys(row)
    try:
        layer = moe_config(model, method)
    except NoActivation as unknown:
        return [["activation", False, str(unknown)]]
    about = {
        "device": "Blackwell",
        "gated": model["experts"]["gated"],
        "activation": activation_name(model),
        "quantized": " x ".join(
            "none" if key is None else key.rpartition(".")[2] for key in row.keys
        ),
        "parallel": "one GPU",
        "method": method,
        "logits_dtype": model["router"]["logits_dtype"],
        "hidden_dim": layer.hidden_dim,
    }
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
    answers: list[list[Any]] = []
    for gate, function, what in GATES:
        found = gate_of(owner, function)
        if found is None:
            continue
        answer = found(**accepted(found, given))
        if gate == "gated experts" and model["experts"]["gated"]:
            answer = True
        reason = f"{owner.__name__} does not accept {what.format(**about)}"
        answers.append([gate, bool(answer), reason])
    supported, reason = _all_at_once(owner, layer, given)
    return [*answers, [ALL, bool(supported), reason or ""]]


def function_of(scheme: str, gate: str, *, modular: bool = False) -> Any:
    """Return the function of a scheme's experts that answers for a gate; None if it has none."""
    owner = experts_of(SCHEMES[scheme], modular=modular)
    if gate == ALL and not isinstance(owner, type):
        return owner
    functions = {ALL: ALL, **{title: function for title, function, _ in GATES}}
    return gate_of(owner, functions[gate]) if gate in functions else None


def gate_of(owner: Any, name: str) -> Any:
    """Return one gate of a class, or of those that a function calls.

    None when a function calls no such gate; a class has all of them, if only to say yes.

    Raises:
        Unsupported: The class has no such gate.
    """
    if isinstance(owner, type):
        found = getattr(owner, name, None)
        if found is None:
            raise Unsupported(names().sentence(names().contract.rows[f"gates.{name}"]))
        return found
    called = [other for other in owner.__code__.co_names if other.startswith(name)]
    return owner.__globals__[called[0]] if called else None


def _all_at_once(owner: Any, layer: Any, given: Mapping[str, Any]) -> Any:
    if isinstance(owner, type):
        keys = given["weight_key"], given["activation_key"]
        return owner.is_supported_config(owner, layer, *keys, owner.activation_format())  # type: ignore[attr-defined]
    given = {**given, "moe_config": layer, "activation_format": names().get("format")}
    return owner(**accepted(owner, given))
