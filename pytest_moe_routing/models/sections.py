"""YAML mappings that know the file and the line of every key, and check them against a schema."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.inputs import path_of_nan
from pytest_moe_routing.models.kinds import is_required
from pytest_moe_routing.models.spec import LISTS, SECTIONS, schema
from pytest_moe_routing.models.yaml_nodes import compose, construct, show

__all__ = ["Entry", "Section", "compose", "fail_at", "show"]


@dataclass(frozen=True)
class Entry:
    """A key's value, and where it stands."""

    node: yaml.Node
    file: Path
    line: int


class Section:
    """A YAML mapping that remembers where every key stands, over one that it inherits keys from."""

    def __init__(
        self,
        file: Path,
        node: yaml.Node,
        name: str = "",
        line: int = 1,
        under: Section | None = None,
    ) -> None:
        self.file, self.name, self.line = file, name, line
        #: For the whole file: the one whose sections it inherits, key by key.
        self.like: Section | None = None
        if not isinstance(node, yaml.MappingNode):
            fail_at(file, line, name or "the file", show(node), "a mapping of keys to values")
        own: dict[str, Entry] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                fail_at(file, line, name or "the file", f"{show(key_node)} as a key", "text")
            key = key_node.value
            if key in own:
                first = own[key].line
                where = self._path(key)
                fail_at(
                    file, line, where, "the key twice", f"it once; the first is on line {first}"
                )
            own[key] = Entry(value_node, file, line)
        self.entries: dict[str, Entry] = {**(under.entries if under else {}), **own}

    def fail(self, key: str, found: str, expected: str) -> NoReturn:
        """Raise the `ModelError` of one of its keys, there or missing."""
        entry = self.entries.get(key)
        file, line = (entry.file, entry.line) if entry else (self.file, self.line)
        fail_at(file, line, self._path(key), found, expected)

    def _path(self, key: str) -> str:
        return f"{self.name}.{key}" if self.name else key

    def section(self, key: str) -> Section | None:
        """Return the mapping under a key, over the same one of the file that this file is like."""
        under = self.like.section(key) if self.like else None
        entry = self.entries.get(key)
        return Section(entry.file, entry.node, key, entry.line, under) if entry else under

    def build(self, cls: type, *, partial: bool = False) -> Any:
        """Make the dataclass from its keys, checked; with `partial`, sections may lack keys."""
        values = self.values(cls, partial=partial)
        for key, item in schema(cls).items():
            if key not in values and is_required(item):
                expected = item.metadata.get("kind", "a mapping of keys to values")
                self.fail(key, "no key of this name", str(expected))
        built = cls(**values)
        for key, found, expected in built.problems():
            self.fail(key, found, expected)
        return built

    def values(self, cls: type, *, partial: bool = False) -> dict[str, Any]:
        """Return the keys that are there, each checked; sections are built unless `partial`."""
        keys = schema(cls)
        for key in self.entries:
            if key not in keys:
                near = get_close_matches(key, keys, n=1)
                hint = f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(keys)}"
                place, path = self.entries[key], shorten(self._path(key), 120)
                raise ModelError(f"{place.file}:{place.line}: {path}: unknown key; {hint}")
        values: dict[str, Any] = {}
        for key, item in keys.items():
            if key in SECTIONS:
                if section := self.section(key):
                    of = SECTIONS[key]
                    values[key] = section.values(of) if partial else section.build(of)
            elif "kind" not in item.metadata:
                if (entry := self._inherited(key)) is not None:
                    values[key] = tuple(self._list(key, entry))
            elif key in self.entries:
                values[key] = self.value(key, item.metadata["kind"])
        return values

    def _inherited(self, key: str) -> Entry | None:
        """Return the entry of a key here, else in the file that this file is like."""
        if key in self.entries or self.like is None:
            return self.entries.get(key)
        return self.like._inherited(key)

    def _list(self, key: str, entry: Entry) -> Iterator[Any]:
        """Return the mappings of a list, each built."""
        if not isinstance(entry.node, yaml.SequenceNode):
            fail_at(entry.file, entry.line, key, show(entry.node), "a list of mappings")
        for i, node in enumerate(entry.node.value):
            line = node.start_mark.line + 1
            section = Section(entry.file, node, f"{self._path(key)}[{i}]", line)
            yield section.build(LISTS[key], partial=True)

    def value(self, key: str, kind: Any) -> Any:
        """Return the value of a key that is there, checked.

        Raises:
            ModelError: It is not of this kind.
        """
        node = self.entries[key].node
        try:
            value = construct(node)
        except ValueError as error:
            self.fail(key, str(error), str(kind))
        expected = kind.problem(value)
        if expected is not None:
            if kind.type is float and isinstance(value, str) and _is_number(value):
                expected += f" (YAML reads {value} as text; write {float(value)!r} with a dot)"
            if kind.type is str and isinstance(value, (int, float)) and not kind.choices:
                expected += f" (YAML reads {show(node)} as a number; write it in quotes)"
            self.fail(key, show(node), expected)
        nan = path_of_nan(value)
        if nan is not None:
            self.fail(f"{key}.{nan}", "NaN", "a number")
        return tuple(value) if kind.many else value


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def fail_at(path: Path, line: int, key: str, found: str, expected: str) -> NoReturn:
    """Raise the `ModelError` of one key."""
    raise ModelError(f"{path}:{line}: {shorten(key, 120)}: found {found}, expected {expected}")
