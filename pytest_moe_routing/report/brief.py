"""The explanations of failures as a terminal shows them without `-v`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.oracle.finding import Kind
from pytest_moe_routing.oracle.record import Reach, VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import text

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.model_code import CodeJudgement

#: What starts lines that are left out of a kernel that only a switch leads to.
_OF_SWITCHES = ("  decided  ", "  router   ", "  kernel   ", "  exact    ", "    ")
_NO_METHOD = "no routing method of this release computes the router"
#: What starts lines of an example that explain nothing.
_DETAILS = ("recipe  ", "precision ", "... and ", "because ")
#: What ends the line of an example that says nothing but its pattern of logits, a usual one.
_USUAL = (" 'plain'", " 'any'")


def story(record: VerdictRecord) -> Iterator[str]:
    """Return `text.short_story` without what the router's line or a cause of its own says.

    A token whose logits say nothing is one line. That no call would be exact is left out, and of a
    kernel that only a switch leads to, all but the reasons. Where a call fails for another reason
    than its arguments, the router does not matter.
    """
    at = text.call_of(record)
    left_out = {f"  note     {text.sentence(n)}" for n in record.notes if n.kind is Kind.DOWNCAST}
    if record.verdict is Verdict.CRASH and all(f.wanted in (None, "") for f in record.findings):
        left_out.add(f"  router   {record.router}")
    if record.kernel == record.router:
        left_out.add(f"  kernel   {record.kernel}")
    is_opt_in = record.reach is Reach.OPT_IN
    labels = _OF_SWITCHES if is_opt_in else ("  exact    none: ",)

    def is_shown(line: str) -> bool:
        # Without the router's line, this one says that the kernel computes another.
        is_reason = is_opt_in and line.endswith(_NO_METHOD)
        return line not in left_out and (is_reason or not line.startswith(labels))

    def told(line: str) -> str:
        # One line for the call, and for the method or the switch that leads to it.
        is_path = at is not None and line.startswith("  reach  " if is_opt_in else "  decided  ")
        return f"{line}, called at {at}" if is_path else line

    if at is not None:
        left_out.add(f"  at       {at}")
    shown = map(told, filter(is_shown, text.short_story(record)))
    yield from _with_brief_token(shown, record.counterexample)


def _with_brief_token(lines: Iterable[str], example: Mapping[str, Any] | None) -> Iterator[str]:
    """Return lines with those of a token in one, if its logits and its bias say nothing."""
    if example is None or any(example["logits"]) or any(example["bias"] or ()):
        yield from lines
        return
    head, *values = (f"    {line}" for line in text.token(example))
    wanted, got = (" ".join(line.split(maxsplit=1)) for line in values[-2:])
    for line in lines:
        if line == head:
            yield f"{head}: {wanted}, {got}"
        elif line not in values:
            yield line


def router(lines: Iterable[str]) -> Iterator[str]:
    """Return a router's cause without repetitions and without details that explain nothing.

    That is the recipe, precision, the count of further tokens, and scores: experts are named.
    """
    told: set[str] = set()
    for line in lines:
        what = line.strip().removeprefix("because  ")
        is_detail = what.startswith(_DETAILS) or what.endswith(_USUAL)
        if what not in told and not is_detail and not what.endswith("(expert: selection score)"):
            yield line
        told.add(what)


def model_code(judgement: CodeJudgement) -> Iterator[str]:
    """Return `text.model_code` with a token whose logits say nothing in one line.

    Routers and token are left out where only a switch leads to the code.
    """
    example = judgement.counterexample
    if example is not None and judgement.request.switch:
        yield from text.model_code(replace(judgement, counterexample=None))
        return
    shown = None if example is None else example.as_dict()
    yield from _with_brief_token(text.model_code(judgement), shown)
