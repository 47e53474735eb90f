"""The judgement of one model in one scheme: a target's answers against what the model means."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.effects import mask_notes
from pytest_moe_routing.oracle.exact import Gate, exact_calls, kernel_gates, meaning
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.record import Reach, VerdictRecord
from pytest_moe_routing.oracle.target import Captured, Choice, Classification, Target
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.routing import Recipe, normal_form, recipe_of, same

if TYPE_CHECKING:
    from pytest_moe_routing.compare.equivalence import Counterexample

_GROUPS = ("n_group", "topk_group", "group_score")


@dataclass(frozen=True)
class Judgement:
    """One verdict with everything that led to it.

    Attributes:
        classification: The target's routing method, and its path.
        gates: All gates that were asked.
        wanted: What the model's router computes.
        call: What reaches the kernel (or would, had the gates accepted).
        got: What the kernel computes then; None if the kernel does not run.
        findings: What is wrong with a kernel call that the gates accept.
        exact: The calls that would have computed the model's router.
        downcasts: What the target makes less precise for a kernel that runs.
        notes: Matters of precision in the kernel itself.
        site: The code that makes the kernel call.
        choice: What makes the target take the fused experts, if that is known.
    """

    target: str
    release: str
    model: ModelSpec
    scheme: str
    flashinfer: FlashInfer
    verdict: Verdict
    classification: Classification
    gates: tuple[Gate, ...]
    wanted: Recipe
    call: KernelCall | None = None
    got: Recipe | None = None
    findings: tuple[Finding, ...] = ()
    exact: tuple[KernelCall, ...] = ()
    downcasts: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    site: str = ""
    choice: Choice | None = None

    @property
    def opt_in(self) -> tuple[str, ...]:
        """What has to be switched on for the target to take this path."""
        if self.choice is None:
            return ()
        return self.choice.device if self.choice.switches is None else self.choice.switches

    @property
    def by_default(self) -> bool:
        """Whether the target is known to take this path by default."""
        return self.choice is not None and self.choice.switches == ()

    @cached_property
    def counterexample(self) -> Counterexample | None:
        """A smallest token if the recipe itself is wrong; searched for when first asked for.

        Without torch there is none: what differs is known without it.
        """
        if self.verdict is not Verdict.WRONG or self.got is None or find_spec("torch") is None:
            return None
        from pytest_moe_routing.compare.equivalence import counterexample

        return counterexample(self.wanted, meaning(self.got), self.model.router.num_experts)

    @property
    def rejections(self) -> tuple[Gate, ...]:
        """The gates that said no."""
        return tuple(gate for gate in self.gates if not gate.ok)

    @property
    def by_choice(self) -> bool:
        """Whether the target rejects the model only to route by itself."""
        return bool(self.rejections) and all(gate.by_choice for gate in self.rejections)

    @property
    def obstacles(self) -> tuple[str, ...]:
        """Why no fused kernel runs the model; empty if one does."""
        if self.verdict is not Verdict.FALLBACK:
            return ()
        gates = kernel_gates(self.model, self.scheme, self.flashinfer)
        found = tuple(f"{gate.name}: {gate.reason}" for gate in gates if not gate.ok)
        return found or ("no routing method of this release computes the router",)

    def record(self) -> VerdictRecord:
        """The judgement as plain data."""
        example = self.counterexample
        return VerdictRecord(
            model=str(self.model),
            scheme=self.scheme,
            target=self.target,
            release=self.release,
            flashinfer=self.flashinfer.release,
            judged_as=self.flashinfer.judged_as,
            verdict=self.verdict,
            reach=reach_of(self.model, self.scheme, self.opt_in),
            router=self.model.router.not_expressible or str(self.wanted),
            method=self.classification.method,
            path=self.classification.path,
            gates=tuple(gate.name for gate in self.gates),
            rejected_by={gate.name: gate.reason for gate in self.rejections},
            by_choice=self.by_choice,
            kernel=None if self.got is None else str(self.got),
            findings=self.findings,
            notes=(*self.downcasts, *self.notes),
            counterexample=None if example is None else example.as_dict(),
            exact=tuple(map(str, self.exact)),
            obstacles=self.obstacles,
            site=self.site,
            opt_in=self.opt_in,
            by_default=self.by_default,
        )


def reach_of(model: ModelSpec, scheme: str, opt_in: Iterable[str] = ()) -> Reach:
    """Who can run a model in a scheme."""
    if tuple(opt_in):
        return Reach.OPT_IN
    return Reach.PUBLISHED if scheme in model.checkpoints else Reach.PRODUCIBLE


def unjudged(target: Target, model: ModelSpec, scheme: str, why: Exception) -> VerdictRecord:
    """The record of a model that the target could not be asked about."""
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
        reason=str(why),
    )


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
        recorded_only: Do not take a call that is not recorded to be what the model says.
        chosen: Ask as well whether the target takes the experts whose gates accept the model.

    Raises:
        Unsupported: The target cannot answer a question that the verdict needs.
    """
    model = as_read_by(target, model)
    if questions := open_questions(model):
        raise Unsupported(f"{model} is not judged: {'; '.join(questions)}")
    classification = target.classify(model)
    gates = target.gates(model, scheme, classification.method)
    choice = target.choice(model, scheme, classification.method) if chosen else None
    accepted = all(gate.ok for gate in gates)
    if choice is not None and accepted != (choice.switches is not None):
        if not accepted:
            # What the gates were asked is not what decides.
            names = ", ".join(gate.name for gate in gates if not gate.ok)
            finding = Finding(Kind.CHOICE, choice.selector, None, names)
            base = _asked(target, model, scheme, classification, gates)
            return _judge_call(target, replace(base, choice=choice), contradiction=finding)
        reason = f"{choice.selector} never takes experts whose gates accept: {choice.instead}"
        gates, accepted = (*gates, Gate("backend selection", False, reason)), False
    base = replace(_asked(target, model, scheme, classification, gates), choice=choice)
    if not accepted:
        exact = tuple(exact_calls(model, scheme, target.flashinfer))
        return replace(base, verdict=Verdict.MISSED if exact else Verdict.FALLBACK, exact=exact)
    return _judge_call(target, base, recorded_only=recorded_only)


