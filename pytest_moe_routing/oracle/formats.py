"""Whether a target serves checkpoints of a scheme's other formats as well as the usual ones.

A framework has a class of its own for each format of a scheme, such as ModelOpt's or
compressed-tensors'. The format does not change what the framework makes of a router, so one model
of each kind of experts is asked about.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.layouts import WrongLayout, kind_of, wrong_layouts
from pytest_moe_routing.oracle.modular import with_what_runs
from pytest_moe_routing.oracle.other_experts import WrongCall, other_calls
from pytest_moe_routing.oracle.record import VerdictRecord
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.oracle.verdict import Verdict


@dataclass(frozen=True)
class UnlikeFormat:
    """A model that is served otherwise in another checkpoint than in the scheme's usual one.

    It is exact in that one and not in the other, or rejected in that one and crashes in the other.

    Attributes:
        format: What the other checkpoint says, as `Target.formats` calls it.
        record: The verdict on it.
        usual: The verdict on the usual one.
    """

    format: str
    record: VerdictRecord
    usual: Verdict


@dataclass(frozen=True)
class FormatsFound:
    """How a target serves a scheme's other checkpoints.

    Attributes:
        calls: What is wrong with experts of other kernels.
        unanswered: Why how many models could not be asked, each format counted.
    """

    unlike: tuple[UnlikeFormat, ...]
    calls: tuple[WrongCall, ...]
    layouts: tuple[WrongLayout, ...]
    unanswered: Counter[str]


def unlike_formats(target: Target, scheme: str, models: Iterable[ModelSpec]) -> FormatsFound:
    """Ask about every other format of a scheme that the target knows."""
    formats = target.formats(scheme)
    usual = dict(_usual(target, scheme, models)) if formats else {}
    exact = [model for model, verdict in usual.items() if verdict is Verdict.EXACT]
    unlike: list[UnlikeFormat] = []
    layouts: list[WrongLayout] = []
    calls: list[WrongCall] = []
    unanswered = Counter[str]()
    for name, other in formats.items():
        for model, verdict in usual.items():
            try:
                found = with_what_runs(other, judge(other, model, scheme, chosen=False))
                # A checkpoint that does not load is not served.
                runs = found.verdict in (Verdict.EXACT, Verdict.WRONG)
                placed = wrong_layouts(other, scheme, [model]) if runs else None
            except Unsupported as reason:
                unanswered[f"{name}: {reason}"] += 1
                continue
            if found.unanswered:
                unanswered[f"{name}: {found.unanswered}"] += 1
            if placed is not None:
                unanswered.update(f"{name}: {reason}" for reason in placed.unanswered)
                if not placed.answered:
                    continue
            for each in placed.wrong if placed else ():
                layouts.append(replace(each, models=_unpublished(each.models)))
            is_alike = found.verdict is not Verdict.CRASH and verdict is not Verdict.EXACT
            if found.verdict is not Verdict.EXACT and not is_alike:
                judged = replace(found, model=_unpublished([found.model])[0])
                unlike.append(UnlikeFormat(name, judged.record(), verdict))
        others = other_calls(other, scheme, exact).of_format(name)
        unanswered.update({f"{name}: {reason}": n for reason, n in others.unanswered.items()})
        calls += others.wrong
    return FormatsFound(tuple(unlike), tuple(calls), tuple(layouts), unanswered)


def _unpublished(models: Iterable[ModelSpec]) -> tuple[ModelSpec, ...]:
    """Return models without their published checkpoints: those have the usual format."""
    return tuple(replace(model, checkpoints=()) for model in models)


def _usual(
    target: Target, scheme: str, models: Iterable[ModelSpec]
) -> Iterator[tuple[ModelSpec, Verdict]]:
    """Yield a model of each kind of experts that a kernel of the scheme computes exactly.

    And one of each kind that the target's own router serves by choice: with a method, and without.
    """
    methods = target.method_numbers()
    kinds = set()
    for model in sorted(models, key=lambda model: model.router.num_experts):
        try:
            judged = with_what_runs(target, judge(target, model, scheme, chosen=False))
        except Unsupported:
            # Its own verdict says so.
            continue
        verdict, method = judged.verdict, judged.classification.method
        is_exact = verdict is Verdict.EXACT
        if not is_exact and not (judged.by_choice and verdict is not Verdict.CRASH):
            continue
        kind = kind_of(model), is_exact, method in methods
        if kind not in kinds:
            kinds.add(kind)
            yield model, verdict
