"""The config sweep: routers around every known family, whether or not a model has them.

A target that is right for every model may still be wrong for the next one. Each configuration of
the sweep is judged as a model would be, and what is wrong or crashes is grouped by its cause.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache, cached_property
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import KernelCall
from pytest_moe_routing.models import ExpertsConfig, ModelSpec, RouterConfig
from pytest_moe_routing.oracle.exact import Gate, exact_calls
from pytest_moe_routing.oracle.finding import Kind
from pytest_moe_routing.oracle.judge import Judgement, judge, judge_behind_gates
from pytest_moe_routing.oracle.target import Captured, Target
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.schemes import SERVED_SCHEMES

BAD = (Verdict.WRONG, Verdict.CRASH)
#: Fields that are one cause: a router has groups, or it has none.
_GROUPS = {(Kind.RECIPE.value, name) for name in ("n_group", "topk_group", "group_score", "mask")}

_Values = Mapping[str, Any]


def _groups(n_group: int | None, topk_group: int | None, group_score: str | None) -> _Values:
    return {"n_group": n_group, "topk_group": topk_group, "group_score": group_score}


#: What each axis takes: limits of kernels, and what models have, on both sides.
_AXES: tuple[tuple[_Values, ...], ...] = (
    tuple(
        {"num_experts": n}
        for n in (8, 16, 60, 64, 128, 160, 192, 256, 257, 288, 384, 512, 896, 1024, 2048)
    ),
    tuple({"top_k": k} for k in (1, 2, 4, 6, 8, 10, 16, 22, 32)),
    tuple({"scoring_func": name} for name in ("softmax", "sigmoid", "sqrtsoftplus")),
    ({"renormalize": False}, {"renormalize": True}),
    tuple({"correction_bias": dtype} for dtype in (None, "float32", "bfloat16")),
    tuple({"routed_scaling_factor": scale} for scale in (1.0, 1.5, 2.5)),
    (
        _groups(None, None, None),
        _groups(1, 1, None),
        _groups(2, 1, "max"),
        _groups(4, 2, "top2_sum"),
        _groups(8, 4, "top2_sum"),
        _groups(8, 4, "max"),
        _groups(8, 8, "top2_sum"),
        _groups(16, 4, "top2_sum"),
    ),
    tuple({"logits_dtype": name} for name in ("float32", "bfloat16", "float16")),
    ({"topk_before_score": False}, {"topk_before_score": True}),
    ({"weight_on": "output"}, {"weight_on": "input"}),
)

_PLAIN: _Values = {name: value for axis in _AXES for name, value in axis[0].items()}
_BIASED: _Values = {"scoring_func": "sigmoid", "renormalize": True, "correction_bias": "float32"}
#: The families of routers that models have: the sweep surrounds each.
_FAMILIES: tuple[_Values, ...] = (
    {"top_k": 2},
    {"top_k": 8, "num_experts": 128, "renormalize": True, "logits_dtype": "bfloat16"},
    {"top_k": 8, "num_experts": 64, "topk_before_score": True, "renormalize": True},
    {"top_k": 6, "num_experts": 64, "scoring_func": "sigmoid"},
    {"top_k": 8, "num_experts": 128, "scoring_func": "sigmoid", "renormalize": True},
    {"top_k": 8, "num_experts": 256, **_BIASED},
    {
        "top_k": 8,
        "num_experts": 256,
        **_BIASED,
        "routed_scaling_factor": 2.5,
        **_groups(8, 4, "top2_sum"),
    },
    {
        "top_k": 6,
        "num_experts": 256,
        **_BIASED,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sqrtsoftplus",
    },
    {
        "top_k": 1,
        "num_experts": 16,
        "scoring_func": "sigmoid",
        "weight_on": "input",
        "topk_before_score": True,
    },
)

#: Experts that every scheme takes, so that only the router decides.
_EXPERTS = ExpertsConfig(hidden_size=4096, intermediate_size=2048, activation="silu", gated=True)
#: Experts of other kinds, as models have them; each with the families' own routers.
_OTHER_EXPERTS = (
    replace(_EXPERTS, activation_limit=10.0),
    replace(_EXPERTS, activation="gelu"),
    replace(_EXPERTS, activation="relu2", gated=False),
    replace(
        _EXPERTS,
        activation="swigluoai",
        activation_limit=7.0,
        activation_alpha=1.702,
        activation_beta=1.0,
    ),
    replace(_EXPERTS, activation="swiglustep", activation_limit=7.0),
    replace(_EXPERTS, activation="situ", activation_alpha=4.0, activation_beta=25.0),
)


@cache
def swept_routers(distance: int = 2) -> tuple[RouterConfig, ...]:
    """Every router that differs from a family in at most `distance` axes, smallest first."""
    routers = {
        RouterConfig(**dict(chain(_PLAIN.items(), family.items(), *(c.items() for c in changes))))
        for family in _FAMILIES
        for axes in combinations(_AXES, distance)
        for changes in product(*axes)
    }
    valid = [router for router in routers if not list(router.problems())]
    return tuple(sorted(valid, key=_size))


def _size(router: RouterConfig) -> tuple[int, int, int, int, str]:
    """Small and plain routers first; any order will do among equals, but always the same."""
    unlike = sum(getattr(router, name) != value for name, value in _PLAIN.items())
    groups = router.n_group or 0
    return router.num_experts, router.top_k, groups, unlike, repr(router)


def swept_models(routers: Iterable[RouterConfig] | None = None) -> Iterator[ModelSpec]:
    """A model of each router; unless routers are given, the sweep's, and experts of all kinds."""
    yield from map(as_model, swept_routers() if routers is None else routers)
    if routers is None:
        for family, experts in product(_FAMILIES, _OTHER_EXPERTS):
            yield as_model(RouterConfig(**{**_PLAIN, **family}), experts)


