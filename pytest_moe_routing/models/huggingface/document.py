"""A JSON file that somebody else wrote: read with limits, and with errors that name the key."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from pytest_moe_routing.errors import ModelError
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.inputs import path_of_nan, read_text

#: The largest config seen, a quantization plan with one line per expert and layer, has 3 MB.
MAX_BYTES = 16_000_000
_DIGITS = 19
ABSENT = object()


class Section:
    """A JSON object, with the file it is in and its place there.

    Keys are given with dots where they lie deeper: `ffn_config.moe_top_k`.
    """

    def __init__(self, file: Path, values: dict[str, Any], name: str = "") -> None:
        self.file, self.values, self.name = file, values, name

    def path(self, key: str) -> str:
        """Return the key's whole path in the file."""
        return f"{self.name}.{key}" if self.name else key

    def fail(self, key: str, found: str, expected: str) -> NoReturn:
        raise ModelError(f"{self.file}: {self.path(key)}: found {found}, expected {expected}")

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key; `default` if it, or an object around it, is absent."""
        value: Any = self.values
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    def section(self, key: str) -> Section | None:
        """Return the object under a key, or None if it is absent or null.

        Raises:
            ModelError: Something else than an object is there.
        """
        value = self.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            self.fail(key, show(value), "an object")
        return Section(self.file, value, self.path(key))

    def items(self, key: str) -> Iterator[Any]:
        """Return the items of the list under a key; none when it is absent or null.

        Raises:
            ModelError: Something else than a list is there.
        """
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            self.fail(key, show(value), "a list")
        return iter(value or ())

    def pick(self, keys: Sequence[str]) -> tuple[str, Any]:
        """Return the first spelling of a value that is present, and the value.

        Returns `ABSENT` as value, with the first spelling, when none is.

        Raises:
            ModelError: Two spellings are there and disagree.
        """
        there = [(key, self.get(key, ABSENT)) for key in keys]
        there = [(key, value) for key, value in there if value is not ABSENT]
        if not there:
            return keys[0], ABSENT
        key, value = there[0]
        for other, another in there[1:]:
            if another != value:
                self.fail(other, show(another), f"{show(value)} as {self.path(key)} has it")
        return key, value


def read_json(file: Path) -> Section:
    """Read a JSON file that holds one object.

    Raises:
        ModelError: It is no readable file, too large, not JSON, nested too deeply, has a key twice
            in one object, holds something else than an object, or has NaN as a value. Infinities
            are valid, as published configs have some.
    """
    text = read_text(file, MAX_BYTES, ModelError)
    try:
        values = json.loads(text, object_pairs_hook=_object, parse_int=_integer)
    except json.JSONDecodeError as error:
        raise ModelError(f"{file}:{error.lineno}: not valid JSON: {error.msg}") from error
    except RecursionError as error:
        raise ModelError(f"{file}: not valid JSON: nested too deeply") from error
    except _KeyAgainError as error:
        raise ModelError(f"{file}: {error}: found the key twice, expected it once") from error
    if not isinstance(values, dict):
        raise ModelError(f"{file}: found {show(values)}, expected an object")
    nan = path_of_nan(values) if "NaN" in text else None
    if nan is not None:
        raise ModelError(f"{file}: {shorten(nan, 120)}: found NaN, expected a number")
    return Section(file, values)


class _KeyAgainError(Exception):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _KeyAgainError(shorten(key))
        values[key] = value
    return values


def _integer(digits: str) -> int | float:
    """Integers as they are; absurdly long ones as floats, which no key accepts."""
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def show(value: object) -> str:
    """Shorten a JSON value for an error message."""
    if value is ABSENT:
        return "no key of this name"
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    return shorten(json.dumps(value, ensure_ascii=True))
