"""Which code of a release keeps its fused experts from a layer: a gate, or the selector."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from pytest_moe_routing.targets.answers import RuleAnswer
from pytest_moe_routing.targets.vllm.probe.choice import default_experts, selector_of
from pytest_moe_routing.targets.vllm.probe.gates import function_of
from pytest_moe_routing.targets.vllm.probe.release import vllm_path


def rule(model: Mapping[str, Any], scheme: str, method: str, gate: str) -> RuleAnswer | None:
    """Return the function that says no, and what is taken by default if that is the selector's.

    Args:
        gate: The name of the gate that rejects the model; the selector is asked about all others.

    Raises:
        NoActivation: The release does not know the model's activation.
    """
    function = function_of(scheme, gate)
    if function is not None:
        return rule_of(function)
    selector = selector_of(model, scheme, method)
    return None if selector is None else rule_of(selector.function, default_experts(selector))


def rule_of(function: Any, instead: str = "") -> RuleAnswer:
    """Return a function as a rule, with its file and line."""
    code = inspect.unwrap(function).__code__
    source = f"{vllm_path(code.co_filename)}:{code.co_firstlineno}"
    return {"name": code.co_qualname, "source": source, "instead": instead}
