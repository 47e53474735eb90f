"""What a framework's own router computes, compared with the model's router on every logits pattern.

A router is any function from logits and a bias to weights and experts. Its answers are compared as
those of `torch.topk`: which of equal experts is chosen is left open.
"""

from __future__ import annotations

import ast
import linecache
import traceback
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.errors import RecipeError, Unsupported, place_of
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.syntax import parse

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pytest_moe_routing.compare.routing import RoutingComparison

    #: (logits, bias) -> (weights, ids)
    Router = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

#: Who can reach a deviation, the most first.
REACHES = ("model", "bfloat16 logits", "on a CPU", "opt-in", "no known model")
#: Kinds of deviations that are wrong, worst first.
WRONG = (
    *("crash", "structure", "logits", "experts", "weights", "not loaded", "captured", "output"),
)
#: A correction bias that the weights of a checkpoint do not reach.
NOT_LOADED = "not loaded"
#: A router that does not run here, with the reason.
NOT_JUDGED = "not judged"
#: Experts that differ because scores are computed in bfloat16.
PRECISION = "precision"
#: Deviations that are no defect of a router, with the reason.
HARMLESS = {
    "rounded": "weights are rounded to bfloat16, as transformers rounds them",
    "epsilon": "all chosen scores underflow to 0, and 0/0 is not kept away by an epsilon: the "
    "logits of all chosen experts lie below -87, which no published router is known to give",
}
#: The pattern of NaN and infinite logits.
NOT_FINITE = "not-finite"
_TOKENS = 24
#: Characters of an assertion that are told.
_WIDTH = 200
#: Packages that call a framework's code, or are called by it.
_OTHERS = ("pytest_moe_routing/", "torch/", "None/")


class WrongAnswer(Exception):
    """A wrong part of an answer besides experts and weights, such as a shared expert's slot."""

    kind = "structure"


class WronglyCaptured(WrongAnswer):
    """Expert ids that do not reach the consumer that captures them."""

    kind = "captured"


class ImpossibleArguments(WrongAnswer):
    """Arguments of a compiled operator with which it computes nothing."""

    kind = "crash"

    def __init__(self, error: RecipeError) -> None:
        super().__init__(f"an operator is given arguments that are wrong: {error}")


@dataclass(frozen=True)
class Deviation:
    """One way in which a router's answer is not the model's, on the first pattern that shows it.

    Attributes:
        kind: One of `WRONG`, `PRECISION`, `NOT_JUDGED`, or a key of `HARMLESS`.
        pattern: Name of the logits pattern; "" when it does not matter.
        text: What was found, in lines.
        cause: A known mistake that explains it, or the error; "" if there is none.
        source: File and line of the framework's code that raised the error, if it did.
    """

    kind: str
    pattern: str
    text: str
    cause: str = ""
    source: str = ""


@dataclass(frozen=True)
class RouterRun:
    """A router of a framework, run for one model or configuration.

    Attributes:
        router: Class or function that the framework chose, by its name in the target's list.
        function: The framework's innermost function that computed the routing.
        way: Platform and switches under which the framework chooses it.
        subject: The model's id, or the configuration in words.
        reach: Who can reach it, one of `REACHES`: a shipped model by default, one whose layer is
            handed bfloat16 logits, one that is served without a GPU, only with a switch, no known
            model.
        called: Qualified names of the framework's functions that ran.
        deviations: At most one of each kind.
        source: File and line of the framework at which `function` begins, if they are known.
    """

    router: str
    function: str
    way: str
    subject: str
    reach: str
    called: tuple[str, ...] = ()
    deviations: tuple[Deviation, ...] = ()
    source: str = ""

    @classmethod
    def of(cls, answer: dict[str, Any]) -> RouterRun:
        """Read a run as a probe's child sends it."""
        deviations = tuple(Deviation(**row) for row in answer["deviations"])
        return cls(**{**answer, "called": tuple(answer["called"]), "deviations": deviations})


@dataclass(frozen=True)
class Output:
    """What the consumer of a router's answer takes.

    Attributes:
        weights: Names of the weights' dtypes.
        ids: Names of the ids' dtypes.
        contiguous: Whether it ignores strides.
    """

    weights: tuple[str, ...] = ("float32",)
    ids: tuple[str, ...] = ("int32", "int64")
    contiguous: bool = False


