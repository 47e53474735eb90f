"""The report as one HTML file that needs nothing else, and no script to be complete."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources

from pytest_moe_routing.escape import for_html, is_web_address
from pytest_moe_routing.oracle.record import (
    Record,
    Result,
    TestRecord,
    UnansweredRecord,
    VerdictRecord,
)
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import groups, matrix, text
from pytest_moe_routing.report.decision_tree import Tree, svg

_HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'sha256-{hash}'">
<title>MoE routing</title>
<style>
{css}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the results</a>
<header><h1>MoE routing</h1>
"""


@cache
def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text("utf-8")


def page(records: Sequence[Record]) -> str:
    """Return the failures by cause, the matrix of each decider, and a section for each model."""
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(f"\n{script}".encode()).digest()).decode()
    head = _HEAD.format(hash=digest, css=_asset("page.css"))
    body = "\n".join(_Page(records).lines())
    return f"{head}{body}\n<script>\n{script}</script>\n</body>\n</html>\n"


class _Page:
    """The records of a page, sorted for its sections."""

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = records
        self.deciders = matrix.by_decider(r for r in records if isinstance(r, VerdictRecord))
        self.tests = [r for r in records if isinstance(r, TestRecord)]
        self.unanswered = [r for r in records if isinstance(r, UnansweredRecord)]
        self.failed = groups.failed(records)
        self.models: dict[str, list[VerdictRecord]] = {}
        for verdicts in self.deciders.values():
            for record in verdicts:
                self.models.setdefault(record.model.partition("@")[0], []).append(record)

    def lines(self) -> Iterator[str]:
        for name, verdicts in self.deciders.items():
            yield f"<p>{for_html(name)}: {for_html(matrix.totals(verdicts))}</p>"
        yield "</header>"
        links = {
            "failures": "Failures" if self.deciders or self.tests else "",
            "releases": "Releases" if len(self.deciders) > 1 else "",
            "matrix": "Matrix" if self.deciders else "",
            "tests": "Tests" if self.tests else "",
            "unanswered": "Not judged" if self.unanswered else "",
            "models": "Models" if self.models else "",
        }
        items = (f'<li><a href="#{id_}">{name}</a>' for id_, name in links.items() if name)
        yield f'<nav aria-label="Sections"><ul>{"".join(items)}</ul></nav>'
        yield '<main id="main">'
        if not (self.deciders or self.tests):
            yield "<p>Nothing was judged.</p>"
        else:
            yield from self._failures()
        if len(self.deciders) > 1:
            yield from self._releases()
        if self.deciders:
            yield from self._matrices()
        if self.tests:
            yield from self._tests()
        if self.unanswered:
            yield '<h2 id="unanswered">Not judged within tests</h2>'
            yield from _plain_table(
                "questions",
                "Questions without an answer, by target",
                matrix.unanswered_table(self.unanswered),
            )
        if self.models:
            yield '<h2 id="models">Models</h2>'
        trees = {
            name: Tree.of((*v.path, v.method) for v in verdicts if v.method)
            for name, verdicts in self.deciders.items()
        }
        for place, (model, verdicts) in enumerate(sorted(self.models.items())):
            yield from _model(model, verdicts, trees, place)
        yield "</main>"
        yield "<footer><p>Written by pytest-moe-routing.</p></footer>"

    def _failures(self) -> Iterator[str]:
        yield f'<h2 id="failures">Failures: {len(self.failed)}</h2>'
        if not self.failed:
            yield "<p>Nothing failed.</p>"
        for group in self.failed:
            # The title of a verdict is the first line of its story.
            told = group.lines[isinstance(group.first, VerdictRecord) :]
            is_placed = any(group.source in line for line in told)
            where = [] if is_placed else [f"  at       {group.source}"]
            lines = [*told, *where, *group.tail]
            yield from _story(group.title, lines, group.first, is_open=True)

    def _releases(self) -> Iterator[str]:
        """Yield a timeline: a row for each case that differs, a column for each release."""
        table = matrix.decider_table(self.deciders)
        found = {(name, v.model, v.scheme): v for name, vs in self.deciders.items() for v in vs}
        yield '<h2 id="releases">What differs from release to release</h2>'
        if not table[1:]:
            yield "<p>Nothing.</p>"
            return
        header, *rows = table
        yield from _open_table(
            "timeline", "Cases whose verdict differs, oldest release first", header
        )
        for row in rows:
            cells = [f'<th scope="row">{for_html(row[0])}</th><td>{for_html(row[1])}</td>']
            for name, shown in zip(header[2:], row[2:], strict=True):
                cells.append(_cell(found.get((name, row[0], row[1])), shown))
            yield f"<tr>{''.join(cells)}</tr>"
        yield "</tbody></table></div>"
        yield f"<ul>{''.join(f'<li>{for_html(c)}' for c in matrix.changes(self.deciders))}</ul>"

    def _matrices(self) -> Iterator[str]:
        yield '<h2 id="matrix">Models and quantization schemes</h2>\n<dl>'
        for verdict, says in text.MEANINGS.items():
            yield f'<dt class="{_css_class(verdict)}">{verdict}</dt><dd>{for_html(says)}</dd>'
        yield "</dl>"
        for place, (name, verdicts) in enumerate(self.deciders.items()):
            yield from _filters(f"matrix-{place}", verdicts)
            yield from _matrix(f"matrix-{place}", name, verdicts)

    def _tests(self) -> Iterator[str]:
        yield '<h2 id="tests">Tests</h2>'
        table = matrix.test_table(self.tests)
        yield from _plain_table("outcomes", "Outcomes of other tests, by device", table)
        for test in self.tests:
            if test.outcome == "xfailed":
                yield from _story(test.case, test.message.splitlines(), test)


