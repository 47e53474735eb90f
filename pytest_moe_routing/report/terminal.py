"""The verdicts of a run for a terminal: within its width, and colored by verdict."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pytest_moe_routing.escape import one_line
from pytest_moe_routing.oracle.record import VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import matrix

#: Models that have a line each for a verdict; more of them share one line.
_LISTED = 3
_GAP = "  "

#: The markup of each verdict, as pytest's terminal writer takes it.
MARKUP: Mapping[Verdict, Mapping[str, bool]] = {
    Verdict.EXACT: {"green": True},
    Verdict.WRONG: {"red": True, "bold": True},
    Verdict.CRASH: {"red": True},
    Verdict.FALLBACK: {"cyan": True},
    Verdict.MISSED: {"yellow": True},
    Verdict.NOT_JUDGED: {"purple": True},
    Verdict.ERROR: {"red": True},
}


@dataclass(frozen=True)
class Piece:
    """A part of a line, in the color of a verdict if it is about one."""

    text: str
    verdict: Verdict | None = None

    @property
    def markup(self) -> Mapping[str, bool]:
        return {} if self.verdict is None else MARKUP[self.verdict]


Line = tuple[Piece, ...]
_Table = list[list[Piece]]


def plain(line: Line) -> str:
    """Return the text of a line."""
    return "".join(piece.text for piece in line)


def summary(
    verdicts: Sequence[VerdictRecord], *, every: bool = False, width: int = 80
) -> Iterator[Line]:
    """Yield the lines about a run: what is not exact, then counts, then the totals.

    Args:
        every: Show every verdict of every model instead.
        width: The columns of the terminal.
    """
    deciders = matrix.by_decider(verdicts)
    if len(deciders) > 1:
        yield from _fitted(_differing(deciders, every=every), 2, width)
    elif every:
        yield from _matrix(verdicts, width)
    else:
        yield from _not_exact(verdicts, width)
        yield from _fitted(_counts(verdicts), 1, width)
    for name, found in deciders.items():
        yield from wrapped(f"{matrix.totals(found)}; {name}", width)
    for assumption in matrix.assumed_releases(verdicts):
        yield from wrapped(assumption, width)
    for reason in matrix.open_points(verdicts):
        yield from wrapped(reason, width)


def wrapped(text: str, width: int, start: str = "", verdict: Verdict | None = None) -> list[Line]:
    """Return a text as lines that fit, with a colored start."""
    lines = textwrap.wrap(
        start + one_line(text), max(width, 40), subsequent_indent=_GAP, break_on_hyphens=False
    )
    first, *more = lines or [start]
    split = min(len(start), len(first))
    return [
        (Piece(first[:split], verdict), Piece(first[split:])),
        *((Piece(line),) for line in more),
    ]


def _not_exact(verdicts: Sequence[VerdictRecord], width: int) -> Iterator[Line]:
    """Yield what is not exact: bad verdicts by model, how many have each reason to fall back."""
    column = max(map(len, Verdict)) + len(_GAP)
    for verdict in (Verdict.WRONG, Verdict.CRASH, Verdict.ERROR, Verdict.MISSED):
        models: dict[str, list[str]] = {}
        for record in verdicts:
            if record.verdict is verdict:
                known = " (known)" if record.known else ""
                models.setdefault(record.model, []).append(record.scheme + known)
        start = str(verdict).ljust(column)
        if len(models) > _LISTED:
            about, hint = f"{sum(map(len, models.values()))} x: ", "; -v lists all"
            names = _as_many_as_fit(sorted(models), width - len(start + about + hint))
            yield from wrapped(about + names + hint, width, start, verdict)
            continue
        for model, schemes in sorted(models.items()):
            yield from wrapped(f"{model}: {', '.join(schemes)}", width, start, verdict)
    reasons: Counter[str] = Counter()
    for record in verdicts:
        if record.verdict is Verdict.FALLBACK:
            # The gate of an obstacle; the rest of the text has numbers of the model.
            gate, is_gate, _ = (record.obstacles or ("",))[0].partition(":")
            reasons[gate if is_gate else "no exact method"] += 1
    if reasons:
        start = str(Verdict.FALLBACK).ljust(column)
        text = ", ".join(f"{count} x {gate}" for gate, count in reasons.most_common())
        yield from wrapped(text, width, start, Verdict.FALLBACK)


def _as_many_as_fit(names: Sequence[str], width: int) -> str:
    """Return names on one line, and how many are left out."""
    shown = list(names)
    while len(shown) > 1 and len(", ".join(shown)) + len(" and 99 more") > width:
        shown.pop()
    left = len(names) - len(shown)
    return ", ".join(shown) + (f" and {left} more" if left else "")


def _counts(verdicts: Sequence[VerdictRecord]) -> _Table:
    header, *rows = matrix.count_table(verdicts)
    columns = [None, *map(Verdict, header[1:])]
    return [
        [Piece(text, v if text.isdecimal() else None) for text, v in zip(row, columns, strict=True)]
        for row in [header, *rows]
    ]


def _cell(record: VerdictRecord | None, *, method: bool = True) -> Piece:
    if record is None:
        return Piece(matrix.cell(None))
    text = matrix.cell(record) if method else f"{record.verdict}{'*' if record.known else ''}"
    return Piece(text, record.verdict)


def _matrix(verdicts: Sequence[VerdictRecord], width: int) -> Iterator[Line]:
    """Yield a row for each model and a column for each scheme; methods only where they fit."""
    models = sorted({v.model for v in verdicts})
    schemes = sorted({v.scheme for v in verdicts})
    found = {(v.model, v.scheme): v for v in verdicts}
    for method in (True, False):
        rows = [
            [Piece(m), *(_cell(found.get((m, s)), method=method) for s in schemes)] for m in models
        ]
        table = [[Piece(name) for name in ("model", *schemes)], *rows]
        if sum(_widths(table)) + len(_GAP) * len(schemes) <= width:
            break
    yield from _fitted(table, 1, width)
    if not method and any(v.known for v in verdicts):
        yield (Piece("* known failure"),)


def _differing(deciders: Mapping[str, Sequence[VerdictRecord]], *, every: bool) -> _Table:
    found = {(name, v.model, v.scheme): v for name, those in deciders.items() for v in those}
    header, *rows = matrix.decider_table(deciders, every=every)
    cells = [
        [*map(Piece, row[:2]), *(_cell(found.get((name, *row[:2]))) for name in deciders)]  # type: ignore[arg-type]
        for row in rows
    ]
    return [list(map(Piece, header)), *cells] if cells else []


def _widths(table: _Table) -> list[int]:
    return [
        max(len(one_line(piece.text)) for piece in column) for column in zip(*table, strict=True)
    ]


def _fitted(table: _Table, keys: int, width: int) -> Iterator[Line]:
    """Yield an aligned table; columns that do not fit follow below, after the key columns."""
    if not table:
        return
    widths = _widths(table)
    left = list(range(keys, len(widths)))
    while left:
        block = [*range(keys), left.pop(0)]
        while left and sum(widths[i] for i in (*block, left[0])) + len(_GAP) * len(block) <= width:
            block.append(left.pop(0))
        for row in table:
            yield tuple(_aligned((row[i] for i in block), [widths[i] for i in block]))


def _aligned(pieces: Iterable[Piece], widths: Sequence[int]) -> Iterator[Piece]:
    shown = [replace(piece, text=one_line(piece.text)) for piece in pieces]
    for place, (piece, width) in enumerate(zip(shown, widths, strict=True)):
        yield piece
        if place + 1 < len(shown):
            yield Piece(" " * (width - len(piece.text)) + _GAP)
