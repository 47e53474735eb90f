"""The causes of a failed test, as values that travel in its user properties."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from pytest_moe_routing.escape import printable

#: The user property in which a test states the causes of its failure.
PROPERTY = "moe_failures"
#: Where a line that does not fit ends.
CUT = "..."
#: What a line with a reason starts with.
_BECAUSE = "  because  "
#: What the lines start with that say who can meet a failure, and which models do.
_REACH, _MODELS = "  reach    ", "  models   "
#: Lines of one block, and characters of a line.
_BLOCK = 15
_WIDTH = 100
#: Characters of several reasons on one line.
_REASONS = 160


class Rank(IntEnum):
    """The urgency of a failure among failures with the same reach: silent failures first."""

    SILENT = 0
    LOUD = 1
    LOST = 2
    MISSED = 3
    DOWNCAST = 4
    LATENT = 5


#: The cause that no ledger may name: a target that ended leaves further questions unasked.
NO_ANSWERS = "target:no-answers"


@dataclass(frozen=True)
class Failure:
    """One cause of a failed test.

    Attributes:
        cause: A stable id, without models and their numbers: what a ledger names.
        case: The model and scheme, or whatever else of the test the cause concerns.
        lines: The explanation.
        source: File and line of the target's code that is to blame, if they are known.
        site: The end of the cause's id that names the code, if the id has one: failures that
            differ in nothing else are one defect in several places.
        reach: Who can meet it, if `lines` need not say so.
        rarity: How few can meet it: 0 for a published checkpoint by default, or if nobody asked.
        brief: The explanation for a terminal, if it is shorter than `lines`.
        entry: FILE:LINE of the ledger's entry that knows the cause in other cases, if any does.
        differs: Each model and field that is not as it should be, with both values, or each reason
            of a latent cause, if that is all that the failure says: another test that finds the
            same has the same cause.
        is_opt_in: Whether nobody meets it without an opt-in switch.
        if_met: The id that the cause has in a run with a model whose published checkpoint meets
            it, if no model of this run does.
    """

    cause: str
    rank: Rank
    case: str
    lines: tuple[str, ...]
    source: str = ""
    site: str = ""
    reach: str = ""
    rarity: int = 0
    brief: tuple[str, ...] = ()
    entry: str = ""
    differs: tuple[str, ...] = ()
    is_opt_in: bool = False
    if_met: str = ""

    @property
    def urgency(self) -> tuple[int, Rank, bool]:
        """The place of the failure in a report: of those met by default, silent ones first.

        Those that only a switch leads to come next, then downcasts, then what nobody meets.
        """
        is_slight = self.rank >= Rank.DOWNCAST
        return 2 if is_slight else int(self.is_opt_in), self.rank, self.is_opt_in

    def as_dict(self) -> dict[str, Any]:
        # Without tuples, which xdist does not carry.
        plain = {name: list(getattr(self, name)) for name in ("lines", "brief", "differs")}
        return asdict(self) | {"rank": int(self.rank)} | plain

    @property
    def defect(self) -> tuple[Rank, str]:
        """What failures of one defect in several places share."""
        return self.rank, self.cause.removesuffix(self.site.replace(" ", "-")).rstrip(":")

    def elsewhere(self, cases: Iterable[str], reach: str) -> str:
        """Return the line about this failure that follows one with the same defect elsewhere.

        Args:
            reach: Who can meet that one.
        """
        told = f" ({self.reach})" if self.reach not in ("", reach) else ""
        return _listed(f"{self.cause}: ", list(dict.fromkeys(cases)) or [self.case]) + told

    def block(
        self,
        cases: Iterable[str] = (),
        width: int | None = None,
        elsewhere: Sequence[str] = (),
    ) -> list[str]:
        """Return the explanation in at most 15 lines, with the other cases and the cause's id.

        A latent cause is one line, unless its explanation is whole and has lines with labels.

        Args:
            width: Characters of that line, and `brief` explanations; if None, as many characters
                as it takes and whole explanations.
            elsewhere: What is told of the same defect in other places, for one line.
        """
        has_labels = any(line.startswith(" ") for line in self.lines[1:])
        if self.rank is Rank.LATENT and (width is not None or not has_labels):
            where = ", ".join(dict.fromkeys((self.case, *cases)))
            told = (where, *(" ".join(line.split()) for line in self.lines[1:]))
            line = f"{self.lines[0]} ({'; '.join(told)})  [{self.cause}]"
            fits = width is None or len(line) <= width
            return [line if fits else f"{line[: width - len(CUT)]}{CUT}"]  # type: ignore[operator]
        others = [case for case in dict.fromkeys(cases) if case != self.case]
        tail = [f"  cause    {self.cause}"]
        if self.entry:
            tail.append(f"  known    in other cases: {self.entry} does not list these")
        lines = list(self.lines if width is None else _packed(_joined(self.brief or self.lines)))
        also = list(elsewhere)
        if others and self.rank is not Rank.LOST:
            also.insert(0, _listed(f"{len(others)} more: ", others))
        if also:
            tail.insert(0, f"  also     {'; '.join(also)}")
        if others and self.rank is Rank.LOST:
            # Who lost a kernel is what there is to know: all are named, if they fit.
            room = max(1, _BLOCK - len(lines) - len(tail))
            tail = [*_by_schemes([self.case, *others], room), *tail]
        room = _BLOCK - len(tail)
        return (lines if len(lines) <= room else [*lines[: room - 1], "  ..."]) + tail


def cause_id(*parts: str) -> str:
    """Return a cause's id: one word, which an edit elsewhere in a file does not change."""
    words = ":".join(part.replace(" ", "-") for part in parts if part)
    return re.sub(r"(\.py):\d+", r"\1", words)


