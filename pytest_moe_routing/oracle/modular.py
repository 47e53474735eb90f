"""Modular experts are given experts and weights, so no routing method is a reason to refuse them.

They serve what the monolithic ones cannot route. A gate that asks for the method there, as a shared
base class may, leaves such a model without any fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterable

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.target import Target


def rejected_by_method(target: Target, scheme: str, models: Iterable[ModelSpec]) -> list[str]:
    """A line for each set of methods that a scheme's modular experts refuse, and take others.

    Raises:
        Unsupported: The target has no such experts, or cannot answer for any of the models.
    """
    seen: dict[tuple[str, str, str], list[str]] = {}
    reason: Unsupported | None = None
    answered = False
    for model in models:
        refused: dict[str, list[str]] = {}
        taken: list[str] = []
        try:
            for method in target.method_numbers():
                gates = target.modular_gates(model, scheme, method)
                no = ", ".join(gate.name for gate in gates if not gate.ok)
                (refused.setdefault(no, []) if no else taken).append(method)
        except Unsupported as error:
            reason = error
            continue
        answered = True
        if taken:
            for no, methods in refused.items():
                key = ", ".join(methods), no, ", ".join(taken)
                seen.setdefault(key, []).append(model.id)
    if not answered:
        raise reason or Unsupported(f"no model has a checkpoint for {scheme}")
    who = f"{target}, modular experts for {scheme}"
    return [
        f"{who}: they are given experts and weights, and yet refuse {methods}, at {no}; "
        f"they take {others} ({', '.join(ids)})"
        for (methods, no, others), ids in seen.items()
    ]
