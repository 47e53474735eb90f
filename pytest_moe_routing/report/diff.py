"""Two reports or two releases against each other: which failures are new, and which are gone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.escape import one_line
from pytest_moe_routing.oracle.record import (
    Record,
    Result,
    TestRecord,
    UnansweredRecord,
    VerdictRecord,
)
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import history, records
from pytest_moe_routing.report.text import decider
from pytest_moe_routing.session import MoESession

#: Verdicts of which a new one fails the comparison.
_BAD = (Verdict.WRONG, Verdict.CRASH, Verdict.ERROR)


class Kind(StrEnum):
    """What a change means; every kind but the last fails the comparison."""

    NEW = "new failures"
    LOST = "no longer judged"
    OTHER = "other changes"


@dataclass(frozen=True)
class Change:
    """A case on which the two sides differ.

    Attributes:
        case: A model and scheme, or a test.
        before, after: The verdict and its cause, or the test's outcome; empty where the side does
            not have the case.
    """

    kind: Kind
    case: str
    before: str
    after: str

    def __str__(self) -> str:
        text = f"{self.case}: {self.before or 'absent'} -> {self.after or 'absent'}"
        return one_line(text)


def changes(before: Iterable[Record], after: Iterable[Record]) -> list[Change]:
    """Return the cases that differ, new failures first.

    A new failure is a `wrong`, `crash` or error verdict of a cause that the case did not have, a
    fused kernel that was lost, or a test that newly fails. A case that was judged and no longer is
    may hide one.

    Raises:
        MoERoutingError: One side has several verdicts on a case, or both sides are empty.
    """
    old, new = _by_case(before), _by_case(after)
    if not old and not new:
        raise MoERoutingError("found no case on either side, expected verdicts or tests to compare")
    found = []
    for case in sorted({**old, **new}):
        one, other = old.get(case), new.get(case)
        if _state(one) != _state(other):
            found.append(Change(_kind(one, other), case, _state(one), _state(other)))
    return sorted(found, key=lambda change: list(Kind).index(change.kind))


def _by_case(side: Iterable[Record]) -> dict[str, Result]:
    found: dict[str, Result] = {}
    for record in side:
        if isinstance(record, UnansweredRecord):
            continue
        if isinstance(record, TestRecord):
            before = found.setdefault(record.case, record)
            # Another device, or another release: what failed on one of them has failed.
            if "failed" in (before.outcome, record.outcome):
                found[record.case] = replace(before, outcome="failed")
            continue
        other = found.setdefault(f"{record.model} {record.scheme}", record)
        if isinstance(other, VerdictRecord) and other.decider != record.decider:
            both = f"{decider(other)}; {decider(record)}"
            raise MoERoutingError(f"found verdicts of several releases, expected one: {both}")
    return found


def _state(record: Result | None) -> str:
    if record is None:
        return ""
    if isinstance(record, TestRecord):
        return record.outcome
    return f"{record.verdict} ({record.cause})" if record.cause else str(record.verdict)


def _kind(before: Result | None, after: Result | None) -> Kind:
    if isinstance(after, TestRecord) and after.outcome == "failed":
        return Kind.NEW
    if isinstance(after, VerdictRecord) and (after.verdict in _BAD or after.lost_since):
        return Kind.NEW
    was_judged = isinstance(before, VerdictRecord) and before.verdict.is_given
    is_judged = isinstance(after, VerdictRecord) and after.verdict.is_given
    return Kind.LOST if was_judged and not is_judged else Kind.OTHER


def fails(found: Sequence[Change]) -> bool:
    """Return whether the comparison fails."""
    return any(change.kind is not Kind.OTHER for change in found)


def side(name: str, session: MoESession) -> list[Record]:
    """Return the records of a `.json` or `.jsonl` report, or of a release that is judged now.

    Raises:
        MoERoutingError: The file is no report, or the release cannot be judged.
    """
    path = Path(name)
    if path.suffix == ".jsonl":
        return records.load(path)
    if path.suffix == ".json":
        return records.load_document(path)
    release = history.ask(session, session.cases)
    if release.problem and not release.records:
        raise MoERoutingError(f"{name}: {release.problem}")
    return list(release.records)


def lines(found: Sequence[Change]) -> Iterator[str]:
    """Yield the comparison for a terminal."""
    for kind in Kind:
        those = [change for change in found if change.kind is kind]
        if those:
            yield f"{kind}: {len(those)}"
            yield from (f"  {change}" for change in those)
    if not found:
        yield "nothing differs"


def as_json(found: Sequence[Change]) -> str:
    """Return the comparison as JSON."""
    data = [
        {
            "kind": change.kind.value,
            "case": change.case,
            "before": change.before or None,
            "after": change.after or None,
        }
        for change in found
    ]
    return json.dumps({"format": records.FORMAT, "changes": data}, indent=1) + "\n"
