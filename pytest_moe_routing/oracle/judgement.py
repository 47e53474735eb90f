"""A judgement: one verdict with everything that led to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING

from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.oracle.calls import arguments_of
from pytest_moe_routing.oracle.choice import Choice, Rule
from pytest_moe_routing.oracle.exact import Gate, exact_calls, kernel_gates, meaning, same_calls
from pytest_moe_routing.oracle.finding import Finding, source_of, switches_of
from pytest_moe_routing.oracle.record import Reach, VerdictRecord
from pytest_moe_routing.oracle.target import Classification
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.routing import Recipe

if TYPE_CHECKING:
    from pytest_moe_routing.compare.equivalence import Counterexample


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
        known_exact: What `exact` returns; None to search for it when it is first asked for.
        downcasts: What the target makes less precise for a kernel that runs.
        notes: Matters of precision in the kernel itself.
        site: The code that makes the kernel call.
        choice: What makes the target take the fused experts, if that is known.
        source: Its file and line, from the root of the target's package on.
        switches: What makes a target without a `choice` take this path; None if it is not asked.
        reach_question: Why it is not known what makes the target take this path.
        reads: The router that the target's own code computes for the model without a fused kernel,
            if that is what the kernel is compared with.
        lost_since: The release whose fused kernel runs, where this one's no longer does, or no
            longer by default; empty if the kernel is not lost.
        rule: The code that keeps a lost kernel from the model.
        unanswered: Why it is not known whether the experts run where their backend is named; empty
            if it is, or if nobody asks.
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
    known_exact: tuple[KernelCall, ...] | None = ()
    downcasts: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    site: str = ""
    source: str = ""
    switches: tuple[str, ...] | None = None
    reach_question: str = ""
    reads: RouterConfig | None = None
    choice: Choice | None = None
    lost_since: str = ""
    rule: Rule = field(default_factory=Rule)
    unanswered: str = ""

    @property
    def opt_in(self) -> tuple[str, ...]:
        """What has to be switched on for the target to take this path, with what is wrong on it."""
        of_way = switches_of(self.findings)
        if self.choice is None:
            return (*(self.switches or ()), *of_way)
        switches = self.choice.switches
        return (*(self.choice.device if switches is None else switches), *of_way)

    @property
    def by_default(self) -> bool:
        """Whether the target is known to take this path by default."""
        switches = self.switches if self.choice is None else self.choice.switches
        return switches == ()

    @cached_property
    def meant(self) -> ModelSpec:
        """The model with the router that a kernel has to compute."""
        return self.model if self.reads is None else replace(self.model, router=self.reads)

    @cached_property
    def exact(self) -> tuple[KernelCall, ...]:
        """The calls that would have computed the model's router, the chosen method's first."""
        known = self.known_exact
        calls = exact_calls(self.meant, self.scheme, self.flashinfer) if known is None else known
        return tuple(sorted(calls, key=lambda call: call.method != self.classification.method))

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
        """Why no call of a fused kernel would be exact; empty if one would."""
        if self.verdict is Verdict.EXACT or self.exact:
            return ()
        gates = kernel_gates(self.model, self.scheme, self.flashinfer)
        found = tuple(f"{gate.name}: {gate.reason}" for gate in gates if not gate.ok)
        router, entry = self.meant.router, self.flashinfer.entry_point(self.scheme)
        is_asked = entry is not None and router.not_expressible is None
        if not is_asked or same_calls(router, self.scheme, self.flashinfer):
            return found
        return (*found, "no routing method of this release computes the router")

    def record(self) -> VerdictRecord:
        """Return the judgement as plain data."""
        example = self.counterexample
        calls = (self.call,) if self.verdict is Verdict.EXACT else self.exact
        call = next(filter(None, calls), None)
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
            call=None if call is None else arguments_of(self.model, call, self.flashinfer),
            obstacles=self.obstacles,
            site=self.site,
            received="" if self.call is None or self.verdict.is_good else str(self.call),
            source=self.rule.source or self.source or source_of(self.findings),
            opt_in=self.opt_in,
            by_default=self.by_default,
            reach_question=self.reach_question,
            lost_since=self.lost_since,
            rule=self.rule.name,
            instead=self.rule.instead,
        )


def reach_of(model: ModelSpec, scheme: str, opt_in: Iterable[str] = ()) -> Reach:
    """Who can run a model in a scheme."""
    if tuple(opt_in):
        return Reach.OPT_IN
    if scheme not in model.checkpoints:
        return Reach.PRODUCIBLE
    return Reach.PUBLISHED if model.is_published else Reach.OWN
