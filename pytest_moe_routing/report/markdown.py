"""The report as Markdown, short enough for a comment on a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_moe_routing.oracle.record import Record, TestRecord, VerdictRecord
from pytest_moe_routing.report import matrix
from pytest_moe_routing.report.text import story, title


def page(records: Sequence[Record]) -> str:
    """Tables and totals; the whole story of each bad verdict and failed test, folded."""
    return "\n".join(_lines(records)) + "\n"


def _lines(records: Sequence[Record]) -> Iterator[str]:
    deciders = matrix.by_decider(r for r in records if isinstance(r, VerdictRecord))
    tests = [r for r in records if isinstance(r, TestRecord)]
    yield "# MoE routing"
    if not records:
        yield from ("", "Nothing was judged.")
    for name, verdicts in deciders.items():
        yield from ("", f"## {matrix.inline(name)}", "", matrix.totals(verdicts), "")
        yield from matrix.markdown(matrix.scheme_table(verdicts))
    if len(deciders) > 1:
        table = matrix.decider_table(deciders)
        yield from ("", "## What differs", "")
        yield from matrix.markdown(table) if table[1:] else ["Nothing."]
    bad = [r for verdicts in deciders.values() for r in verdicts if not r.verdict.is_good]
    if bad:
        yield from ("", "## Why", "")
    for record in bad:
        yield from _folded(title(record), story(record))
        yield from _known(record)
    if tests:
        yield from ("", "## Tests", "")
        yield from matrix.markdown(matrix.test_table(tests))
        yield ""
    for test in tests:
        if test.outcome in ("failed", "xfailed"):
            yield from _folded(test.case, test.message.splitlines())
            yield from _known(test)


def _folded(title: str, lines: Sequence[str]) -> Iterator[str]:
    # A fence longer than any run of backticks in the text.
    fence = "```"
    while any(fence in line for line in lines):
        fence += "`"
    yield from (
        f"<details><summary>{matrix.inline(title)}</summary>",
        "",
        f"{fence}text",
        *lines,
        fence,
        "",
    )
    yield from ("</details>", "")


def _known(record: Record) -> Iterator[str]:
    if record.known:
        yield from (matrix.inline(f"Known: {record.known.reason} ({record.known.link})"), "")
