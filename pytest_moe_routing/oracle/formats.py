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
from pytest_moe_routing.oracle.other_experts import WrongCall, other_calls
from pytest_moe_routing.oracle.record import VerdictRecord
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.oracle.verdict import Verdict


@dataclass(frozen=True)
class UnlikeFormat:
    """A model that is exact in the scheme's usual checkpoint, and not in another one.

    Attributes:
        format: What the other checkpoint says, as `Target.formats` calls it.
        record: The verdict on it.
    """

    format: str
    record: VerdictRecord


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
    usual = list(_usual(target, scheme, models)) if formats else []
    unlike: list[UnlikeFormat] = []
    layouts: list[WrongLayout] = []
    calls: list[WrongCall] = []
    unanswered = Counter[str]()
    for name, other in formats.items():
        for model in usual:
            try:
                found = judge(other, model, scheme, chosen=False)
                # A checkpoint that does not load is not served.
                runs = found.verdict in (Verdict.EXACT, Verdict.WRONG)
                placed = wrong_layouts(other, scheme, [model]) if runs else None
            except Unsupported as reason:
                unanswered[f"{name}: {reason}"] += 1
                continue
            if placed is not None and placed.unanswered:
                unanswered.update(f"{name}: {reason}" for reason in placed.unanswered)
                continue
            for each in placed.wrong if placed else ():
                layouts.append(replace(each, models=_unpublished(each.models)))
            if found.verdict is not Verdict.EXACT:
                judged = replace(found, model=_unpublished([found.model])[0])
                unlike.append(UnlikeFormat(name, judged.record()))
        others = other_calls(other, scheme, usual).of_format(name)
        unanswered.update({f"{name}: {reason}": n for reason, n in others.unanswered.items()})
        calls += others.wrong
    return FormatsFound(tuple(unlike), tuple(calls), tuple(layouts), unanswered)


def _unpublished(models: Iterable[ModelSpec]) -> tuple[ModelSpec, ...]:
    """Return models without their published checkpoints: those have the usual format."""
    return tuple(replace(model, checkpoints=()) for model in models)


def _usual(target: Target, scheme: str, models: Iterable[ModelSpec]) -> Iterator[ModelSpec]:
    """Yield a model of each kind of experts that a kernel of the scheme computes exactly."""
    kinds = set()
    for model in sorted(models, key=lambda model: model.router.num_experts):
        kind = kind_of(model), model.experts.activation_limit is None
        if kind in kinds:
            continue
        try:
            judged = judge(target, model, scheme, chosen=False)
        except Unsupported:
            # Its own verdict says so.
            continue
        if judged.verdict is Verdict.EXACT:
            kinds.add(kind)
            yield model