def as_model(router: RouterConfig, experts: ExpertsConfig = _EXPERTS) -> ModelSpec:
    """A model with this router, and with experts that every scheme takes unless it says others."""
    sigmoid_top1 = router.topk_before_score and router.scoring_func == "sigmoid"
    llama4 = sigmoid_top1 and router.top_k == 1 and not (router.renormalize or router.n_group)
    return ModelSpec(
        router=router,
        experts=experts,
        model="a router of the config sweep",
        hf_repo="none/none",
        # By which frameworks know the one router that they do not tell from its parameters.
        architecture="Llama4ForConditionalGeneration" if llama4 else "AnyMoeForCausalLM",
        checkpoints=tuple(SERVED_SCHEMES),
        sources=("made up",),
        folder=Path("config-sweep"),
    )


@dataclass(frozen=True)
class Cause:
    """One reason why a target is wrong or crashes, however many routers it concerns.

    Attributes:
        why: What the findings have in common: kind, field and fact of each.
        count: Routers of the sweep that it concerns.
        example: The judgement of the smallest of them.
        models: Ids of the models that it concerns; none if it is latent.
    """

    scheme: str
    verdict: Verdict
    method: str
    why: tuple[tuple[str, str, str], ...]
    count: int
    example: Judgement
    models: tuple[str, ...] = ()

    @property
    def settings(self) -> dict[str, object]:
        """The settings of the example that are not defaults."""
        model = self.example.model
        values = {f.name: getattr(model.router, f.name) for f in fields(model.router)}
        found = {n: v for n, v in values.items() if v != _DEFAULTS.get(n, MISSING)}
        if model.experts != _EXPERTS:
            found["activation"] = model.experts.activation
        return found


_DEFAULTS = {f.name: f.default for f in fields(RouterConfig)}


@dataclass(frozen=True)
class Sweep:
    """What a target makes of the whole sweep in one scheme.

    Attributes:
        verdicts: How many routers have each verdict.
        unanswered: Why how many routers could not be judged.
        causes: Of all bad verdicts, those with the smallest examples first.
    """

    verdicts: Counter[Verdict]
    unanswered: Counter[str]
    causes: tuple[Cause, ...]


class CachedTarget(Target):
    """A target that is asked once for what no scheme changes: its questions may be slow."""

    name = "once"

    def __init__(self, target: Target) -> None:
        super().__init__(target.flashinfer)
        self._target = target
        self.version = cache(target.version)  # type: ignore[method-assign]
        self.method_numbers = cache(target.method_numbers)  # type: ignore[method-assign]
        self.classify = cache(target.classify)  # type: ignore[method-assign]

    def gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        return self._target.gates(model, scheme, method)

    def capture(self, model: ModelSpec, scheme: str, method: str) -> Captured | None:
        return self._target.capture(model, scheme, method)

    def kernel_call(self, model: ModelSpec, scheme: str, method: str) -> KernelCall:
        return self._target.kernel_call(model, scheme, method)

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
    """Judge every router of the config sweep on a scheme, and group what is bad by its cause.

    Args:
        target: Asked for the gates of every router, and for the call of every one that passes.
        scheme: Name of the scheme.
        models: Those of which a cause says whether it concerns them.
        routers: Other routers than the sweep's, smallest first.
    """
    return _sweep(
        lambda model: (judge(target, model, scheme, chosen=False),), scheme, models, routers
    )


