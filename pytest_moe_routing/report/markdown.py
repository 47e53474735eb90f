"""The report as Markdown, short enough for a comment on a pull request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_moe_routing.escape import (
    for_html,
    for_markdown,
    is_web_address,
    one_line,
    printable,
)
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
        yield from ("", f"## {for_markdown(name)}", "", for_markdown(matrix.totals(verdicts)), "")
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
    shown = printable("\n".join(lines)).split("\n")
    # A fence longer than any run of backticks in the text.
    fence = "```"
    while any(fence in line for line in shown):
        fence += "`"
    yield from (
        # A block of HTML: Markdown is not read in it.
        f"<details><summary>{for_html(one_line(title))}</summary>",
        "",
        f"{fence}text",
        *shown,
        fence,
        "",
    )
    yield from ("</details>", "")


def _known(record: Record) -> Iterator[str]:
    if record.known:
        link = record.known.link
        shown = f"<{link}>" if is_web_address(link) else for_markdown(link)
        yield from (f"Known: {for_markdown(record.known.reason)} ({shown})", "")
