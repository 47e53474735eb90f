"""The config sweep: a target is judged on routers around every known family.

A target that is right for every model may still be wrong for the next one. Each config of the sweep
is compared with what the target's own router computes for it, and what is wrong or crashes is
grouped by its cause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from functools import cache, cached_property

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.oracle.exact import exact_calls
from pytest_moe_routing.oracle.finding import Kind
from pytest_moe_routing.oracle.judge import judge, judge_behind_gates, judge_swept
from pytest_moe_routing.oracle.judgement import Judgement
from pytest_moe_routing.oracle.swept_configs import (
    UNTOLD,
    USUAL_EXPERTS,
    by_distance,
    is_far,
    swept_models,
    swept_routers,
)
from pytest_moe_routing.oracle.target import Captured, Target
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.routing import same

BAD = (Verdict.WRONG, Verdict.CRASH)
#: Fields that are one cause: a router has groups, or it has none.
_GROUPS = {(Kind.RECIPE.value, name) for name in ("n_group", "topk_group", "group_score", "mask")}


@dataclass(frozen=True)
class Cause:
    """One reason why a target is wrong or crashes, however many configs it concerns.

    Attributes:
        why: Kind, field and fact of each finding of the example.
        methods: Routing methods of the configs that it concerns.
        count: Configs of the sweep that it concerns.
        example: The judgement of the smallest of them.
        concerned: The judgements of the models that it concerns; none if it is latent.
    """

    scheme: str
    verdict: Verdict
    why: tuple[tuple[str, str, str], ...]
    methods: tuple[str, ...]
    count: int
    example: Judgement
    concerned: tuple[Judgement, ...] = ()

    @property
    def models(self) -> tuple[str, ...]:
        """Ids of the models that it concerns."""
        return tuple(str(found.model) for found in self.concerned)

    @property
    def fields(self) -> tuple[tuple[str, str], ...]:
        """Kind and field of each finding."""
        return tuple(dict.fromkeys((kind, field) for kind, field, _ in self.why))

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the example that are not defaults."""
        model = self.example.model
        values = {f.name: getattr(model.router, f.name) for f in fields(model.router)}
        found = {n: v for n, v in values.items() if v != _DEFAULTS.get(n, MISSING)}
        if model.experts != USUAL_EXPERTS:
            found["activation"] = model.experts.activation
        if model.dtype != "bfloat16":
            found["dtype"] = model.dtype
        return found


_DEFAULTS = {f.name: f.default for f in fields(RouterConfig)}


@dataclass(frozen=True)
class Sweep:
    """What a target makes of the whole sweep in one scheme.

    Attributes:
        verdicts: How many configs have each verdict.
        unanswered: Why how many configs could not be judged.
        unanswered_models: Why it is not known of how many models whether a cause concerns them.
        causes: Of all bad verdicts, those with the smallest examples first.
    """

    verdicts: Counter[Verdict]
    unanswered: Counter[str]
    causes: tuple[Cause, ...]
    unanswered_models: Counter[str] = field(default_factory=Counter)


class CachedTarget(Target):
    """A target that is asked once for what no scheme changes: its questions may be slow."""

    name = "once"

    def __init__(self, target: Target) -> None:
        super().__init__(target.flashinfer)
        self.name = target.name  # type: ignore[misc]
        self._target = target
        self._readings: dict[tuple[object, ...], RouterConfig | Unsupported] = {}
        self.version = cache(target.version)  # type: ignore[method-assign]
        self.method_numbers = cache(target.method_numbers)  # type: ignore[method-assign]
        self.classify = cache(target.classify)  # type: ignore[method-assign]
        self.opt_in = cache(target.opt_in)  # type: ignore[method-assign]
        self.gates = target.gates  # type: ignore[method-assign]
        self.prepare_gates = target.prepare_gates  # type: ignore[method-assign]
        self.kernel_call = target.kernel_call  # type: ignore[method-assign]

    def capture(self, model: ModelSpec, scheme: str, method: str) -> Captured | None:
        ask = self._target.capture_first if is_far(model) else self._target.capture
        return ask(model, scheme, method)

    def prepare(self, models: Sequence[ModelSpec], scheme: str, *, thorough: bool = True) -> None:
        """Ask ahead about configs near a family and far from all, each as `capture` will."""
        for chosen, thorough in by_distance(models):
            self._target.prepare(chosen, scheme, thorough=thorough)

    def read_routers(self, models: Sequence[ModelSpec]) -> Sequence[RouterConfig | Unsupported]:
        keys = [(m.router, m.architecture, m.experts, m.dtype) for m in models]
        new = {k: m for k, m in zip(keys, models, strict=True) if k not in self._readings}
        answers = self._target.read_routers(list(new.values())) if new else ()
        for key, reading in zip(new, answers, strict=True):
            if isinstance(reading, RouterConfig) and reading.logits_dtype == UNTOLD:
                reading = replace(reading, logits_dtype="bfloat16")
            self._readings[key] = reading
        return [self._readings[key] for key in keys]

    @cached_property
    def _text(self) -> str:
        return str(self._target)

    def __str__(self) -> str:
        return self._text