def compare_router(
    router: Router,
    recipe: Recipe,
    num_experts: int,
    logits_dtype: torch.dtype,
    output: Output | None = None,
    patterns: Iterable[str] | None = None,
) -> list[Deviation]:
    """Run a router on every logits pattern and list how its answers deviate from the recipe.

    Args:
        router: Takes logits `[24, num_experts]` and a bias or None, returns weights and ids, both
            `[24, top_k]`. What it raises is a deviation too, except `Unsupported`.
        recipe: What it should compute, the factor that it applies included.
        logits_dtype: The dtype of the logits that the framework's layer hands to it.
        output: What the consumer takes.
        patterns: Names of logits patterns, all by default.
    """
    import torch

    from pytest_moe_routing.logits import PATTERNS, make_case

    found: dict[str, Deviation] = {}
    for pattern in patterns or PATTERNS:
        case = make_case(pattern, recipe, num_tokens=_TOKENS, num_experts=num_experts)
        logits = case.logits.to(logits_dtype)
        bias = None if case.bias is None else case.bias.to(getattr(torch, recipe.bias_dtype))
        try:
            weights, ids = router(logits.clone(), bias)
        except Unsupported:
            raise
        except WrongAnswer as error:
            found.setdefault(error.kind, Deviation(error.kind, pattern, str(error), str(error)))
            break
        except Exception as error:
            text, source = _raised(error)
            found.setdefault("crash", Deviation("crash", pattern, text, text, source))
            break
        for deviation in _deviations(weights, ids, logits, bias, recipe, pattern, output, found):
            if deviation.kind in ("experts", "weights") and logits_dtype != torch.float32:
                weights, ids = router(logits.float(), bias)
                kind, _, why = _kind(weights, ids, logits, bias, recipe)
                if kind in ("", "epsilon"):
                    why = f"right with the same logits in float32 instead of {logits.dtype}"
                if kind in ("", "epsilon", PRECISION):
                    deviation = replace(deviation, kind=PRECISION, cause=why)
            found.setdefault(deviation.kind, deviation)
        if {"structure", "experts", "weights"} & found.keys():
            break
    return list(found.values())


def answer_problem(
    weights: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, recipe: Recipe
) -> str | None:
    """Return what is wrong with a router's answer; None if at most its weights are rounded.

    The arguments are those of `compare_routing`. The logits have to be exact in bfloat16, so that
    no precision but the router's own is told of.
    """
    from pytest_moe_routing.compare.routing import are_rounded_once

    try:
        kind, comparison, cause = _kind(weights, ids, logits, bias, recipe)
        if kind in ("", "epsilon") or are_rounded_once(ids, weights, logits, recipe, bias):
            return None
    except RecipeError as error:
        return str(error)
    if kind in HARMLESS:
        cause = ""
    text = _short(comparison())
    return f"{cause}\n{text}" if cause else text


def _raised(error: Exception) -> tuple[str, str]:
    """Return an exception in words, and the line of the framework's code that it came from.

    An assertion without a message is told by what it asserts.
    """
    text = f"{type(error).__name__}: {error}".strip(": ")
    if isinstance(error, AssertionError) and not str(error):
        text = shorten(f"{text}: {_asserted(error)}".strip(": "), _WIDTH)
    places = (place_of(frame, line) for frame, line in traceback.walk_tb(error.__traceback__))
    own = [place for place in places if not place.startswith(_OTHERS)]
    return text, own[-1] if own else ""


