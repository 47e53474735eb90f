"""Report files: the format by the suffix of the path, and each written in one step."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.goldens import write_in_one_step
from pytest_moe_routing.oracle.record import Record, TestRecord, UnansweredRecord, VerdictRecord
from pytest_moe_routing.report import html, markdown
from pytest_moe_routing.report.records import FORMAT, dump, ordered


def _json(records: Sequence[Record]) -> str:
    found = ordered(records)
    data = {
        "format": FORMAT,
        "verdicts": [r.as_dict() for r in found if isinstance(r, VerdictRecord)],
        "tests": [r.as_dict() for r in found if isinstance(r, TestRecord)],
        "unanswered": [r.as_dict() for r in found if isinstance(r, UnansweredRecord)],
    }
    return json.dumps(data, indent=1) + "\n"


FORMATS: Mapping[str, Callable[[Sequence[Record]], str]] = {
    ".html": html.page,
    ".md": markdown.page,
    ".json": _json,
    ".jsonl": dump,
}


def check_suffix(path: Path, suffixes: Sequence[str] = tuple(FORMATS)) -> None:
    """Raise `MoERoutingError` unless the path says a format."""
    if path.suffix not in suffixes or path.is_dir():
        found = "a directory" if path.is_dir() else repr(path.suffix)
        expected = f"{', '.join(suffixes[:-1])} or {suffixes[-1]}"
        raise MoERoutingError(
            f"report {path}: found {found}, expected a name that ends in {expected}"
        )


def check_merged(path: Path, files: Iterable[Path]) -> None:
    """Check the names of a report and of those that it merges.

    Raises:
        MoERoutingError: One of them cannot be such a file, or would be written over.
    """
    check_suffix(path)
    for file in files:
        if file.suffix != ".jsonl":
            raise MoERoutingError(f"{file}: found {file.suffix!r}, expected a .jsonl report")
        if os.path.realpath(file) == os.path.realpath(path):
            raise MoERoutingError(f"{file}: found as the report to write and as one to merge")


def write_text(path: Path, text: str) -> None:
    """Write a report, and the folders above it.

    Raises:
        MoERoutingError: It cannot be written. What was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_in_one_step(path, text)
    except OSError as error:
        raise MoERoutingError(f"report {path}: cannot be written: {error.strerror}") from error


def write_report(path: Path, records: Sequence[Record]) -> None:
    """Write records in the format of the path's suffix.

    Raises:
        MoERoutingError: The path says no format, or the file cannot be written.
    """
    check_suffix(path)
    write_text(path, FORMATS[path.suffix](records))