def sweep(
    target: Target,
    scheme: str,
    models: Iterable[ModelSpec],
    routers: Iterable[RouterConfig] | None = None,
) -> Sweep:
    """Judge every config of the sweep on a scheme, and group what is bad by its cause.

    Args:
        target: Asked for the gates of every config, and for the call of every one that passes.
        scheme: Name of the scheme.
        models: Those of which a cause says whether it concerns them.
        routers: Other routers than the sweep's, smallest first.
    """
    candidates = swept_models(routers)
    target.prepare(candidates, scheme)

    def judged(model: ModelSpec, reads: RouterConfig | None) -> Iterable[Judgement]:
        if reads is None:
            return (judge(target, model, scheme, chosen=False),)
        return (judge_swept(target, model, scheme, reads),)

    return _sweep(target, judged, scheme, models, candidates)


def sweep_behind_gates(
    target: Target,
    scheme: str,
    models: Iterable[ModelSpec],
    routers: Iterable[RouterConfig] | None = None,
) -> Sweep:
    """Judge the calls that only a gate for the routing method stops, as `sweep` does the others.

    A gate can hide that the code behind it forgets an argument, until somebody opens it. A call is
    looked at where its method would mean what the router means, the scheme rejects it, and takes
    the same model with another method. What would crash is no cause: it would be noticed.
    """
    candidates = swept_models(swept_routers(1) if routers is None else routers)
    methods = [m for m in target.flashinfer.methods if m in target.method_numbers()]
    target.prepare_gates(candidates, scheme, methods)
    return _sweep(
        target,
        lambda model, reads: _behind_gates(target, model, scheme, methods, reads),
        scheme,
        models,
        candidates,
        bad=(Verdict.WRONG,),
    )


def _behind_gates(
    target: Target,
    model: ModelSpec,
    scheme: str,
    methods: Iterable[str],
    reads: RouterConfig | None,
) -> Iterator[Judgement]:
    answers = {method: target.gates(model, scheme, method) for method in methods}
    if any(all(gate.ok for gate in gates) for gates in answers.values()):
        meant = model if reads is None else replace(model, router=reads)
        for call in exact_calls(meant, scheme, target.flashinfer):
            gates = answers.get(call.method, ())
            # No framework makes up a bias for a router that has none.
            if call.bias != "zeros" and not all(gate.ok for gate in gates):
                yield judge_behind_gates(target, model, scheme, call, gates, reads)