def sweep_behind_gates(
    target: Target,
    scheme: str,
    models: Iterable[ModelSpec],
    routers: Iterable[RouterConfig] | None = None,
) -> Sweep:
    """Judge the calls that only a gate for the routing method stops, as `sweep` does the others.

    A gate can hide that the code behind it forgets an argument, until somebody opens it. A call is
    looked at where its method would mean what the router means, the scheme refuses it, and takes
    the same model with another method. What would crash is no cause: it would be noticed.
    """
    near = swept_routers(1) if routers is None else routers
    return _sweep(
        lambda model: _behind_gates(target, model, scheme),
        scheme,
        models,
        near,
        bad=(Verdict.WRONG,),
    )


def _behind_gates(target: Target, model: ModelSpec, scheme: str) -> Iterator[Judgement]:
    flashinfer = target.flashinfer
    numbers = target.method_numbers()
    answers = {
        method: target.gates(model, scheme, method)
        for method in flashinfer.methods
        if method in numbers
    }
    if any(all(gate.ok for gate in gates) for gates in answers.values()):
        for call in exact_calls(model, scheme, flashinfer):
            gates = answers.get(call.method, ())
            # No framework makes up a bias for a router that has none.
            if call.bias != "zeros" and not all(gate.ok for gate in gates):
                yield judge_behind_gates(target, model, scheme, call.method, gates)


def _sweep(
    judged: Callable[[ModelSpec], Iterable[Judgement]],
    scheme: str,
    models: Iterable[ModelSpec],
    routers: Iterable[RouterConfig] | None,
    bad: Sequence[Verdict] = BAD,
) -> Sweep:
    verdicts: Counter[Verdict] = Counter()
    unanswered: Counter[str] = Counter()
    examples: dict[_Key, list[Judgement]] = {}
    by_method: dict[str, list[Judgement]] = {}
    for candidate in swept_models(routers):
        try:
            for found in judged(candidate):
                verdicts[found.verdict] += 1
                if found.verdict in bad:
                    examples.setdefault(_key(found), []).append(found)
                by_method.setdefault(found.classification.method, []).append(found)
        except Unsupported as reason:
            unanswered[str(reason)] += 1
    concerned: dict[_Key, list[str]] = {}
    for model in models if examples else ():
        try:
            for found in judged(model):
                if found.verdict in bad:
                    concerned.setdefault(_key(found), []).append(str(model))
        except Unsupported:
            continue
    causes = [
        Cause(scheme, *key, len(found), found[0], tuple(concerned.get(key, ())))
        for key, found in examples.items()
    ]
    lost = [] if Verdict.MISSED in bad else _lost(scheme, by_method)
    return Sweep(verdicts, unanswered, (*_independent(causes), *lost))


def _lost(scheme: str, by_method: Mapping[str, Sequence[Judgement]]) -> Iterator[Cause]:
    """Each method that a target chooses and loses in every case that the method would serve.

    A single router may be rejected for its size; a method without any router left is a gate that
    was closed, or a row that was forgotten.
    """
    for method, judgements in by_method.items():
        served = [
            found
            for found in judgements
            if found.verdict is Verdict.EXACT or any(call.method == method for call in found.exact)
        ]
        if served and all(found.verdict is Verdict.MISSED for found in served):
            gates = tuple(gate.name for gate in served[0].rejections)
            why = tuple(("gate", name, "") for name in gates)
            yield Cause(scheme, Verdict.MISSED, method, why, len(served), served[0])


def _independent(causes: list[Cause]) -> Iterator[Cause]:
    """The causes without those that are others coming together."""
    for cause in causes:
        parts = [
            set(other.why)
            for other in causes
            if (other.verdict, other.method) == (cause.verdict, cause.method)
            and set(other.why) < set(cause.why)
        ]
        if set().union(*parts) != set(cause.why):
            yield cause


#: verdict, method, why
_Key = tuple[Verdict, str, tuple[tuple[str, str, str], ...]]


def _key(judgement: Judgement) -> _Key:
    return judgement.verdict, judgement.classification.method, cause_of(judgement)


def cause_of(judgement: Judgement) -> tuple[tuple[str, str, str], ...]:
    """Why a judgement is bad, without the numbers of its router."""
    causes = [finding.cause for finding in judgement.findings]
    groups = [cause for cause in causes if cause[:2] in _GROUPS]
    if groups:
        facts = "; ".join(dict.fromkeys(fact for _, _, fact in groups if fact))
        rest = [cause for cause in causes if cause not in groups]
        causes = [(Kind.RECIPE.value, "groups", facts), *rest]
    return tuple(dict.fromkeys(causes))
