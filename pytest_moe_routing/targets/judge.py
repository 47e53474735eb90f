"""The five verdicts: what becomes of a model on a backend, when a target decides."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pytest_moe_routing.backends import FlashInfer, Gate, KernelCall, exact_calls
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.routing import Classification, Recipe, recipe_of
from pytest_moe_routing.targets.protocol import Target

if TYPE_CHECKING:
    from pytest_moe_routing.routing.equivalence import Counterexample

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
        reasons: Why a kernel that was let run is wrong or crashes, in words.
        exact: The calls that would have meant what the model means.
        notes: Matters of precision, for a kernel that runs.
        counterexample: A token, when the recipe itself is wrong.
    """

    target: str
    model: ModelSpec
    backend: str
    flashinfer: FlashInfer
    verdict: str
    classification: Classification
    gates: tuple[Gate, ...]
    wanted: Recipe
    call: KernelCall | None = None
    got: Recipe | None = None
    reasons: tuple[str, ...] = ()
    exact: tuple[KernelCall, ...] = ()
    notes: tuple[str, ...] = ()
    counterexample: Counterexample | None = field(default=None)

    @property
    def good(self) -> bool:
        return self.verdict in GOOD

    def lines(self) -> list[str]:
        """The whole story, from the router to the token."""
        refused = [str(gate) for gate in self.gates if not gate.ok]
        asked = ", ".join(gate.name for gate in self.gates)
        lines = [
            f"{self.model} on {self.backend}, decided by {self.target}: {self.verdict}",
            f"  {VERDICTS[self.verdict]} ({self.flashinfer})",
            f"  router   {self.model.router.not_expressible or self.wanted}",
            f"  decided  {self.classification}",
            *[f"  gate     {text}" for text in refused or [f"all accept: {asked}"]],
        ]
        if self.got is not None:
            lines.append(f"  kernel   {self.got}")
        lines += [f"  because  {reason}" for reason in self.reasons]
        if self.counterexample is not None:
            lines += [f"    {line}" for line in self.counterexample.lines()]
        if not self.good:
            lines += [f"  exact    would be {show_call(call)}" for call in self.exact] or [
                "  exact    no routing method of this release expresses the router"
            ]
        lines += [f"  note     {note}" for note in self.notes]
        return lines


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


def judge(target: Target, model: ModelSpec, backend: str) -> Judgement:
    """Judge what a target makes of a model on a backend.

    Raises:
        Unsupported: The target cannot answer a question that the verdict needs.
    """
    from pytest_moe_routing.routing.equivalence import counterexample

    flashinfer = target.flashinfer
    classification = target.classify(model)
    gates = target.gates(model, backend, classification.method)
    base = Judgement(
        target=str(target),
        model=model,
        backend=backend,
        flashinfer=flashinfer,
        verdict="exact",
        classification=classification,
        gates=gates,
        wanted=recipe_of(model.router),
    )
    refused = [gate for gate in gates if not gate.ok]
    if refused:
        exact = tuple(exact_calls(model, backend, flashinfer))
        return replace(base, verdict="missed" if exact else "fallback", exact=exact)

    if model.router.not_expressible is not None:
        raise Unsupported(
            f"{target} lets {model} through, which cannot be judged: {model.router.not_expressible}"
        )
    number = target.method_numbers().get(classification.method)
    method = None if number is None else flashinfer.method(number)
    drift = f"{target} passes {classification.method} as {number}, which {flashinfer} reads as "
    if method is None:
        exact = tuple(exact_calls(model, backend, flashinfer))
        return replace(base, verdict="crash", reasons=(drift + "no routing method",), exact=exact)
    reasons: tuple[str, ...] = ()
    if method != classification.method:
        reasons = (drift + method,)
    call = target.kernel_call(model, backend, method)
    base = replace(base, call=call)
    troubles = flashinfer.troubles(call)
    if troubles:
        verdict = "crash" if troubles[0][0] == "error" else "wrong"
        reasons += tuple(text for _, text in troubles)
        exact = tuple(exact_calls(model, backend, flashinfer))
        return replace(base, verdict=verdict, reasons=reasons, exact=exact)
    got = flashinfer.recipe(call)
    base = replace(base, got=got, notes=tuple(flashinfer.notes(call)))
    example = counterexample(base.wanted, got, model.router.num_experts)
    if example is None:
        return base
    ignored = {"epsilon", "bias_dtype", "weight_dtype"}
    reasons += tuple(
        f"{name}: the router has {wanted}, the kernel {got}"
        for name, (wanted, got) in base.wanted.differences(got).items()
        if name not in ignored
    )
    return replace(
        base,
        verdict="wrong",
        reasons=reasons + tuple(flashinfer.facts(call)),
        exact=tuple(exact_calls(model, backend, flashinfer)),
        counterexample=example,
    )
