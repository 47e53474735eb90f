"""Records as lines of JSON, and the records of several runners merged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.inputs import parse_json, read_text
from pytest_moe_routing.oracle.record import KINDS, Record, UnansweredRecord

FORMAT = 2
#: A run of every model against one target writes 1 MB, and 3 kB in a line.
MAX_BYTES = 30_000_000
_MAX_LINE = 2_000_000
#: The one line of a run with nothing to report. A file without lines is not of a whole run.
_NOTHING = {"format": FORMAT, "kind": "nothing"}


def ordered(records: Iterable[Record]) -> list[Record]:
    """Return records in the order of what they are about, those of failed tests first."""
    return sorted(records, key=lambda record: (record.outcome != "failed", record.key))


def dump(records: Iterable[Record]) -> str:
    """Write records as JSON lines, failures first."""
    lines = [{"format": FORMAT, **record.as_dict()} for record in ordered(records)]
    return "".join(f"{json.dumps(line)}\n" for line in lines or [_NOTHING])


def load(file: Path) -> list[Record]:
    """Read the JSON lines of one run.

    Raises:
        MoERoutingError: The file cannot be read or has no lines, or a line in it is no record.
    """
    lines = read_text(file, MAX_BYTES).split("\n")
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise MoERoutingError(f"{file}: found no line, expected the report of a run")
    found = (_parse(line, f"{file}:{n}") for n, line in numbered)
    return [record for record in found if record is not None]


def load_document(file: Path) -> list[Record]:
    """Read the JSON report of one run.

    Raises:
        MoERoutingError: The file cannot be read, or is no report.
    """
    data = parse_json(read_text(file, MAX_BYTES), str(file))
    _check_format(data, str(file))
    found: list[Record] = []
    for name in ("verdicts", "tests", "unanswered"):
        rows = data.get(name, [])
        if not isinstance(rows, list):
            raise MoERoutingError(f"{file}: {name}: found {_show(rows)}, expected a list")
        found += [_record(row, f"{file}: {name}[{n}]") for n, row in enumerate(rows)]
    return found


def _check_format(data: Any, where: str) -> None:
    found = data.get("format") if isinstance(data, dict) else None
    if found != FORMAT:
        raise MoERoutingError(f"{where}: format: found {_show(found)}, expected {FORMAT}")


def _parse(line: str, where: str) -> Record | None:
    if len(line) > _MAX_LINE:
        size = f"{len(line)} characters"
        raise MoERoutingError(f"{where}: found {size}, expected at most {_MAX_LINE}")
    data = parse_json(line, where)
    _check_format(data, where)
    return None if data == _NOTHING else _record(data, where)


def _record(data: Any, where: str) -> Record:
    if not isinstance(data, dict):
        raise MoERoutingError(f"{where}: found {_show(data)}, expected a record")
    kind = KINDS.get(str(data.get("kind")))
    if kind is None:
        kinds = " or ".join(KINDS)
        shown = _show(data.get("kind"))
        raise MoERoutingError(f"{where}: kind: found {shown}, expected {kinds}")
    try:
        return kind.of(data)
    except ValueError as error:
        raise MoERoutingError(f"{where}: {error}") from None


def _show(value: object) -> str:
    return shorten(repr(value))


def merge(files: Iterable[Path]) -> list[Record]:
    """Return the records of several runs; the same one twice is one.

    Counts of questions without an answer are added up.

    Raises:
        MoERoutingError: A file cannot be read or is there twice, or two of them disagree.
    """
    merged: dict[tuple[str, ...], Record] = {}
    origin: dict[tuple[str, ...], Path] = {}
    read: set[str] = set()
    for file in files:
        if (place := os.path.realpath(file)) in read:
            raise MoERoutingError(f"{file}: the file was given twice")
        read.add(place)
        for record in load(file):
            if isinstance(record, UnansweredRecord):
                # Each run may have asked about models of its own.
                same = merged.get(record.key)
                count = same.count if isinstance(same, UnansweredRecord) else 0
                merged[record.key] = replace(record, count=record.count + count)
                continue
            before = merged.setdefault(record.key, record)
            first = origin.setdefault(record.key, file)
            if places := _conflicts(before, record):
                raise MoERoutingError(
                    f"{first} and {file} disagree on {' '.join(filter(None, record.key[1:]))}: "
                    + "; ".join(
                        f"{name}: {_show(one)} or {_show(other)}" for name, one, other in places
                    )
                )
    return list(merged.values())


def _conflicts(one: Record, other: Record) -> list[tuple[str, object, object]]:
    ours, theirs = one.as_dict(), other.as_dict()
    # A message tells where the package is installed, and which numbers a GPU gave this time.
    return [
        (name, ours[name], theirs[name])
        for name in ours
        if name != "message" and ours[name] != theirs[name]
    ]
