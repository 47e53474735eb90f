"""Verdicts as tables of plain text: what every format of report shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from packaging.version import Version

from pytest_moe_routing.escape import brief, for_markdown, one_line
from pytest_moe_routing.inputs import parse_release
from pytest_moe_routing.oracle.record import Record, TestRecord, UnansweredRecord, VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report.text import decider

Table = list[list[str]]
_NOTHING = "-"


def by_decider(verdicts: Iterable[VerdictRecord]) -> dict[str, list[VerdictRecord]]:
    """Return the verdicts of each target and release, older releases first."""
    groups: dict[str, list[VerdictRecord]] = {}
    for record in sorted(verdicts, key=_release_order):
        groups.setdefault(decider(record), []).append(record)
    return groups


def _release_order(record: VerdictRecord) -> tuple[object, ...]:
    releases = (record.release, record.flashinfer)
    return (record.target, *(part for release in releases for part in version_order(release)))


def version_order(release: str) -> tuple[bool, Version, str]:
    """Return a key that sorts releases by age, and other names after them."""
    try:
        return (False, parse_release(release), "")
    except ValueError:
        return (True, Version("0"), release)


def cell(record: VerdictRecord | None) -> str:
    """Return a verdict, with the chosen method where a kernel was in question."""
    if record is None:
        return _NOTHING
    text = str(record.verdict)
    if record.verdict.is_given and record.verdict is not Verdict.FALLBACK:
        text += f" ({record.method})"
    return f"{text}, known" if record.known else text


def scheme_table(verdicts: Sequence[VerdictRecord]) -> Table:
    """One decider: a row for each model, a column for each scheme, under a header."""
    models = sorted({v.model for v in verdicts})
    schemes = sorted({v.scheme for v in verdicts})
    cells = {(v.model, v.scheme): v for v in verdicts}
    rows = [[m, *(cell(cells.get((m, s))) for s in schemes)] for m in models]
    return [["model", *schemes], *rows]


def count_table(verdicts: Sequence[VerdictRecord]) -> Table:
    """One decider: a row for each scheme, a column for each verdict that occurs, under a header.

    A scheme that the decider does not serve has no row: why it is not judged is told elsewhere.
    """
    counts: dict[str, Counter[Verdict]] = {}
    for record in verdicts:
        counts.setdefault(record.scheme, Counter())[record.verdict] += 1
    served = {s: found for s, found in counts.items() if any(v.is_given for v in found)}
    counts = served or counts
    columns = [v for v in Verdict if any(v in found for found in counts.values())]
    rows = [
        [scheme, *(str(found[v]) if v in found else _NOTHING for v in columns)]
        for scheme, found in sorted(counts.items())
    ]
    return [["scheme", *map(str, columns)], *rows]


def decider_table(columns: Mapping[str, Sequence[VerdictRecord]], *, every: bool = False) -> Table:
    """Several deciders: a row for each model on a scheme, a column for each decider.

    Rows that all who judged agree on are left out, unless `every`.
    """
    cells, rows = _by_case(columns), []
    for case, found in cells.items():
        judged = {record.verdict for record in found.values() if record.verdict.is_given}
        if every or len(judged) > 1:
            rows.append([*case, *(cell(found.get(name)) for name in columns)])
    return [["model", "scheme", *columns], *rows]


def changes(columns: Mapping[str, Sequence[VerdictRecord]]) -> list[str]:
    """Where a verdict differs from that of the last release before that was judged."""
    lines = []
    for (model, scheme), found in _by_case(columns).items():
        last: tuple[str, Verdict] | None = None
        steps = []
        for name in columns:
            verdict = found[name].verdict if name in found else None
            if verdict is None or not verdict.is_given:
                continue
            if last is not None and last[1] != verdict:
                steps.append(f"{last[0]} {last[1]} -> {name} {verdict}")
            last = (name, verdict)
        lines += [f"{model} {scheme}: {step}" for step in steps]
    return lines


def _by_case(
    columns: Mapping[str, Sequence[VerdictRecord]],
) -> dict[tuple[str, str], dict[str, VerdictRecord]]:
    cells: dict[tuple[str, str], dict[str, VerdictRecord]] = {}
    for name, records in columns.items():
        for record in records:
            cells.setdefault((record.model, record.scheme), {})[name] = record
    return dict(sorted(cells.items()))


def totals(verdicts: Sequence[VerdictRecord]) -> str:
    """How many there are of each verdict, and how many of those fail as known."""
    counts = Counter(v.verdict for v in verdicts)
    known = Counter(v.verdict for v in verdicts if v.known)
    return ", ".join(
        f"{count} {name}" + (f" ({known[name]} known)" if known[name] else "")
        for name, count in sorted(counts.items())
    )


def why_unjudged(verdicts: Sequence[VerdictRecord]) -> list[str]:
    """Return the reasons for no verdict, most frequent first, each with its count."""
    counts = Counter(brief(v.reason) for v in verdicts if not v.verdict.is_given)
    return [f"{count} x {reason}" for reason, count in counts.most_common()]


def open_points(verdicts: Sequence[VerdictRecord]) -> list[str]:
    """Return why verdicts, or their reach, are not known; errors are shown as failures instead."""
    unanswered = [v for v in verdicts if v.verdict is not Verdict.ERROR]
    return [*why_unjudged(unanswered), *_open_reaches(verdicts)]


def assumed_releases(verdicts: Sequence[VerdictRecord]) -> list[str]:
    """Return a sentence for each FlashInfer release that was judged by the facts of another."""
    pairs = dict.fromkeys((v.flashinfer, v.judged_as) for v in verdicts)
    return [
        f"assumption: the kernels of FlashInfer {release}, which has no table of its own, are "
        f"those of {known}; check with: moe-routing drift flashinfer PATH"
        for release, known in pairs
        if release.partition("+")[0] != known  # a local build is the release it is built from
    ]


def _open_reaches(verdicts: Sequence[VerdictRecord]) -> list[str]:
    """Return why the reach of verdicts is an open question, each reason with its count."""
    counts = Counter(brief(v.reach_question) for v in verdicts if v.reach_question)
    return [
        f"{count} x it is not known who can reach the verdict: {reason}"
        for reason, count in counts.most_common()
    ]


def test_table(tests: Sequence[TestRecord]) -> Table:
    """Outcomes of tests by device and test function."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    for test in tests:
        device = f"{test.device}, {test.flashinfer}" if test.device else _NOTHING
        counts.setdefault((device, test.case.partition("[")[0]), Counter())[test.outcome] += 1
    rows = [
        [*about, ", ".join(f"{n} {outcome}" for outcome, n in sorted(found.items()))]
        for about, found in sorted(counts.items())
    ]
    return [["device", "test", "outcomes"], *rows]


def unanswered_table(records: Iterable[Record]) -> Table:
    """Return how many questions have no answer, by target, question and reason."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for record in records:
        if isinstance(record, UnansweredRecord):
            target = f"{record.target} {record.release}".strip()
            counts[target, record.what, record.reason] += record.count
    rows = [[*about, str(count)] for about, count in sorted(counts.items())]
    return [["target", "what", "reason", "count"], *rows]


def aligned(table: Table) -> list[str]:
    """Return the lines of a table for a terminal."""
    shown = [list(map(one_line, row)) for row in table]
    widths = [max(map(len, column)) for column in zip(*shown, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    ]


def markdown(table: Table) -> list[str]:
    """Return the lines of a table for Markdown."""

    def line(row: Iterable[str]) -> str:
        return "| " + " | ".join(map(for_markdown, row)) + " |"

    header, *rows = table
    return [line(header), "|" + "---|" * len(header), *map(line, rows)]