def few(names: Sequence[str]) -> str:
    """Return the first of many names, and how many others there are."""
    more = len(names) - 3
    return ", ".join(names[:3]) + (f" and {more} other{'s' * (more > 1)}" if more > 0 else "")


def _joined(lines: Sequence[str]) -> list[str]:
    """Return lines, the one that names models at the end of the one that says who can meet it."""
    reach, models = (
        next((line for line in lines if line.startswith(start)), "") for start in (_REACH, _MODELS)
    )
    if not (reach and models):
        return list(lines)
    whole = f"{reach}: {models.removeprefix(_MODELS)}"
    return [whole if line == reach else line for line in lines if line != models]


def _packed(lines: Iterable[str]) -> Iterator[str]:
    """Yield lines, reasons that follow each other on one as far as they fit."""
    last = ""
    for line in lines:
        reason = line.removeprefix(_BECAUSE)
        joined = f"{last}; {reason}"
        if last.startswith(_BECAUSE) and reason != line and len(joined) <= _REASONS:
            last = joined
            continue
        if last:
            yield last
        last = line
    if last:
        yield last


def _listed(start: str, names: Sequence[str]) -> str:
    """Names on one line, as many as fit."""
    text = start
    for place, name in enumerate(names):
        left = len(names) - place
        more = f" and {left} other{'s' * (left > 1)}"
        if len(text) + len(name) + len(more) > _WIDTH and place:
            return text + more.lstrip(",")
        text += ("" if place == 0 else ", ") + name
    return text


def _by_schemes(cases: Sequence[str], lines: int) -> list[str]:
    """Cases named `MODEL SCHEME` on so many lines, models that have the same schemes together."""
    schemes: dict[str, list[str]] = {}
    for case in cases:
        model, _, scheme = case.partition(" ")
        schemes.setdefault(model, []).append(scheme)
    models: dict[str, list[str]] = {}
    for model, own in schemes.items():
        models.setdefault(", ".join(own), []).append(model)
    groups = "; ".join(f"{own}: {', '.join(those)}" for own, those in models.items())
    return textwrap.wrap(
        f"{len(cases)} cases: {groups}",
        _WIDTH,
        initial_indent="  in       ",
        subsequent_indent=" " * 11,
        break_on_hyphens=False,
        max_lines=lines,
        placeholder=" ...",
    )


def text_of(failures: Iterable[Failure], cases: Mapping[str, Iterable[str]] | None = None) -> str:
    """Return the message of a test that fails for these causes; see `Failure.block`."""
    return joined(failure.block((cases or {}).get(failure.cause, ())) for failure in failures)


def joined(blocks: Iterable[Sequence[str]]) -> str:
    """Return blocks as one safe text."""
    # Latent causes are a list; the others are paragraphs.
    text = "".join(
        ("" if place == 0 else "\n" if len(block) == 1 else "\n\n") + "\n".join(block)
        for place, block in enumerate(blocks)
    )
    return printable(text)


def failures_of(properties: Iterable[tuple[str, Any]]) -> list[Failure]:
    """Return the causes that a test stated in its user properties."""
    stated = dict(properties).get(PROPERTY, [])
    return [
        Failure(
            **{
                **each,
                "rank": Rank(each["rank"]),
                "lines": tuple(each["lines"]),
                "brief": tuple(each["brief"]),
                "differs": tuple(each["differs"]),
            }
        )
        for each in stated
    ]
