"""The five verdicts: what becomes of a model on a scheme, when a target decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.arguments import ROUNDED
from pytest_moe_routing.oracle.exact import Gate, exact_calls
from pytest_moe_routing.oracle.target import Captured, Classification, Target
from pytest_moe_routing.routing import Recipe, normal_form, recipe_of, same

if TYPE_CHECKING:
    from pytest_moe_routing.compare.equivalence import Counterexample

#: What each verdict says, in a sentence.
VERDICTS = {
    "exact": "the fused kernel runs, and means what the model means",
    "wrong": "the fused kernel runs, and means something else",
    "crash": "the gates accept, the kernel launcher refuses",
    "fallback": "refused, and rightly: no routing method of this release expresses the router",
    "missed": "refused, although a routing method expresses the router exactly",
}
#: Verdicts of a target that decides well.
GOOD = ("exact", "fallback")


@dataclass(frozen=True)
class Judgement:
    """One verdict with everything that led to it.

    Attributes:
        verdict: A key of `VERDICTS`.
        classification: The target's routing method, and its path.
        gates: All gates that were asked.
        wanted: What the model's router computes.
        call: What reaches the kernel (or would, had the gates accepted).
        got: What the kernel computes then; None when the kernel does not run.
        problems: What the target's own code, or its number for the method, makes wrong.
        reasons: Why a kernel that was let run is wrong or crashes, in words.
        exact: The calls that would have meant what the model means.
        rounded: What the target's own code rounds, for a kernel that runs: keys of `ROUNDED`.
        notes: Matters of precision, those included, for a kernel that runs.
    """

    target: str
    model: ModelSpec
    scheme: str
    flashinfer: FlashInfer
    verdict: str
    classification: Classification
    gates: tuple[Gate, ...]
    wanted: Recipe
    call: KernelCall | None = None
    got: Recipe | None = None
    problems: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()
    exact: tuple[KernelCall, ...] = ()
    rounded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def differing(self) -> dict[str, tuple[object, object]]:
        """The fields in which the kernel means something else, as written: (wanted, got)."""
        if self.got is None:
            return {}
        experts = self.model.router.num_experts
        meant = normal_form(self.wanted, experts).differences(normal_form(self.got, experts))
        written = self.wanted.differences(self.got)
        return {name: written[name] for name in meant if name in written} or meant

    @cached_property
    def counterexample(self) -> Counterexample | None:
        """A smallest token, when the recipe itself is wrong. Looked for when first asked for."""
        if self.verdict != "wrong" or self.got is None:
            return None
        from pytest_moe_routing.compare.equivalence import counterexample

        return counterexample(self.wanted, self.got, self.model.router.num_experts)

    @property
    def good(self) -> bool:
        return self.verdict in GOOD

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain JSON, for reports of other processes and machines."""
        return {
            "model": self.model.id,
            "scheme": self.scheme,
            "target": self.target,
            "flashinfer": str(self.flashinfer),
            "verdict": self.verdict,
            "method": self.classification.method,
            "path": list(self.classification.path),
            "router": self.model.router.not_expressible or str(self.wanted),
            "gates": [gate.name for gate in self.gates],
            "refused": [str(gate) for gate in self.gates if not gate.ok],
            "kernel": None if self.got is None else str(self.got),
            "reasons": list(self.reasons),
            "counterexample": self.counterexample.lines() if self.counterexample else [],
            "exact": [show_call(call) for call in self.exact],
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """The whole story, from the router to the token."""
        return story(self.as_dict())


def story(record: Mapping[str, Any]) -> list[str]:
    """The lines of a `Judgement.as_dict`, or of an `unjudged`."""
    verdict = record["verdict"]
    meaning = VERDICTS.get(verdict, "not judged: the target does not answer")
    lines = [
        "{model} on {scheme}, decided by {target}: {verdict}".format(**record),
        f"  {meaning} ({record['flashinfer']})",
    ]
    if verdict in VERDICTS:
        lines.append(f"  router   {record['router']}")
        lines.append(f"  decided  {' -> '.join((*record['path'], record['method']))}")
        accepted = [f"all accept: {', '.join(record['gates'])}"]
        lines += [f"  gate     {text}" for text in record["refused"] or accepted]
    if record["kernel"] is not None:
        lines.append(f"  kernel   {record['kernel']}")
    lines += [f"  because  {reason}" for reason in record["reasons"]]
    lines += [f"    {line}" for line in record["counterexample"]]
    if verdict in VERDICTS and verdict not in GOOD:
        lines += [f"  exact    would be {call}" for call in record["exact"]] or [
            "  exact    no routing method of this release expresses the router"
        ]
    return lines + [f"  note     {note}" for note in record["notes"]]


def unjudged(target: Target, model: ModelSpec, scheme: str, why: Exception) -> dict[str, Any]:
    """What `Judgement.as_dict` would be, had the target answered."""
    try:
        name = str(target)
    except Unsupported:
        name = target.name
    return {
        "model": model.id,
        "scheme": scheme,
        "target": name,
        "flashinfer": str(target.flashinfer),
        "verdict": "skipped" if isinstance(why, Unsupported) else "error",
        "method": "",
        "router": str(recipe_of(model.router)),
        **dict.fromkeys(("path", "gates", "refused", "counterexample", "exact", "notes"), ()),
        "kernel": None,
        "reasons": [str(why)],
    }


def _assumed(target: Target, model: ModelSpec, scheme: str, method: str) -> Captured:
    """The call of a target whose own is not recorded, with its number for the method."""
    flashinfer = target.flashinfer
    number = target.method_numbers().get(method)
    read_as = None if number is None else flashinfer.method(number)
    drift = f"{target} passes {method} as {number}, which {flashinfer} reads as "
    if read_as is None:
        return Captured(None, (drift + "no routing method",))
    call = target.kernel_call(model, scheme, read_as)
    return Captured(call, () if read_as == method else (drift + read_as,))


def show_call(call: KernelCall) -> str:
    """A call as the method and the arguments that matter."""
    arguments = []
    if call.n_group:
        arguments += [f"n_group={call.n_group}", f"topk_group={call.topk_group}"]
    if call.bias == "zeros":
        arguments.append("bias=zeros")
    if call.routed_scaling_factor != 1.0:
        arguments.append(f"routed_scaling_factor={call.routed_scaling_factor:g}")
    if call.weight_on == "input":
        arguments.append("use_routing_scales_on_input=True")
    return f"{call.method}({', '.join(arguments)})"


def judge(
    target: Target, model: ModelSpec, scheme: str, *, recorded_only: bool = False
) -> Judgement:
    """Judge what a target makes of a model on a scheme.

    Args:
        recorded_only: Do not take a call that is not recorded to be what the model says.

    Raises:
        Unsupported: The target cannot answer a question that the verdict needs.
    """
    classification = target.classify(model)
    gates = target.gates(model, scheme, classification.method)
    base = _asked(target, model, scheme, classification, gates)
    if not all(gate.ok for gate in gates):
        exact = tuple(exact_calls(model, scheme, target.flashinfer))
        return replace(base, verdict="missed" if exact else "fallback", exact=exact)
    return _judge_call(target, base, recorded_only=recorded_only)


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
    classification = Classification(method, ("had no gate stopped it",))
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
        target=str(target),
        model=model,
        scheme=scheme,
        flashinfer=target.flashinfer,
        verdict="exact",
        classification=classification,
        gates=gates,
        wanted=recipe_of(model.router),
    )


