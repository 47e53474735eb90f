"""Asks FlashInfer's experts which quantization keys they accept, of weights and of activations."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

from pytest_moe_routing.targets.answers import AcceptedKeysAnswer
from pytest_moe_routing.targets.vllm.probe.choice import on_capability
from pytest_moe_routing.targets.vllm.probe.gates import QUANTIZATION, gate_of
from pytest_moe_routing.targets.vllm.probe.placements import DEVICES
from pytest_moe_routing.targets.vllm.probe.release import names
from pytest_moe_routing.targets.vllm.probe.rule import rule_of

#: The key of what is not quantized.
_NONE = "none"


def accepted_keys(experts: str) -> AcceptedKeysAnswer:
    """Return the pairs of keys that experts accept on each GPU, of all that the release defines.

    Args:
        experts: Their row of the contract.

    Raises:
        Unsupported: The release does not have them.
    """
    cls = names().get(experts)
    gate, keys = gate_of(cls, QUANTIZATION), known_keys()
    accepted: dict[str, list[list[str]]] = {}
    for device in DEVICES:
        with on_capability(*device):
            accepted["{}.{}".format(*device)] = [
                [weights, activations]
                for weights, weight_key in keys.items()
                for activations, activation_key in keys.items()
                if gate(weight_key, activation_key)
            ]
    rule = rule_of(gate)
    return {
        "name": cls.__name__,
        "keys": list(keys),
        "accepted": accepted,
        "function": rule["name"],
        "source": rule["source"],
    }


@cache
def known_keys() -> dict[str, Any]:
    """Return the quantization keys by name; of two names for one key, the first."""
    cls = names().get("quant-key")
    found = {None: _NONE}
    for name, value in vars(sys.modules[cls.__module__]).items():
        if isinstance(value, cls):
            found.setdefault(value, name)
    return {name: key for key, name in found.items()}
