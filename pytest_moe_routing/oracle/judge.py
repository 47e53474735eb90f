"""The judgement of one model in one scheme: a target's answers against what the model means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pytest_moe_routing.errors import (
    MoERoutingError,
    TargetError,
    TargetImportError,
    Unsupported,
)
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.flashinfer import KernelCall
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.models.huggingface.config_keys import in_checkpoint
from pytest_moe_routing.oracle.choice import Choice
from pytest_moe_routing.oracle.effects import mask_notes
from pytest_moe_routing.oracle.exact import Gate, exact_calls, meaning
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.judgement import Judgement, reach_of
from pytest_moe_routing.oracle.lost import held_to_expectation
from pytest_moe_routing.oracle.modular import with_what_runs
from pytest_moe_routing.oracle.record import VerdictRecord
from pytest_moe_routing.oracle.shares import with_sizes
from pytest_moe_routing.oracle.target import Captured, Classification, Target
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.routing import Recipe, normal_form, recipe_of, same

#: Why a target computes what a config does not state.
_IGNORED = "the code of the model does not read the config's key for it"


def unjudged(target: Target, model: ModelSpec, scheme: str, why: Exception) -> VerdictRecord:
    """Return the record of a model that the target could not be asked about."""
    try:
        release = target.version()
    except Unsupported:
        release = ""
    return VerdictRecord(
        model=str(model),
        scheme=scheme,
        target=target.name,
        release=release,
        flashinfer=target.flashinfer.release,
        judged_as=target.flashinfer.judged_as,
        verdict=Verdict.NOT_JUDGED if isinstance(why, Unsupported) else Verdict.ERROR,
        reach=reach_of(model, scheme),
        router=model.router.not_expressible or str(recipe_of(model.router)),
        reason=why.summary if isinstance(why, TargetError) else str(why),
    )


def record_of(target: Target, model: ModelSpec, scheme: str) -> VerdictRecord:
    """Return the verdict on a model in a scheme, or why there is none.

    Raises:
        TargetImportError: The target cannot be asked anything.
    """
    try:
        return judge(target, model, scheme).record()
    except TargetImportError:
        raise
    except MoERoutingError as reason:
        return unjudged(target, model, scheme, reason)


def judge(
    target: Target,
    model: ModelSpec,
    scheme: str,
    *,
    recorded_only: bool = False,
    chosen: bool = True,
) -> Judgement:
    """Judge what a target makes of a model in a scheme.

    Args:
        recorded_only: Raise `Unsupported` if the target's call is not recorded, instead of
            assuming that it passes what the model says.
        chosen: Also ask whether the target selects the experts whose gates accept the model, and
            hold it to what its release is known to do.

    Raises:
        Unsupported: The target cannot answer a question that the verdict needs.
    """
    judgement = _judge(target, model, scheme, recorded_only=recorded_only, chosen=chosen)
    if not chosen:
        return judgement
    judgement = with_sizes(target, with_what_runs(target, judgement))
    return held_to_expectation(target, judgement)


def _judge(
    target: Target, model: ModelSpec, scheme: str, *, recorded_only: bool, chosen: bool
) -> Judgement:
    """Judge a case by itself; see `judge`."""
    ignored = {n: v for n, v in model.disputed.items() if target.honors(model, n) is False}
    model = as_read_by(target, model)
    if questions := open_questions(model):
        raise Unsupported(f"{model} is not judged: {'; '.join(questions)}")
    if ignored:
        return _ignoring(target, model, scheme, ignored)
    classification = target.classify(model)
    if unnamed := _not_named(target, model):
        base = _asked(target, model, scheme, classification, ())
        return replace(base, verdict=Verdict.WRONG, findings=unnamed)
    gates = target.gates(model, scheme, classification.method)
    choice = target.choice(model, scheme, classification.method) if chosen else None
    accepted = all(gate.ok for gate in gates)
    if choice is not None and accepted != (choice.switches is not None):
        if not accepted:
            # What the gates were asked is not what decides.
            names = ", ".join(gate.name for gate in gates if not gate.ok)
            finding = Finding(Kind.CHOICE, choice.selector, None, names)
            base = _asked(target, model, scheme, classification, gates, choice=choice)
            return _judge_call(target, base, contradiction=finding)
        reason = (
            f"{choice.selector} never selects these experts, although their gates accept the "
            f"layer: {choice.instead}"
        )
        gates, accepted = (*gates, Gate("backend selection", False, reason)), False
    exact = None if accepted else tuple(exact_calls(model, scheme, target.flashinfer))
    base = _asked(target, model, scheme, classification, gates, choice=choice, exact=exact)
    return _judge_call(target, base, recorded_only=recorded_only) if accepted else base


def as_read_by(target: Target, model: ModelSpec) -> ModelSpec:
    """Return the model as the target reads its config.

    What the target is not known to honor or to ignore stays in `contradicted` and `disputed`, and
    what it is not known to run in `unknown_architectures`.
    """
    honored = {name: target.honors(model, name) for name in model.contradicted}
    stated = {name: model.contradicted[name] for name, does in honored.items() if does}
    if stated.get("renormalize") is False:
        stated["renormalize_epsilon"] = 0.0
    stated["logits_dtype"] = target.logits_dtype(model)
    fields = vars(model.router).keys()
    router = replace(model.router, **{n: v for n, v in stated.items() if n in fields})
    experts = replace(model.experts, **{n: v for n, v in stated.items() if n not in fields})
    if any(router.problems()) or any(experts.problems()):
        return model
    unknown = {name: v for name, v in model.contradicted.items() if honored[name] is None}
    classes = [n for n in model.unknown_architectures if not target.runs_as(n, model.read_as)]
    return replace(
        model,
        router=router,
        experts=experts,
        contradicted=unknown,
        disputed={n: v for n, v in model.disputed.items() if target.honors(model, n) is None},
        unknown_architectures=tuple(classes),
    )


#: The keys of a model that hold its open questions.
OPEN_KEYS = ("unproven", "unknown_architectures", "contradicted", "disputed")


def open_questions(model: ModelSpec) -> list[str]:
    """Why a verdict on the model would rest on a guess, in sentences; empty if it would not."""
    computed = {**vars(model.experts), **vars(model.router)}
    known = " or ".join(model.read_as[:2])
    return [
        *model.unproven,
        *(
            f"{shorten(name)} is not known; the config is read as that of {known}"
            for name in model.unknown_architectures
        ),
        *(
            f"{name} is {computed[name]} in transformers, and {stated} in frameworks "
            "that honor the config"
            for name, stated in model.contradicted.items()
        ),
        *(
            f"{name} is {computed[name]} in frameworks that honor the config, and "
            f"{otherwise} in transformers"
            for name, otherwise in model.disputed.items()
        ),
    ]


def _ignoring(
    target: Target, model: ModelSpec, scheme: str, ignored: Mapping[str, Any]
) -> Judgement:
    """Judge a target whose code of the model ignores keys that decide what the model computes.

    It computes another router then, whether in a kernel or by itself.
    """
    router = replace(model.router, **ignored)
    classification = target.classify(replace(model, router=router))
    base = _asked(target, model, scheme, classification, ())
    findings = tuple(
        Finding(Kind.RECIPE, name, getattr(model.router, name), value, fact=_IGNORED)
        for name, value in ignored.items()
    )
    return replace(base, verdict=Verdict.WRONG, got=recipe_of(router), findings=findings)


def _not_named(target: Target, model: ModelSpec) -> tuple[Finding, ...]:
    """Return a finding for each key about the checkpoint's weights that the target's code ignores.

    A name that stands nowhere in the code is read by none of it.
    """
    ignored = {
        k: v for k, v in in_checkpoint(model.raw_config).items() if target.contains(k) is False
    }
    return tuple(
        Finding(
            Kind.RECIPE,
            key,
            fact=f"{reason}, and the code of {target} does not contain the name of this key",
        )
        for key, reason in ignored.items()
    )


def judge_swept(target: Target, model: ModelSpec, scheme: str, reads: RouterConfig) -> Judgement:
    """Judge what a target makes of a config, by what its own router computes for it.

    A kernel that computes what the config says is right as well, whatever else the target's own
    router does. A rejected config counts as missed only if the method that the target chose
    computes it.

    Args:
        reads: What the target's own router computes.

    Raises:
        Unsupported: The target cannot answer a question that the verdict needs.
    """
    classification = target.classify(model)
    method = classification.method
    gates = target.gates(model, scheme, method)
    if not all(gate.ok for gate in gates):
        meant = model if reads == model.router else replace(model, router=reads)
        exact = tuple(exact_calls(meant, scheme, target.flashinfer, (method,)))
        return _asked(target, model, scheme, classification, gates, reads, exact=exact)
    base = _asked(target, model, scheme, classification, gates, reads)
    found = _judge_call(target, base, recorded_only=False)
    reads_otherwise = reads != model.router and not any(model.router.problems())
    if found.verdict is Verdict.WRONG and reads_otherwise:
        as_stated = replace(base, wanted=recipe_of(model.router), reads=None)
        literal = _judge_call(target, as_stated, recorded_only=False)
        return literal if literal.verdict is Verdict.EXACT else found
    return found


def judge_behind_gates(
    target: Target,
    model: ModelSpec,
    scheme: str,
    call: KernelCall,
    gates: tuple[Gate, ...],
    reads: RouterConfig | None = None,
) -> Judgement:
    """Judge the call that a target would make, whatever its classifier and gates say.

    Args:
        call: A call that means the model's router; the target's is made with its method.
        gates: The gates' answers for the method, for the record.
        reads: What the target's own router computes, if that is what the model means to it.

    Raises:
        Unsupported: The target's calls are not recorded, or this one cannot be made.
    """
    classification = Classification(call.method, ("if no gate stopped it",))
    base = _asked(target, model, scheme, classification, gates, reads)
    return _judge_call(target, base, recorded_only=True)


def _asked(
    target: Target,
    model: ModelSpec,
    scheme: str,
    classification: Classification,
    gates: tuple[Gate, ...],
    reads: RouterConfig | None = None,
    *,
    choice: Choice | None = None,
    exact: tuple[KernelCall, ...] | None = None,
) -> Judgement:
    """Return what is known before the call: exact, unless more is found.

    Args:
        exact: Of a model that the gates reject, the calls that would compute its router.
    """
    switches, question = None, ""
    try:
        switches = target.opt_in(model, scheme)
    except Unsupported as reason:
        question = str(reason)
    verdict = Verdict.EXACT
    if exact is not None:
        verdict = Verdict.MISSED if exact else Verdict.FALLBACK
    return Judgement(
        target=target.name,
        release=target.version(),
        model=model,
        scheme=scheme,
        flashinfer=target.flashinfer,
        verdict=verdict,
        classification=classification,
        gates=gates,
        wanted=recipe_of(reads or model.router),
        known_exact=exact or (),
        switches=switches,
        reach_question=question,
        reads=reads,
        choice=choice,
    )


def _assumed(target: Target, model: ModelSpec, scheme: str, method: str) -> Captured:
    """Return the call of a target whose own is not recorded, with its number for the method."""
    flashinfer = target.flashinfer
    number = target.method_numbers().get(method)
    read_as = None if number is None else flashinfer.method(number)
    if read_as is None:
        return Captured(None, (Finding(Kind.ENUM, method, number),))
    call = target.kernel_call(model, scheme, read_as)
    wrong = () if read_as == method else (Finding(Kind.ENUM, method, number, read_as),)
    return Captured(call, wrong)


def _judge_call(
    target: Target,
    base: Judgement,
    *,
    recorded_only: bool = False,
    contradiction: Finding | None = None,
) -> Judgement:
    """Judge the call that follows a classification.

    Args:
        contradiction: What is wrong already, as the call is made although gates reject it.
    """
    model, scheme, flashinfer = base.model, base.scheme, base.flashinfer
    method = base.classification.method

    def beyond() -> Unsupported:
        why = model.router.not_expressible
        return Unsupported(f"{target} accepts {model}, which cannot be judged: {why}")

    captured = target.capture(model, scheme, method)
    if captured is None:
        if recorded_only:
            raise Unsupported(f"{target}: its calls are not recorded")
        if model.router.not_expressible is not None:
            raise beyond()
        captured = _assumed(target, model, scheme, method)
    call, wrong = captured.call, captured.wrong
    if contradiction is not None:
        wrong = (contradiction, *wrong)
    known: dict[str, Any] = {"call": call, "site": captured.site, "source": captured.source}

    def bad(verdict: Verdict, *more: Finding) -> Judgement:
        # The config sweep has thousands of these, and tells of few what would be exact.
        findings = (*wrong, *more)
        return replace(base, **known, verdict=verdict, findings=findings, known_exact=None)

    if call is None:
        return bad(Verdict.CRASH)
    violations = flashinfer.violations(call)
    if violations:
        broken = (
            Finding(Kind.LIMIT, v.field or call.method, v.required, v.found, fact=v.rule.fact)
            for v in violations
        )
        return bad(Verdict.CRASH if violations[0].is_error else Verdict.WRONG, *broken)
    got, experts = flashinfer.recipe(call), model.router.num_experts
    facts = (*flashinfer.notes(call), *mask_notes(base.wanted, got, experts))
    notes = (*(Finding(Kind.PRECISION, method, fact=fact) for fact in facts), *captured.notes)
    known.update(got=got, downcasts=captured.downcasts, notes=notes)
    got = meaning(got)
    is_same = same(base.wanted, got, experts)
    if is_same and model.router.not_expressible is not None:
        # What the recipe does not say may be done outside the kernel; the rest was judged.
        raise beyond()
    if is_same and not wrong:
        if captured.unknown:
            raise Unsupported(f"{target}: not judged: {captured.unknown}")
        return replace(base, **known)
    if is_same and all(finding.kind is Kind.LIMIT for finding in wrong):
        return bad(Verdict.CRASH)
    return bad(Verdict.WRONG, *(() if is_same else _differences(base, call, got)))


def _differences(base: Judgement, call: KernelCall, got: Recipe) -> Iterable[Finding]:
    """Return the fields in which the kernel computes something else, and what explains each."""
    experts = base.model.router.num_experts
    meant = normal_form(base.wanted, experts).differences(normal_form(got, experts))
    written = base.wanted.differences(got)
    differing = {name: written[name] for name in meant if name in written} or meant
    for name, (wanted, found) in differing.items():
        facts = "; ".join(base.flashinfer.facts(call, {name}))
        yield Finding(Kind.RECIPE, name, wanted, found, fact=facts)
