"""The failures of a run by cause, worst first: what every report begins with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pytest_moe_routing.escape import shorten
from pytest_moe_routing.oracle.record import (
    Reach,
    Record,
    Result,
    TestRecord,
    UnansweredRecord,
    VerdictRecord,
)
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import text

#: Characters of what a title says of a test.
_TITLE = 100
_ORDER = (Verdict.WRONG, Verdict.CRASH, Verdict.ERROR, Verdict.MISSED)


@dataclass(frozen=True)
class Failed:
    """One cause of failures, with every record that it concerns.

    Attributes:
        cause: Its stable id; the name of the test for a failure that names no cause.
    """

    cause: str
    records: tuple[Result, ...]

    @property
    def first(self) -> Result:
        return self.records[0]

    @property
    def title(self) -> str:
        if isinstance(self.first, VerdictRecord):
            return text.title(self.first)
        if self.first.causes and self.lines:
            # The name of a test of many causes says little.
            return f"{self.first.case}: {shorten(self.lines[0], _TITLE)}"
        return self.first.case

    @property
    def lines(self) -> list[str]:
        """The explanation, of the first case."""
        if isinstance(self.first, VerdictRecord):
            return text.story(self.first)
        return self.first.message.splitlines()

    @property
    def others(self) -> list[str]:
        """The other cases, by name."""
        return [name_of(record) for record in self.records[1:]]

    @property
    def tail(self) -> list[str]:
        """The lines about all cases: what else is affected, and the cause that a ledger names.

        The message of a test has the cause already.
        """
        is_verdict = isinstance(self.first, VerdictRecord) and self.first.cause
        return [
            *([f"  also     {', '.join(self.others)}"] if self.others else []),
            *([f"  cause    {self.cause}"] if is_verdict else []),
        ]

    @property
    def source(self) -> str:
        """File and line of the target's code that is to blame; empty if they are not known."""
        return next((record.source for record in self.records if record.source), "")


def name_of(record: Result) -> str:
    """Return what a record is about, in a word or two."""
    if isinstance(record, VerdictRecord):
        return f"{record.model} {record.scheme}"
    return record.case


def failed(records: Iterable[Record], outcome: str = "failed") -> list[Failed]:
    """Return the failures of a run by cause: verdicts first, then other tests.

    Of verdicts, those that are met by default come first, then silent ones, then those with most
    cases. Of the cases of a cause, the one that most people can meet comes first.
    """
    groups: dict[tuple[str, ...], list[Result]] = {}
    for record in sorted(records, key=lambda record: record.key):
        if record.outcome == outcome and not isinstance(record, UnansweredRecord):
            groups.setdefault(_cause(record), []).append(record)
    found = [
        Failed(cause[-1], tuple(sorted(those, key=_rarity))) for cause, those in groups.items()
    ]
    return sorted(found, key=lambda group: (_rank(group.first), -len(group.records)))


def _cause(record: Result) -> tuple[str, ...]:
    if isinstance(record, TestRecord):
        return ("test", *(record.causes or (record.case,)))
    return (text.decider(record), record.cause or f"{record.verdict} {record.reason[:200]}")


def _rarity(record: Result) -> int:
    if isinstance(record, TestRecord):
        return 0
    return text.rarity(record.reach, by_default=record.by_default)


def _rank(record: Result) -> tuple[bool, bool, int]:
    if isinstance(record, TestRecord):
        return True, False, 0
    place = _ORDER.index(record.verdict) if record.verdict in _ORDER else len(_ORDER)
    return False, record.reach is Reach.OPT_IN, place
