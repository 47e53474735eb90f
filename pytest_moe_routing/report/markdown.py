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
from pytest_moe_routing.oracle.record import (
    Known,
    Record,
    Result,
    TestRecord,
    UnansweredRecord,
    VerdictRecord,
)
from pytest_moe_routing.report import groups, matrix
from pytest_moe_routing.report.text import story, title

#: GitHub takes 65,536 characters; the rest of the comment needs some as well.
LIMIT = 60_000
#: So many cases are named for each known failure.
_NAMED = 5


def page(records: Sequence[Record], limit: int = LIMIT) -> str:
    """Return the failures by cause, then counts; the matrix and other explanations, folded.

    What does not fit is left out from the end on, and its number is said.

    Args:
        limit: Characters that the page may have.
    """
    blocks = [block for block in map("\n".join, _blocks(records)) if block]
    kept, room = [], limit - 200
    for block in blocks:
        room -= len(block) + 2
        if room < 0:
            break
        kept.append(block)
    left = len(blocks) - len(kept)
    if left:
        kept.append(f"{left} more parts do not fit here; `--moe-report FILE.html` has them all.")
    return "\n\n".join(kept) + "\n"


def _blocks(records: Sequence[Record]) -> Iterator[list[str]]:
    """Yield the parts of the page, the most important ones first."""
    deciders = matrix.by_decider(r for r in records if isinstance(r, VerdictRecord))
    tests = [r for r in records if isinstance(r, TestRecord)]
    yield ["# MoE routing"]
    if not (deciders or tests):
        yield ["Nothing was judged."]
    yield [
        f"- {for_markdown(name)}: {for_markdown(matrix.totals(verdicts))}"
        for name, verdicts in deciders.items()
    ]
    found = groups.failed(records)
    if found:
        yield [f"## {len(found)} causes of failure" if len(found) > 1 else "## 1 cause of failure"]
    for group in found:
        yield [*_folded(group.title, [*group.lines, *group.tail]), *_known(group.first)]
    yield list(_known_failures(records))
    if len(deciders) > 1:
        table = matrix.decider_table(deciders)
        yield ["## What differs"]
        yield matrix.markdown(table) if table[1:] else ["Nothing."]
    for name, verdicts in deciders.items():
        yield [f"## {for_markdown(name)}"]
        yield matrix.markdown(matrix.count_table(verdicts))
        yield [f"- {for_markdown(reason)}" for reason in matrix.open_points(verdicts)]
    if tests:
        yield ["## Tests"]
        yield matrix.markdown(matrix.test_table(tests))
    unanswered = matrix.unanswered_table(records)
    if unanswered[1:]:
        yield ["## Not judged within tests"]
        yield matrix.markdown(unanswered)
    for name, verdicts in deciders.items():
        shown = matrix.markdown(matrix.scheme_table(verdicts))
        yield [
            f"<details><summary>{for_html(one_line(name))}</summary>",
            "",
            *shown,
            "",
            "</details>",
        ]
    for verdicts in deciders.values():
        for record in verdicts:
            if not record.verdict.is_good and record.outcome != "failed":
                yield [*_folded(title(record), story(record)), *_known(record)]
    for test in tests:
        if test.outcome == "xfailed":
            yield [*_folded(test.case, test.message.splitlines()), *_known(test)]


def _known_failures(records: Sequence[Record]) -> Iterator[str]:
    """Yield a line for each entry of a ledger that silenced failures, with the cases."""
    cases: dict[str, list[str]] = {}
    for record in sorted(records, key=lambda record: record.key):
        if record.known and not isinstance(record, UnansweredRecord):
            cases.setdefault(_stated(record.known), []).append(groups.name_of(record))
    if cases:
        count = sum(map(len, cases.values()))
        yield f"## {count} known failures" if count > 1 else "## 1 known failure"
        yield ""
    for stated, names in cases.items():
        more = f" and {len(names) - _NAMED} more" if names[_NAMED:] else ""
        yield f"- {stated}: {for_markdown(', '.join(names[:_NAMED]))}{more}"


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
    yield "</details>"


def _known(record: Result) -> Iterator[str]:
    if record.known:
        yield from ("", f"Known: {_stated(record.known)}")


def _stated(known: Known) -> str:
    link = f"<{known.link}>" if is_web_address(known.link) else for_markdown(known.link)
    return for_markdown(known.reason) + (f" ({link})" if known.link else "")