def _sweep(
    target: Target,
    judged: Callable[[ModelSpec, RouterConfig | None], Iterable[Judgement]],
    scheme: str,
    models: Iterable[ModelSpec],
    candidates: Sequence[ModelSpec],
    bad: Sequence[Verdict] = BAD,
) -> Sweep:
    verdicts: Counter[Verdict] = Counter()
    unanswered: Counter[str] = Counter()
    examples: dict[_Key, list[Judgement]] = {}
    by_method: dict[str, list[Judgement]] = {}
    for candidate, reads in zip(candidates, target.read_routers(candidates), strict=True):
        if isinstance(reads, Unsupported):
            unanswered[f"its own router cannot be asked: {reads}"] += 1
            continue
        try:
            for found in judged(candidate, reads):
                verdicts[found.verdict] += 1
                if found.verdict in bad:
                    examples.setdefault(_key(found), []).append(found)
                by_method.setdefault(found.classification.method, []).append(found)
        except Unsupported as reason:
            unanswered[str(reason)] += 1
    lost = list(_lost(scheme, by_method))
    concerned: dict[_Key, list[Judgement]] = {}
    missed: dict[str, list[Judgement]] = {}
    unanswered_models: Counter[str] = Counter()
    for model in models if examples or lost else ():
        try:
            for found in judged(model, None):
                if found.verdict in bad:
                    concerned.setdefault(_key(found), []).append(found)
                if found.verdict is Verdict.MISSED and found.record().fails:
                    missed.setdefault(found.classification.method, []).append(found)
        except Unsupported as reason:
            unanswered_models[str(reason)] += 1
    causes = [_cause(scheme, found, concerned.get(key, ())) for key, found in examples.items()]
    lost = [replace(cause, concerned=tuple(missed.get(cause.methods[0], ()))) for cause in lost]
    return Sweep(verdicts, unanswered, (*_independent(causes), *lost), unanswered_models)


def _cause(scheme: str, found: Sequence[Judgement], concerned: Iterable[Judgement]) -> Cause:
    example = found[0]
    methods = tuple(dict.fromkeys(each.classification.method for each in found))
    why = cause_of(example)
    return Cause(scheme, example.verdict, why, methods, len(found), example, tuple(concerned))


def _lost(scheme: str, by_method: Mapping[str, Sequence[Judgement]]) -> Iterator[Cause]:
    """Each method that a target chooses and loses in every case that the method would serve.

    A single router may be rejected for its size; a method without any router left is a gate that
    was closed, or a row that was forgotten.
    """
    for method, judgements in by_method.items():
        if any(found.verdict is Verdict.EXACT for found in judgements):
            continue
        served = [
            found for found in judgements if any(call.method == method for call in found.exact)
        ]
        if served and all(found.verdict is Verdict.MISSED for found in served):
            gates = tuple(gate.name for gate in served[0].rejections)
            why = tuple(("gate", name, "") for name in gates)
            yield Cause(scheme, Verdict.MISSED, why, (method,), len(served), served[0])


def _independent(causes: list[Cause]) -> Iterator[Cause]:
    """Drop causes whose reasons are the union of other causes' reasons."""
    for cause in causes:
        parts = [
            set(other.fields)
            for other in causes
            if other.verdict is cause.verdict and set(other.fields) < set(cause.fields)
        ]
        if set().union(*parts) != set(cause.fields):
            yield cause


#: verdict; kind, field and fact of each finding; the code that makes the call
_Key = tuple[Verdict, frozenset[tuple[str, str, str]], str]


def _key(judgement: Judgement) -> _Key:
    """Return what configs of one cause share; limits of several methods are one cause."""
    limit = Kind.LIMIT.value
    parts = ((k, field, "" if k == limit else fact) for k, field, fact in cause_of(judgement))
    return judgement.verdict, frozenset(parts), judgement.site


def cause_of(judgement: Judgement) -> tuple[tuple[str, str, str], ...]:
    """Why a judgement is bad, without the numbers of its router."""
    causes = [finding.cause for finding in judgement.findings]
    groups = [cause for cause in causes if cause[:2] in _GROUPS]
    if groups:
        facts = "; ".join(dict.fromkeys(fact for _, _, fact in groups if fact))
        rest = [cause for cause in causes if cause not in groups]
        if _differ_by_groups_alone(judgement):
            rest = [cause for cause in rest if cause[0] != Kind.RECIPE]
        causes = [(Kind.RECIPE.value, "groups", facts), *rest]
    return tuple(dict.fromkeys(causes))


def _differ_by_groups_alone(judgement: Judgement) -> bool:
    """Whether a kernel would be right if the router had no groups: the score then ranks nothing."""
    if judgement.got is None:
        return False
    wanted, got = (
        replace(recipe, n_group=1, topk_group=1) for recipe in (judgement.wanted, judgement.got)
    )
    return same(wanted, got, judgement.model.router.num_experts)
