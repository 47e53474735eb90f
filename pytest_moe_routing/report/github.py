"""What a run tells GitHub Actions: annotations in its log, and the summary of its job."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.escape import printable
from pytest_moe_routing.oracle.record import Record
from pytest_moe_routing.report import groups, markdown

#: GitHub shows ten errors of a step, and drops the rest.
_SHOWN = 10
_ESCAPES = {"%": "%25", "\r": "%0D", "\n": "%0A"}
_IN_PROPERTIES = {**_ESCAPES, ":": "%3A", ",": "%2C"}


def commands(records: Sequence[Record]) -> Iterator[str]:
    """Yield a workflow command for each cause, at the framework's source where that is known."""
    for group in groups.failed(records)[:_SHOWN]:
        file, _, line = group.source.rpartition(":")
        where = f"file={_escaped(file, _IN_PROPERTIES)},line={line}," if file else ""
        title = _escaped(group.title, _IN_PROPERTIES)
        others = [f"also {', '.join(group.others)}"] if group.others else []
        message = _escaped("\n".join((*group.lines, *others)), _ESCAPES)
        yield f"::error {where}title={title}::{message}"


def _escaped(text: str, escapes: dict[str, str]) -> str:
    return "".join(escapes.get(character, character) for character in printable(text))


def append_summary(records: Sequence[Record]) -> None:
    """Append the Markdown report to the job's summary.

    Raises:
        MoERoutingError: The summary cannot be written.
    """
    path = os.environ.get("GITHUB_STEP_SUMMARY", "")
    if path:
        try:
            with Path(path).open("a", encoding="utf-8") as summary:
                summary.write(markdown.page(records))
        except OSError as error:
            message = f"GITHUB_STEP_SUMMARY {path}: cannot be written: {error.strerror}"
            raise MoERoutingError(message) from error
