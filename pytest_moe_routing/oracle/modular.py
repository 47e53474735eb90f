"""Modular experts are given experts and weights, so no routing method is a reason to reject them.

They serve what the monolithic ones cannot route. A gate that asks for the method there, as a shared
base class may, leaves such a model without any fused kernel.

Three steps can apply the router weight: what prepares the input, the experts' kernel, and what
finalizes its output. Together they must apply it once, and on the side that the model has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.judgement import Judgement
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.oracle.verdict import Verdict


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
    target: Target, scheme: str, models: Sequence[ModelSpec]
) -> list[MethodRejection]:
    """Return each set of methods that a scheme's modular experts reject, and accept others.

    Raises:
        Unsupported: The target has no such experts, or cannot answer for any of the models.
    """
    seen: dict[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]], list[str]] = {}
    reason: Unsupported | None = None
    answered = False
    with suppress(Unsupported):
        target.prepare_gates(models, scheme, target.method_numbers(), modular=True)
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


def with_what_runs(target: Target, judgement: Judgement) -> Judgement:
    """Return a crash if a case is rejected, and the experts that run instead raise.

    Those are given experts and weights, by default or where a switch names their kernel's backend.
    What else is wrong with their call is not the kernel's that routes.
    """
    if judgement.verdict not in (Verdict.FALLBACK, Verdict.MISSED):
        return judgement
    model, scheme, method = judgement.model, judgement.scheme, judgement.classification.method
    # A target that fails at these questions fails at a test of its own.
    with suppress(Unsupported, TargetError):
        if all(gate.ok for gate in target.modular_gates(model, scheme, method)):
            raised = _raised(target.modular_findings(model, scheme))
            choice = target.choice(model, scheme, method, modular=True) if raised else None
            if choice is not None and choice.switches == ():
                return replace(judgement, verdict=Verdict.CRASH, findings=raised, choice=choice)
    if not judgement.by_choice:
        return judgement
    try:
        raised = _raised(target.named_findings(model, scheme))
    except (Unsupported, TargetError) as reason:
        return replace(judgement, unanswered=str(reason))
    if not raised:
        return judgement
    # That models name no method is a cause of its own.
    site = "" if method in target.method_numbers() else method
    return replace(judgement, verdict=Verdict.CRASH, findings=raised, site=site)


def _raised(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    return tuple(finding for finding in findings if finding.kind is Kind.RAISED)


#: The steps of modular experts: on which side a factor of each lies.
_STEPS: Mapping[str, str] = {"prepare": "input", "experts": "output", "finalize": "output"}
_HANDED_ON: Mapping[str, str] = {
    "prepare": "hidden_states",
    "experts": "topk_weights",
    "finalize": "output",
}
_FACTORS = ("router weight", "routed_scaling_factor")


def misapplied(
    model: ModelSpec, record: Mapping[str, Any], *, explained: bool = False
) -> Iterator[Finding]:
    """Yield what the steps of modular experts did wrongly to marked tokens, experts and weights.

    Args:
        record: A call as a target recorded it. It has an argument that is `unusable` for the
            kernel, with what is `wanted` and what it `got`; or else, for each step, how often the
            router weight and the scaling factor were `applied` (None if that does not explain what
            the step handed on), the `places` of the steps in the code, and whether the output is
            the `same` as the layer's.
        explained: Whether an argument of the kernel is known to be wrong, which explains an output
            of other values.
    """
    unusable = record.get("unusable")
    if unusable is not None:
        yield Finding(Kind.ARGUMENT, unusable["name"], unusable["wanted"], unusable["got"])
    applied = record.get("applied")
    if applied is None:
        return
    places, found = record["places"], False
    for step, counts in applied.items():
        if counts is None:
            found = True
            got = f"other values, from {places[step]}"
            yield Finding(Kind.ARGUMENT, _HANDED_ON[step], "the layer's values", got)
    if found:
        return
    side = model.router.weight_on
    # The router's weights have the scaling factor already.
    wanted = f"once, on the expert {side}", "in the router"
    for place, factor in enumerate(_FACTORS):
        times = {step: counts[place] for step, counts in applied.items() if counts[place]}
        sides = [_STEPS[step] for step, count in times.items() for _ in range(count)]
        if sides != ([side] if factor == "router weight" else []):
            found = True
            got = " and ".join(_counted(name, sides.count(name)) for name in dict.fromkeys(sides))
            steps = " and ".join(f"{places[step]} (on the {_STEPS[step]})" for step in times)
            yield Finding(Kind.APPLIED, factor, wanted[place], got or "nowhere", fact=steps)
    if not (found or explained or record["same"]):
        got = f"other values, from {places['finalize']}"
        yield Finding(Kind.ARGUMENT, "output", "the sum of the layer's experts", got)


def _counted(side: str, count: int) -> str:
    times = {1: "", 2: "twice "}.get(count, f"{count} times ")
    return f"{times}on the expert {side}"
