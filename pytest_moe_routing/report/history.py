"""The verdict matrix over releases of one target: what changed, and when."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pytest_moe_routing import progress
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.escape import brief, for_markdown, printable
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.judge import record_of
from pytest_moe_routing.oracle.record import VerdictRecord
from pytest_moe_routing.report import matrix
from pytest_moe_routing.report.records import FORMAT
from pytest_moe_routing.session import MoESession


@dataclass(frozen=True)
class Release:
    """What one release made of the cases.

    Attributes:
        name: The release, or where its sources are when it does not say.
        path: Where its sources are.
        flashinfer: The kernels that it is judged against.
        records: One for each case.
        problem: Why there is no verdict at all.
    """

    name: str
    path: str
    flashinfer: str
    records: tuple[VerdictRecord, ...] = ()
    problem: str = ""


def survey(sessions: Iterable[MoESession]) -> list[Release]:
    """Judge the cases of each session, one release after the other; oldest first.

    A release that cannot be asked is one with a problem, and does not end the survey.
    """
    found: list[Release] = []
    cases: list[tuple[ModelSpec, str]] | None = None
    for session in sessions:
        cases = session.published_cases if cases is None else cases
        found.append(ask(session, cases))
    names = [release.name for release in found]
    return sorted(
        (replace(r, name=f"{r.name} {r.path}") if names.count(r.name) > 1 else r for r in found),
        key=lambda release: matrix.version_order(release.name.partition(" ")[0]),
    )


def ask(session: MoESession, cases: Sequence[tuple[ModelSpec, str]]) -> Release:
    """Judge cases with a session's target; what keeps it from that is the release's problem."""
    path = session.target_id.path or Path()
    release = Release(path.name, str(path), "")
    try:
        release = replace(release, flashinfer=str(session.flashinfer))
        target = session.target
    except MoERoutingError as error:
        return replace(release, problem=brief(str(error)))
    try:
        release = replace(release, name=target.version())
        judging = f"{target.name} {release.name}, case"
        records = tuple(record_of(target, *case) for case in progress.each(cases, judging))
    except MoERoutingError as error:
        return replace(release, problem=brief(str(error)))
    finally:
        target.close()
    if not any(record.verdict.is_given for record in records):
        problem = "; ".join(matrix.why_unjudged(records))
        return replace(release, records=records, problem=problem)
    return replace(release, records=records)


def _columns(releases: Sequence[Release]) -> dict[str, Sequence[VerdictRecord]]:
    """Return the records of each release, by its name with the number of its footnote."""
    numbers = iter(range(1, len(releases) + 1))
    return {f"{r.name} [{next(numbers)}]" if r.problem else r.name: r.records for r in releases}


def _footnotes(releases: Sequence[Release]) -> list[str]:
    problems = [r.problem for r in releases if r.problem]
    return [f"[{n}] {problem}" for n, problem in enumerate(problems, 1)]


def _totals(releases: Sequence[Release]) -> Iterator[tuple[str, list[str]]]:
    """Return each release's totals, and why some of it has no verdict."""
    for release in releases:
        if not release.problem:
            text = f"{release.name}, {release.flashinfer}: {matrix.totals(release.records)}"
            yield text, matrix.why_unjudged(release.records)


def terminal(target: str, releases: Sequence[Release], *, every: bool = False) -> str:
    """For a terminal."""
    columns = _columns(releases)
    table = matrix.decider_table(columns, every=every)
    lines = [f"{target}, {len(releases)} release{'s' * (len(releases) != 1)}", ""]
    lines += matrix.aligned(table) if table[1:] else ["no verdict differs"]
    lines += _footnotes(releases)
    lines += ["", "changes"]
    lines += [f"  {change}" for change in matrix.changes(columns)] or ["  none"]
    lines += ["", "totals"]
    for text, reasons in _totals(releases):
        lines += [f"  {text}", *(f"    {reason}" for reason in reasons)]
    return printable("\n".join(lines)) + "\n"


def markdown(target: str, releases: Sequence[Release], *, every: bool = False) -> str:
    """As Markdown."""
    columns = _columns(releases)
    table = matrix.decider_table(columns, every=every)
    lines = [f"# Verdicts of {for_markdown(target)}, release by release", ""]
    lines += matrix.markdown(table) if table[1:] else ["No verdict differs."]
    lines += [line for note in _footnotes(releases) for line in ("", for_markdown(note))]
    lines += ["", "## Changes", ""]
    lines += [f"- {for_markdown(text)}" for text in matrix.changes(columns)] or ["None."]
    lines += ["", "## Totals", ""]
    for text, reasons in _totals(releases):
        lines += [f"- {for_markdown(text)}", *(f"  - {for_markdown(reason)}" for reason in reasons)]
    return "\n".join(lines) + "\n"


def as_json(target: str, releases: Sequence[Release], *, every: bool = False) -> str:
    """As JSON: always every verdict."""
    data = {
        "format": FORMAT,
        "target": target,
        "changes": matrix.changes(_columns(releases)),
        "releases": [
            {
                "release": r.name,
                "path": r.path,
                "flashinfer": r.flashinfer,
                "problem": r.problem or None,
                "verdicts": [record.as_dict() for record in r.records],
            }
            for r in releases
        ],
    }
    return json.dumps(data, indent=1) + "\n"


FORMATS: Mapping[str, Callable[..., str]] = {".md": markdown, ".json": as_json}
