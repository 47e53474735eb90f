"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_moe_routing.escape import for_html, is_web_address
from pytest_moe_routing.oracle.record import Record, TestRecord, VerdictRecord
from pytest_moe_routing.report import matrix
from pytest_moe_routing.report.text import MEANINGS, decider, story

_HEAD = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>MoE routing</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse }
th, td { padding: .15em .7em; text-align: left; border-bottom: 1px solid #ddd }
pre { font-size: 13px; background: #f6f6f6; padding: .6em; overflow-x: auto }
.exact { background: #dff3e1 } .fallback { background: #eef } .missed { background: #fff2cc }
.wrong, .crash, .error { background: #f8d0cd } .not-judged { color: #777 }
a { color: inherit }
</style>
<h1>MoE routing</h1>
"""


def page(records: Sequence[Record]) -> str:
    """Tables and totals; every verdict links to its whole story."""
    return _HEAD + "\n".join(_body(records)) + "\n</html>\n"


def _body(records: Sequence[Record]) -> Iterator[str]:
    deciders = matrix.by_decider(r for r in records if isinstance(r, VerdictRecord))
    tests = [r for r in records if isinstance(r, TestRecord)]
    if not records:
        yield "<p>Nothing was judged.</p>"
    for name, verdicts in deciders.items():
        yield f"<h2>{for_html(name)}</h2>\n<p>{for_html(matrix.totals(verdicts))}</p>"
        yield from _matrix(verdicts)
    if len(deciders) > 1:
        table = matrix.decider_table(deciders)
        yield "<h2>What differs</h2>"
        yield from _table(table) if table[1:] else ["<p>Nothing.</p>"]
    if tests:
        yield "<h2>Tests</h2>"
        yield from _table(matrix.test_table(tests))
        for test in tests:
            if test.outcome in ("failed", "xfailed"):
                yield from _story("", test.case, test.message.splitlines(), test)
    if deciders:
        yield "<h2>Why</h2>\n<dl>"
        yield from (f"<dt>{name}<dd>{for_html(says)}" for name, says in MEANINGS.items())
        yield "</dl>"
    for verdicts in deciders.values():
        for record in verdicts:
            title = f"{record.model} on {record.scheme}: {matrix.cell(record)}"
            yield from _story(_anchor(record), title, story(record), record)


def _matrix(verdicts: Sequence[VerdictRecord]) -> Iterator[str]:
    """As `matrix.scheme_table`, each verdict a link."""
    header, *rows = matrix.scheme_table(verdicts)
    found = {(v.model, v.scheme): v for v in verdicts}
    yield "<table>\n" + _row("th", header)
    for row in rows:
        cells = [f"<td>{for_html(row[0])}"]
        for scheme, text in zip(header[1:], row[1:], strict=True):
            record = found.get((row[0], scheme))
            if record is None:
                cells.append(f"<td>{for_html(text)}")
                continue
            link = f'<a href="#{for_html(_anchor(record))}">{for_html(text)}</a>'
            cells.append(f'<td class="{for_html(record.verdict.replace(" ", "-"))}">{link}')
        yield "<tr>" + "".join(cells)
    yield "</table>"


def _table(table: matrix.Table) -> Iterator[str]:
    header, *rows = table
    yield "<table>\n" + _row("th", header)
    yield from (_row("td", row) for row in rows)
    yield "</table>"


def _row(tag: str, texts: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{for_html(text)}" for text in texts)


def _anchor(record: VerdictRecord) -> str:
    about = f"{record.model}-{record.scheme}-{decider(record)}"
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in about)


def _story(anchor: str, title: str, lines: Sequence[str], record: Record) -> Iterator[str]:
    unfolded = " open" if record.outcome == "failed" else ""
    yield f"<details{unfolded}><summary>{for_html(title)}</summary>"
    if record.known:
        link, reason = record.known.link, for_html(record.known.reason)
        # Nothing but the web: a merged file may hold anything.
        is_web = is_web_address(link)
        yield (
            f'<p>Known: <a href="{for_html(link)}">{reason}</a></p>'
            if is_web
            else f"<p>Known: {reason}</p>"
        )
    # Inside, so that following a link to it unfolds it.
    place = f' id="{for_html(anchor)}"' if anchor else ""
    yield f"<pre{place}>{for_html(chr(10).join(lines))}</pre></details>"