def _open_table(id_: str, caption: str, header: Sequence[str]) -> Iterator[str]:
    cells = "".join(f'<th scope="col">{for_html(name)}</th>' for name in header)
    yield (
        f'<div class="scroll" role="region" aria-labelledby="{id_}-caption" tabindex="0">'
        f'<table id="{id_}"><caption id="{id_}-caption">{for_html(caption)}</caption>'
        f"<thead><tr>{cells}</tr></thead><tbody>"
    )


def _plain_table(id_: str, caption: str, table: matrix.Table) -> Iterator[str]:
    header, *rows = table
    yield from _open_table(id_, caption, header)
    for row in rows:
        first, *others = map(for_html, row)
        cells = "".join(f"<td>{cell}</td>" for cell in others)
        yield f'<tr><th scope="row">{first}</th>{cells}</tr>'
    yield "</tbody></table></div>"


def _filters(table: str, verdicts: Sequence[VerdictRecord]) -> Iterator[str]:
    """Yield the form that the script shows; it is hidden, as nothing works without it."""
    present = [v for v in Verdict if any(record.verdict is v for record in verdicts)]
    boxes = "".join(
        f'<label><input type="checkbox" value="{_css_class(v)}"> {v}</label>' for v in present
    )
    yield (
        f'<form class="filters" data-table="{table}" hidden>'
        f'<label>Model <input type="search" autocomplete="off"></label>'
        f"{boxes}<output></output></form>"
    )


def _matrix(id_: str, name: str, verdicts: Sequence[VerdictRecord]) -> Iterator[str]:
    """Yield a row for each model: its routing method, and its verdict in each scheme."""
    models, schemes = (sorted({getattr(v, n) for v in verdicts}) for n in ("model", "scheme"))
    found = {(v.model, v.scheme): v for v in verdicts}
    yield from _open_table(id_, f"Verdicts of {name}", ("model", "method", *schemes))
    for model in models:
        records = [found.get((model, scheme)) for scheme in schemes]
        methods = dict.fromkeys(r.method for r in records if r is not None and r.method)
        cells = [f'<th scope="row"><a href="#{_section(model)}">{for_html(model)}</a></th>']
        cells.append(f"<td>{for_html(', '.join(methods))}</td>")
        for record in records:
            known = ", known" if record is not None and record.known else ""
            cells.append(_cell(record, "-" if record is None else f"{record.verdict}{known}"))
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody></table></div>"


