"""Experts that call other kernels than TRT-LLM's, and are given what the target's router chose.

What such experts hand on depends on the kind of layer, and not on how its router chooses, nor on
how many experts of which width it has. So one model of each kind is asked, in each scheme.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.finding import Finding, are_slight
from pytest_moe_routing.oracle.kinds import of_each_kind
from pytest_moe_routing.oracle.target import OtherCall, Target


@dataclass(frozen=True)
class WrongCall:
    """What is wrong with experts, and the way that needs the least of those that show it.

    Attributes:
        models: The models that were asked, and then those with layers of their kinds.
    """

    call: OtherCall
    findings: tuple[Finding, ...]
    models: tuple[ModelSpec, ...]


@dataclass(frozen=True)
class OtherCalls:
    """What a target's other experts for a scheme make of a router's choice.

    Attributes:
        answered: How many models were asked or have a layer of the kind of one that was.
        unanswered: Why how many models could not be asked.
        lost: Those of them that the target's release is known to run, by reason.
    """

    wrong: tuple[WrongCall, ...]
    answered: int
    unanswered: Counter[str]
    lost: Mapping[str, Sequence[ModelSpec]]

    def of_format(self, name: str) -> OtherCalls:
        """Return the calls as those for checkpoints of another format than the scheme's usual one.

        Published checkpoints have that one.
        """
        wrong = []
        for each in self.wrong:
            call = replace(each.call, experts=f"{each.call.experts} for {name}")
            models = tuple(replace(model, checkpoints=()) for model in each.models)
            wrong.append(replace(each, call=call, models=models))
        return replace(self, wrong=tuple(wrong))

    def and_of(self, other: OtherCalls) -> OtherCalls:
        """Return these calls and those of another checkpoint, which no release is known to run."""
        return replace(
            self,
            wrong=(*self.wrong, *other.wrong),
            answered=self.answered + other.answered,
            unanswered=self.unanswered + other.unanswered,
        )


def other_calls(target: Target, scheme: str, models: Iterable[ModelSpec]) -> OtherCalls:
    """Ask about a model of each kind that the target runs in such experts.

    Of checkpoints that the target serves elsewhere, it is asked whether such experts are taken.
    """
    models = list(models)
    found = _other_calls(target, scheme, models)
    for name, other in target.served_elsewhere(scheme).items():
        further = _other_calls(other, scheme, models)
        found = found.and_of(further.of_format(name) if name else further)
    return found


def _other_calls(target: Target, scheme: str, models: Iterable[ModelSpec]) -> OtherCalls:
    found: dict[tuple[OtherCall, Finding], dict[ModelSpec, Sequence[ModelSpec]]] = {}
    answered, unanswered = 0, Counter[str]()
    lost: dict[str, list[ModelSpec]] = {}

    def ask(model: ModelSpec) -> tuple[OtherCall, ...]:
        try:
            return target.other_experts(model, scheme)
        except Unsupported as reason:
            if target.runs_others(model, scheme):
                lost.setdefault(str(reason), []).append(model)
            raise

    def kind_of(model: ModelSpec) -> Any:
        chosen = target.choice_of_others(model, scheme), target.taken_elsewhere(model, scheme)
        return _kind(model), *chosen

    for (model, *others), calls in of_each_kind(models, kind_of, ask, unanswered):
        answered += 1 + len(others)
        for way, finding in _first(calls):
            found.setdefault((way, finding), {})[model] = others
    # What is wrong with the same models in the same place is one mistake.
    together: dict[Any, WrongCall] = {}
    for (way, finding), asked in found.items():
        key = way, finding.where, tuple(asked), are_slight([finding])
        before = together[key].findings if key in together else ()
        alike = (other for others in asked.values() for other in others)
        together[key] = WrongCall(way, (*before, finding), (*asked, *alike))
    return OtherCalls(tuple(together.values()), answered, unanswered, lost)


def _kind(model: ModelSpec) -> Any:
    """Return what experts can see of a layer, but for its sizes."""
    experts, router = model.experts, model.router
    is_latent, has_shared = experts.latent_size is not None, experts.shared_experts > 0
    layer = replace(experts, hidden_size=1, intermediate_size=1, shared_experts=0, latent_size=None)
    return layer, is_latent, has_shared, router.weight_on, router.routed_scaling_factor == 1.0


def _first(calls: Sequence[OtherCall]) -> Iterator[tuple[OtherCall, Finding]]:
    """Yield each finding once, with the way that needs the least, which is without findings."""
    seen = set[Any]()
    for call in sorted(calls, key=lambda call: (call.requests, len(call.switches))):
        for finding in call.findings:
            key = call.experts, replace(finding, where="", fact="")
            if key not in seen:
                seen.add(key)
                yield replace(call, findings=()), finding