def _judge_call(target: Target, base: Judgement, *, recorded_only: bool) -> Judgement:
    """Judge the call that follows a classification."""
    model, scheme, flashinfer = base.model, base.scheme, base.flashinfer
    method = base.classification.method
    beyond = Unsupported(
        f"{target} lets {model} through, which cannot be judged: {model.router.not_expressible}"
    )
    captured = target.capture(model, scheme, method)
    if captured is None:
        if recorded_only:
            raise Unsupported(f"{target}: its calls are not recorded")
        if model.router.not_expressible is not None:
            raise beyond
        captured = _assumed(target, model, scheme, method)
    reasons, call = captured.problems, captured.call
    if call is None:
        exact = tuple(exact_calls(model, scheme, flashinfer))
        return replace(base, verdict="crash", reasons=reasons, exact=exact)
    base = replace(base, call=call, problems=captured.problems)
    troubles = flashinfer.troubles(call)
    if troubles:
        verdict = "crash" if troubles[0][0] == "error" else "wrong"
        reasons += tuple(text for _, text in troubles)
        exact = tuple(exact_calls(model, scheme, flashinfer))
        return replace(base, verdict=verdict, reasons=reasons, exact=exact)
    got = flashinfer.recipe(call)
    notes = (*(ROUNDED[what] for what in captured.rounded), *flashinfer.notes(call))
    base = replace(base, got=got, rounded=captured.rounded, notes=notes)
    is_same = same(base.wanted, got, model.router.num_experts)
    if is_same and model.router.not_expressible is not None:
        # What the recipe does not say may be done outside the kernel; the rest was judged.
        raise beyond
    if is_same and not captured.problems:
        return base
    differing = {} if is_same else base.differing
    reasons += tuple(
        f"{name}: the router has {wanted}, the kernel {got}"
        for name, (wanted, got) in differing.items()
    )
    return replace(
        base,
        verdict="wrong",
        reasons=reasons + (() if is_same else tuple(flashinfer.facts(call, differing))),
        exact=tuple(exact_calls(model, scheme, flashinfer)),
    )
