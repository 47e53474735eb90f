"""Modular experts are given experts and weights, so no routing method is a reason to reject them.

They serve what the monolithic ones cannot route. A gate that asks for the method there, as a shared
base class may, leaves such a model without any fused kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.target import Target


@dataclass(frozen=True)
class MethodRejection:
    """Methods that a scheme's modular experts reject while they accept others.

    Attributes:
        methods, gates: The rejected methods, and the gates that say no.
        accepted: The methods that are accepted.
        models: Ids of the models.
    """

    methods: tuple[str, ...]
    gates: tuple[str, ...]
    accepted: tuple[str, ...]
    models: tuple[str, ...]


def rejected_by_method(
    target: Target, scheme: str, models: Iterable[ModelSpec]
) -> list[MethodRejection]:
    """Return each set of methods that a scheme's modular experts reject, and accept others.

    Raises:
        Unsupported: The target has no such experts, or cannot answer for any of the models.
    """
    seen: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], list[str]] = {}
    reason: Unsupported | None = None
    answered = False
    for model in models:
        rejected: dict[tuple[str, ...], list[str]] = {}
        accepted: list[str] = []
        try:
            for method in target.method_numbers():
                gates = target.modular_gates(model, scheme, method)
                no = tuple(gate.name for gate in gates if not gate.ok)
                (rejected.setdefault(no, []) if no else accepted).append(method)
        except Unsupported as error:
            reason = error
            continue
        answered = True
        if accepted:
            for no, methods in rejected.items():
                key = tuple(methods), no, tuple(accepted)
                seen.setdefault(key, []).append(model.id)
    if not answered:
        raise reason or Unsupported(f"no model has a checkpoint for {scheme}")
    return [MethodRejection(*key, tuple(ids)) for key, ids in seen.items()]