def as_read_by(target: Target, model: ModelSpec) -> ModelSpec:
    """Return the model as the target reads its config, where transformers ignores a key.

    What the target is not known to honor or to ignore stays in `contradicted`.
    """
    honored = {name: target.honors(model, name) for name in model.contradicted}
    stated = {name: model.contradicted[name] for name, does in honored.items() if does}
    if stated.get("renormalize") is False:
        stated["renormalize_epsilon"] = 0.0
    fields = vars(model.router).keys()
    router = replace(model.router, **{n: v for n, v in stated.items() if n in fields})
    experts = replace(model.experts, **{n: v for n, v in stated.items() if n not in fields})
    if any(router.problems()) or any(experts.problems()):
        return model
    unknown = {name: v for name, v in model.contradicted.items() if honored[name] is None}
    return replace(model, router=router, experts=experts, contradicted=unknown)


def open_questions(model: ModelSpec) -> list[str]:
    """Why a verdict on the model would rest on a guess, in sentences; empty if it would not."""
    computed = {**vars(model.experts), **vars(model.router)}
    return [*model.unproven] + [
        f"{name} is {computed[name]} in transformers, and {stated} for who honors the config"
        for name, stated in model.contradicted.items()
    ]


def judge_behind_gates(
    target: Target, model: ModelSpec, scheme: str, method: str, gates: tuple[Gate, ...]
) -> Judgement:
    """Judge the call that a target would make, whatever its classifier and gates say.

    Args:
        method: The routing method that the call would be made with.
        gates: The gates' answers for it, for the record.

    Raises:
        Unsupported: The target's calls are not recorded, or this one cannot be made.
    """
    classification = Classification(method, ("if no gate stopped it",))
    base = _asked(target, model, scheme, classification, gates)
    return _judge_call(target, base, recorded_only=True)


def _asked(
    target: Target,
    model: ModelSpec,
    scheme: str,
    classification: Classification,
    gates: tuple[Gate, ...],
) -> Judgement:
    """What is known before the call: exact, unless more is found."""
    return Judgement(
        target=target.name,
        release=target.version(),
        model=model,
        scheme=scheme,
        flashinfer=target.flashinfer,
        verdict=Verdict.EXACT,
        classification=classification,
        gates=gates,
        wanted=recipe_of(model.router),
    )


def _assumed(target: Target, model: ModelSpec, scheme: str, method: str) -> Captured:
    """The call of a target whose own is not recorded, with its number for the method."""
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
    beyond = Unsupported(
        f"{target} accepts {model}, which cannot be judged: {model.router.not_expressible}"
    )
    captured = target.capture(model, scheme, method)
    if captured is None:
        if recorded_only:
            raise Unsupported(f"{target}: its calls are not recorded")
        if model.router.not_expressible is not None:
            raise beyond
        captured = _assumed(target, model, scheme, method)
    call, wrong = captured.call, captured.wrong
    if contradiction is not None:
        wrong = (contradiction, *wrong)
    base = replace(base, call=call, findings=wrong, site=captured.site)

    def bad(verdict: Verdict, *more: Finding) -> Judgement:
        exact = tuple(exact_calls(model, scheme, flashinfer))
        return replace(base, verdict=verdict, findings=(*wrong, *more), exact=exact)

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
    notes = tuple(Finding(Kind.PRECISION, method, fact=fact) for fact in facts)
    base = replace(base, got=got, downcasts=captured.downcasts, notes=notes)
    got = meaning(got)
    is_same = same(base.wanted, got, experts)
    if is_same and model.router.not_expressible is not None:
        # What the recipe does not say may be done outside the kernel; the rest was judged.
        raise beyond
    if is_same and not wrong:
        if captured.unknown:
            raise Unsupported(f"{target}: not judged: {captured.unknown}")
        return base
    return bad(Verdict.WRONG, *(() if is_same else _differences(base, call, got)))


def _differences(base: Judgement, call: KernelCall, got: Recipe) -> Iterable[Finding]:
    """The fields in which the kernel computes something else, and what explains each."""
    experts = base.model.router.num_experts
    meant = normal_form(base.wanted, experts).differences(normal_form(got, experts))
    written = base.wanted.differences(got)
    differing = {name: written[name] for name in meant if name in written} or meant
    for name, (wanted, found) in differing.items():
        facts = "; ".join(base.flashinfer.facts(call, {name}))
        yield Finding(Kind.RECIPE, name, wanted, found, fact=facts)