def _asserted(error: AssertionError) -> str:
    """Return the statement that raised; "" if its source is not there."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    try:
        tree = parse("".join(linecache.getlines(last.filename)))
    except (SyntaxError, ValueError, RecursionError):
        return ""
    asserts = (node for node in ast.walk(tree) if isinstance(node, ast.Assert))
    line = last.lineno or 0
    return next((ast.unparse(a) for a in asserts if a.lineno <= line <= (a.end_lineno or 0)), "")


def _deviations(
    weights: Tensor,
    ids: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    recipe: Recipe,
    pattern: str,
    output: Output | None,
    known: Container[str],
) -> Iterator[Deviation]:
    """Yield deviations of kinds that are not known yet."""
    if output is not None and (problem := output_problem(weights, ids, output)):
        yield Deviation("output", pattern, problem, problem)
    try:
        kind, comparison, cause = _kind(weights, ids, logits, bias, recipe)
    except RecipeError as error:
        yield Deviation("structure", pattern, str(error), str(error))
        return
    # No router gives logits that are not finite; even so, experts must exist, each once.
    if kind and kind not in known and (pattern != NOT_FINITE or kind == "structure"):
        yield Deviation(kind, pattern, _short(comparison()), cause)


def output_problem(weights: Tensor, ids: Tensor, output: Output) -> str:
    """Return what of an answer its consumer does not take; "" if it takes all."""
    problems = [*_unfit(weights, output.weights, output.contiguous, "weights")]
    problems += _unfit(ids, output.ids, output.contiguous, "ids")
    return "; ".join(problems)


def _short(comparison: RoutingComparison) -> str:
    """Describe what is wrong, with one token."""
    lines = comparison.message().splitlines()[:3]
    more = len(comparison.differences) - 1
    lines += comparison.differences[0].lines()
    return "\n".join([*lines, *([f"  ... and {more} more tokens"] if more else [])])


def _unfit(x: Tensor, dtypes: tuple[str, ...], contiguous: bool, name: str) -> Iterator[str]:
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in dtypes:
        yield f"{name} are {dtype}, and the consumer accepts only {' or '.join(dtypes)}"
    if contiguous and not x.is_contiguous():
        yield f"{name} are not contiguous, and the consumer ignores strides"


def _kind(
    weights: Tensor, ids: Tensor, logits: Tensor, bias: Tensor | None, recipe: Recipe
) -> tuple[str, Callable[[], RoutingComparison], str]:
    """Return the mildest kind of deviation that explains an answer, "" for none.

    The kind is followed by a function that compares the answer in full, and by the cause.
    """
    from pytest_moe_routing.compare.routing import agrees, compare_routing

    answer = ids, weights, logits

    def is_right(recipe: Recipe, precision: str) -> bool:
        return agrees(*answer, recipe, bias, precision=precision, lower_index=False)

    first = partial(compare_routing, *answer, recipe, bias, lower_index=False, explain=False)
    if is_right(recipe, "float32"):
        return "", first, ""
    bare = replace(recipe, epsilon=0.0)
    for kind, meaning, precision in (
        *((("epsilon", bare, "float32"),) if recipe.epsilon else ()),
        ("rounded", recipe, "bfloat16-weights"),
        ("epsilon", bare, "bfloat16-weights"),
    ):
        if is_right(meaning, precision):
            return kind, first, HARMLESS[kind]
    for precision in ("float32", "bfloat16-weights") if recipe.bias else ():
        if is_right(replace(bare, bias_dtype="bfloat16"), precision):
            return PRECISION, first, "the router's correction bias is rounded to bfloat16"
    # Beyond doubt: what remains is told without the missing epsilon.
    worst = compare_routing(*answer, bare, bias, lower_index=False)
    cause = "; ".join(worst.diagnosis)
    if worst.diagnosis and set(worst.diagnosis) <= _downcasts():
        return PRECISION, lambda: worst, cause
    problems = [item.problem for item in worst.differences]
    if any(p.startswith("expert ") and ("is not one of" in p or "chosen" in p) for p in problems):
        return "structure", lambda: worst, cause
    kind = "experts" if any(p.startswith("experts ") for p in problems) else "weights"
    return kind, lambda: worst, cause


def _downcasts() -> set[str]:
    """Names of the mistakes that are nothing but a lesser precision."""
    from pytest_moe_routing.compare.mistakes import MISTAKES

    return {mistake.name for mistake in MISTAKES if "bfloat16" in mistake.name}


@dataclass(frozen=True)
class Cause:
    """Deviations of one function in one field, with everything that they were seen in."""

    function: str
    kind: str
    first: Deviation
    runs: tuple[RouterRun, ...]

    @property
    def reach(self) -> str:
        """Who can reach it, of all that it was seen in the most."""
        # An unknown word raises `ValueError`; `next` would end the loop over causes without one.
        return min((run.reach for run in self.runs), key=REACHES.index)

    @property
    def source(self) -> str:
        """File and line of the framework's code that raised, or else of the function."""
        return self.first.source or self.runs[0].source

    def lines(self, most: int | None = None) -> list[str]:
        """Return the cause, who can reach it, and at most so many lines of the first example."""
        ways = "; ".join(dict.fromkeys(run.way for run in self.runs))
        # Made-up routers are no models, which it is said to reach.
        shown = [run for run in self.runs if run.reach != REACHES[-1]] or self.runs
        subjects = ", ".join(dict.fromkeys(run.subject for run in shown))
        head = {
            "crash": "fails",
            "structure": "returns experts that do not exist or repeat, or a wrong "
            "shared-expert slot",
            "logits": "computes other logits than those of the router's weight",
            NOT_LOADED: "selects experts by a bias that is not loaded from the checkpoint",
            "captured": "does not pass the selected experts on to --enable-return-routed-experts",
            "output": "returns a dtype or layout that its consumer does not accept",
        }
        what = head.get(self.kind, f"{self.kind} differ from the model's router")
        if self.kind == PRECISION:
            what = "selects experts or computes weights in bfloat16 where the model uses float32"
        first, *more = self.first.text.splitlines()[:most] or [""]
        example = f"{self.runs[0].subject}, logits pattern {self.first.pattern!r}"
        return [
            f"{self.function} ({ways}): {what}",
            *([f"  because  {self.first.cause}"] if self.first.cause else []),
            *([f"  at       {self.source}"] if self.source else []),
            f"  reach    {self.reach}: {subjects}",
            f"  example  {example}{f': {first}' if first != self.first.cause else ''}",
            *(f"  {line}" for line in more),
        ]


def causes(runs: Iterable[RouterRun], kinds: Iterable[str]) -> list[Cause]:
    """Gather the deviations of these kinds by function and field, one cause for each."""
    kinds = tuple(kinds)
    seen: dict[tuple[str, str, str], list[tuple[RouterRun, Deviation]]] = {}
    for run in runs:
        for deviation in run.deviations:
            if deviation.kind in kinds:
                key = (run.function, deviation.kind, deviation.cause)
                seen.setdefault(key, []).append((run, deviation))
    return [
        Cause(function, kind, rows[0][1], tuple(run for run, _ in rows))
        for (function, kind, _), rows in seen.items()
    ]