def _cell(record: VerdictRecord | None, shown: str) -> str:
    """Return a cell of a matrix; a verdict links to its explanation."""
    if record is None:
        return f"<td>{for_html(shown)}</td>"
    link = f'<a href="#{_anchor(record)}">{for_html(shown)}</a>'
    return f'<td class="{_css_class(record.verdict)}">{link}</td>'


def _model(
    model: str, verdicts: Sequence[VerdictRecord], trees: Mapping[str, Tree], place: int
) -> Iterator[str]:
    """Yield a model's section: the decision drawn, then each explanation once."""
    yield f'<section id="{_section(model)}"><h3>{for_html(model)}</h3>'
    drawn: dict[tuple[str, ...], str] = {}
    for record in verdicts:
        path = (*record.path, record.method)
        if record.method and path not in drawn:
            id_ = f"path-{place}-{len(drawn)}"
            title = f"{text.decider(record)}: {' -> '.join(path)}"
            drawn[path] = svg(trees[text.decider(record)], path, title, id_)
    for path, drawing in drawn.items():
        label = "Decision: " + (path[-1] if len(drawn) == 1 else " -> ".join(path[-2:]))
        yield f"<details><summary>{for_html(label)}</summary>{drawing}</details>"
    same: dict[tuple[str, ...], list[VerdictRecord]] = {}
    for record in verdicts:
        # The title names the scheme; records that share all the rest are told together.
        key = (text.decider(record), record.model, matrix.cell(record), *text.story(record)[1:])
        same.setdefault(key, []).append(record)
    for (decider, name, shown, *lines), records in same.items():
        schemes = ", ".join(record.scheme for record in records)
        who = f", {decider}" if len(trees) > 1 else ""
        anchors = "".join(f'<span id="{_anchor(record)}"></span>' for record in records[1:])
        called = text.calls(records)
        yield from _story(
            f"{name} on {schemes}: {shown}{who}",
            [*lines, *called],
            records[0],
            anchor=_anchor(records[0]),
            before=anchors,
        )
    yield "</section>"


def _css_class(verdict: Verdict) -> str:
    return verdict.value.replace(" ", "-")


def _section(model: str) -> str:
    return _id("model", model.partition("@")[0])


def _anchor(record: VerdictRecord) -> str:
    return _id("on", record.model, record.scheme, text.decider(record))


def _id(*parts: str) -> str:
    """Return an id of letters, digits, dots and dashes."""
    joined = "-".join(parts)
    return "".join(c if c.isascii() and (c.isalnum() or c in ".-") else "-" for c in joined)


def _story(
    title: str,
    lines: Sequence[str],
    record: Result,
    *,
    anchor: str = "",
    before: str = "",
    is_open: bool = False,
) -> Iterator[str]:
    place = f' id="{anchor}"' if anchor else ""
    unfolded = " open" if is_open else ""
    shade = f' class="{_css_class(record.verdict)}"' if isinstance(record, VerdictRecord) else ""
    yield f"<details{place}{shade}{unfolded}><summary>{for_html(title)}</summary>{before}"
    if record.known:
        link, reason = record.known.link, for_html(record.known.reason)
        # Nothing but the web: a merged file may hold anything.
        shown = f'<a href="{for_html(link)}">{reason}</a>' if is_web_address(link) else reason
        yield f"<p>Known: {shown}</p>"
    yield f"<pre>{for_html(chr(10).join(lines))}</pre></details>"
