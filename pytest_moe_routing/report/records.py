"""What a run found, as lines of JSON: one per verdict, and one per test that says something else.

A record of the kind `verdict` is a `Judgement.as_dict` (or an `unjudged`) with the outcome of its
test; one of the kind `test` is a GPU test, or another test of ours that failed. Files of several
runners merge.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pytest_moe_routing.errors import MoERoutingError

Record = dict[str, Any]
FORMAT = 1
_VERDICT = ("target", "flashinfer", "model", "scheme")
_TEST = ("flashinfer", "device", "case")
#: The keys of each kind with their types; those that name a record come first.
_KEYS: Mapping[str, Mapping[str, type | tuple[type, ...]]] = {
    "verdict": {
        **dict.fromkeys((*_VERDICT, "verdict", "method", "router", "outcome"), str),
        **dict.fromkeys(("path", "gates", "refused", "reasons", "counterexample"), list),
        **dict.fromkeys(("exact", "notes"), list),
        "kernel": (str, type(None)),
    },
    "test": dict.fromkeys((*_TEST, "outcome", "message"), str),
}


def key(record: Record) -> tuple[str, ...]:
    """What a record is about: there is one for each."""
    names = _VERDICT if record["kind"] == "verdict" else _TEST
    return (record["kind"], *(record[name] for name in names))


def dump(records: Iterable[Record]) -> str:
    """Records as JSON lines, in the order of what they are about."""
    ordered = sorted(records, key=key)
    return "".join(json.dumps({"format": FORMAT, **record}) + "\n" for record in ordered)


def load(file: Path) -> list[Record]:
    """Read the JSON lines of one run.

    Raises:
        MoERoutingError: The file cannot be read, or a line in it is no record.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except OSError as error:
        raise MoERoutingError(f"{file}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MoERoutingError(f"{file}: found bytes that are not UTF-8 text") from error
    return [_parse(line, f"{file}:{n}") for n, line in enumerate(lines, 1) if line.strip()]


def _parse(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise MoERoutingError(f"{where}: not valid JSON: {error}") from error
    found = record.pop("format", None) if isinstance(record, dict) else None
    if found != FORMAT:
        raise MoERoutingError(f"{where}: format: found {found!r}, expected {FORMAT}")
    keys = _KEYS.get(str(record.get("kind")))
    if keys is None:
        kinds = " or ".join(_KEYS)
        raise MoERoutingError(f"{where}: kind: found {record.get('kind')!r}, expected {kinds}")
    for name, types in keys.items():
        value = record.get(name)
        texts = all(isinstance(item, str) for item in value) if isinstance(value, list) else True
        if name not in record or not isinstance(value, types) or not texts:
            expected = "a list of texts" if types is list else "text"
            raise MoERoutingError(f"{where}: {name}: found {value!r}, expected {expected}")
    known = record.get("known", {"reason": "", "link": ""})
    if not isinstance(known, dict) or not all(
        isinstance(known.get(name), str) for name in ("reason", "link")
    ):
        raise MoERoutingError(f"{where}: known: found {known!r}, expected a reason and a link")
    result: Record = record
    return result


def merge(files: Iterable[Path]) -> list[Record]:
    """The records of several runs; the same one twice is one.

    Raises:
        MoERoutingError: A file cannot be read, or two of them disagree.
    """
    merged: dict[tuple[str, ...], Record] = {}
    origin: dict[tuple[str, ...], Path] = {}
    for file in files:
        for record in load(file):
            about = key(record)
            before = merged.setdefault(about, record)
            first = origin.setdefault(about, file)
            if places := _conflicts(before, record):
                raise MoERoutingError(
                    f"{first} and {file} disagree on {' '.join(filter(None, about[1:]))}: "
                    + "; ".join(f"{p}: {before.get(p)!r} or {record.get(p)!r}" for p in places)
                )
    return list(merged.values())


def _conflicts(one: Record, other: Record) -> list[str]:
    # A message tells where the package is installed, and which numbers a GPU gave this time.
    names = sorted({*one, *other} - {"message"})
    return [name for name in names if one.get(name) != other.get(name)]
