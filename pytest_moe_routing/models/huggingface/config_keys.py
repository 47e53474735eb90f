"""Keys of a config that its family does not read: what they mean, from `config_keys.yaml`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from pytest_moe_routing.data import read_data
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.models.huggingface.document import Section

#: The lists of `config_keys.yaml`, in the order in which a key is looked up.
LISTS = ("changes", "harmless", "routing", "other", "suspect")
#: Keys that nothing reads, in one section; no published config seen has a hundredth of them.
MAX_UNREAD = 10_000


@dataclass(frozen=True)
class KeyRow:
    """What is known about keys of some names.

    Attributes:
        list: One of `LISTS`.
        reason: What the keys are about, in words.
        neutral: The values with which a key of `changes` changes nothing.
        in_checkpoint: Whether the keys describe the checkpoint's weights, so that a framework
            whose code does not contain a key's name ignores it.
    """

    list: str
    pattern: re.Pattern[str]
    reason: str
    neutral: tuple[Any, ...]
    in_checkpoint: bool = False

    def is_neutral(self, value: Any) -> bool:
        """Whether a value changes nothing; a list does not if none of its items does.

        To the code of a model, false is the number 0, and true is 1.
        """
        if isinstance(value, list) and value:
            return all(map(self.is_neutral, value))
        return value in self.neutral


@dataclass(frozen=True)
class Unread:
    """What the keys that nothing read amount to.

    Attributes:
        changes: Why the router is another than the one that was read, one reason for each key.
        routing: Other keys that are about experts or routing, or may be by their names.
        unknown: Keys of which nothing is known.
    """

    changes: tuple[str, ...]
    routing: tuple[str, ...]
    unknown: tuple[str, ...]


@cache
def key_rows() -> tuple[KeyRow, ...]:
    """Return the packaged rows, in the order in which they are asked."""
    data = read_data(__package__, "config_keys.yaml")
    return tuple(
        KeyRow(
            name,
            re.compile(row["keys"], re.DOTALL),
            row.get("reason", ""),
            tuple(row.get("neutral", ())),
            row.get("in_checkpoint", False),
        )
        for name in LISTS
        for row in data[name]
    )


def row_of(key: str) -> KeyRow | None:
    """Return the first row that knows a key."""
    return next((row for row in key_rows() if row.pattern.fullmatch(key)), None)


def about_experts(key: str) -> bool:
    """Whether a key is about experts or routing, whatever it changes."""
    row = row_of(key)
    return row is not None and row.list != "other"


def about_routing(key: str) -> bool:
    """Whether a key may change the routing or what the routed experts compute."""
    row = row_of(key)
    return row is not None and row.list in ("changes", "routing")


def in_checkpoint(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys that change what the checkpoint's weights mean, each with what it says."""
    rows = ((key, row_of(key), value) for key, value in values.items())
    return {
        key: row.reason
        for key, row, value in rows
        if row is not None and row.in_checkpoint and not row.is_neutral(value)
    }


def stated(section: Section, read: Collection[str]) -> Iterator[tuple[str, str, Any]]:
    """Yield the path, name and value of each key that was not read.

    An object of which nothing is known, or of which single keys were read, may state anything: of
    the keys inside it, at any depth, those that a row knows are yielded as well.

    Raises:
        ModelError: There are more such keys than any config has.
    """
    waiting = [(key, key, value, False) for key, value in list(section.values.items())[::-1]]
    count = 0
    while waiting:
        path, name, value, is_inside = waiting.pop()
        if path in read:
            continue
        count += 1
        if count > MAX_UNREAD:
            found = f"a config with more than {MAX_UNREAD} keys that are not read"
            section.fail(shorten(path), found, "the config of a model")
        is_known = row_of(name) is not None
        is_partly_read = any(key.startswith(f"{path}.") for key in read)
        if not is_partly_read and (is_known or not is_inside):
            yield path, name, value
        if is_inside or is_partly_read or not is_known:
            waiting += [
                (f"{path}.{key}", key, item, not is_partly_read)
                for key, item in list(_inside(value))[::-1]
            ]


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys inside a value, each with its own: of a list, the objects and lists in it."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list):
        for place, item in enumerate(value):
            if isinstance(item, (dict, list)):
                yield str(place), item


def unread(section: Section, read: Collection[str]) -> Unread:
    """Sort the keys that are there and were not read. A null states nothing."""
    changes: list[str] = []
    routing: list[str] = []
    unknown: list[str] = []
    for path, name, value in stated(section, read):
        if value is None:
            continue
        row = row_of(name)
        if row is None:
            unknown.append(path)
        elif row.list == "changes":
            if not row.is_neutral(value):
                changes.append(f"{row.reason} ({path})")
        elif row.list in ("routing", "suspect"):
            routing.append(path)
    return Unread(tuple(changes), tuple(routing), tuple(unknown))
