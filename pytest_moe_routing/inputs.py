"""Reads files that users and frameworks wrote: regular files only, with limits, as text or JSON.

Every file of that kind is opened here. A limit is checked before anything is read or unpacked.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Callable
from math import isnan
from pathlib import Path
from typing import Any, BinaryIO

from packaging.version import Version

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.escape import one_line, printable, shorten

Error = type[MoERoutingError]

#: Nested lists and objects in JSON; far more than any format here has.
_DEPTH = 100
#: Digits of an integer in JSON: those of 2**63 - 1. `int` of thousands is slow or refused.
_DIGITS = 19
_RELEASE_LENGTH = 100
#: Bytes of a wheel's table of contents: about 100,000 files.
_DIRECTORY_BYTES = 10_000_000
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def open_regular(path: Path, error: Error = MoERoutingError) -> BinaryIO:
    """Open a regular file for reading; never wait for a pipe or a device.

    Raises:
        error: It cannot be opened, or is something else than a regular file.
    """
    # Without O_NONBLOCK, opening a pipe waits for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except (OSError, ValueError) as cause:
        raise error(f"{path}: cannot be read: {_reason(cause)}") from cause
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "a device")
        raise error(f"{path}: found {kind}, expected a regular file")
    return os.fdopen(descriptor, "rb")


def _reason(cause: Exception) -> str:
    text = cause.strerror if isinstance(cause, OSError) else None
    return one_line(text or str(cause) or type(cause).__name__)


def read_bytes(path: Path, limit: int, error: Error = MoERoutingError) -> bytes:
    """Read a regular file of at most `limit` bytes.

    Raises:
        error: It cannot be read, is no regular file, or is larger.
    """
    with open_regular(path, error) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            # Files of /proc are regular and say that they are empty.
            data = file.read(limit + 1) if size <= limit else b""
        except OSError as cause:
            raise error(f"{path}: cannot be read: {_reason(cause)}") from cause
    _check_limit(max(size, len(data)), limit, str(path), error)
    return data


def _check_limit(size: int, limit: int, where: str, error: Error) -> None:
    if size > limit:
        raise error(f"{where}: found {size} bytes, expected at most {limit}")


def read_text(path: Path, limit: int, error: Error = MoERoutingError) -> str:
    """Read a regular file of at most `limit` bytes of UTF-8 text.

    Raises:
        error: As for `read_bytes`, or it is not UTF-8 text.
    """
    return decode(read_bytes(path, limit, error), str(path), error)


def decode(data: bytes, where: str, error: Error = MoERoutingError) -> str:
    """Decode UTF-8 text.

    Raises:
        error: It is none; with the line.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as cause:
        line = data[: cause.start].count(b"\n") + 1
        raise error(f"{where}:{line}: found bytes that are not UTF-8 text") from cause


class _InvalidError(Exception):
    """What `json` accepts and this reader does not."""


def parse_json(text: str, where: str, error: Error = MoERoutingError) -> Any:
    """Parse JSON strictly.

    Raises:
        error: Not JSON; a key is there twice in one object; NaN or an infinity; an integer of more
            than 19 digits or a number too large for a float; nesting of more than 100 levels.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_constant,
        )
    except json.JSONDecodeError as cause:
        line = f":{cause.lineno}" if "\n" in text else ""
        raise error(f"{where}{line}: not valid JSON: {cause.msg.removesuffix(' at')}") from cause
    except RecursionError as cause:
        raise error(f"{where}: not valid JSON: nested too deeply") from cause
    except _InvalidError as cause:
        raise error(f"{where}: {cause}") from cause
    _check_depth(value, where, error)
    return value


def path_of_nan(value: object) -> str | None:
    """Return the keys that lead to a NaN in nested objects and lists; None if there is none."""
    rest: list[tuple[str, object]] = [("", value)]
    while rest:
        path, value = rest.pop()
        if isinstance(value, float) and isnan(value):
            return path.lstrip(".")
        if isinstance(value, dict):
            rest += ((f"{path}.{key}", inner) for key, inner in value.items())
        elif isinstance(value, list):
            rest += ((f"{path}[{i}]", inner) for i, inner in enumerate(value))
    return None


def _check_depth(value: Any, where: str, error: Error) -> None:
    level: list[Any] = [value]
    for _ in range(_DEPTH + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise error(f"{where}: not valid JSON: nested too deeply")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in pairs:
        if key in values:
            raise _InvalidError(f"{shorten(key)}: found the key twice, expected it once")
        values[key] = value
    return values


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > _DIGITS:
        raise _InvalidError(f"found a number of {len(digits)} digits, expected at most {_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise _InvalidError(f"found {shorten(digits)}, expected a number that a float can hold")
    return value


def _constant(name: str) -> float:
    raise _InvalidError(f"found {name}, expected a number")


def parse_release(text: str) -> Version:
    """Parse a release number that somebody else wrote.

    Raises:
        ValueError: It is none, or longer than any.
    """
    if len(text) > _RELEASE_LENGTH:
        raise ValueError(f"{shorten(text)} is not a release")
    return Version(text)


class Archive:
    """A wheel, or another zip file, whose members are read with limits.

    Args:
        path: The file.
        error: What is raised.

    Raises:
        error: It cannot be opened, is no zip file, or has an absurd number of members.
    """

    def __init__(self, path: Path, error: Error = MoERoutingError) -> None:
        self._path, self._error = path, error
        file = open_regular(path, error)
        try:
            _check_limit(_directory_size(file), _DIRECTORY_BYTES, f"{path}: list of files", error)
            self._zip = zipfile.ZipFile(file)
            self.names = self._zip.namelist()
        except Exception as cause:
            file.close()
            if isinstance(cause, error):
                raise
            raise error(f"{path}: found no wheel file ({_reason(cause)})") from cause
        self._file = file

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __del__(self) -> None:
        # Without a warning: a package may keep its wheel open for as long as it lives.
        if hasattr(self, "_file"):
            self._file.close()

    def read_bytes(self, name: str, limit: int) -> bytes:
        """Read a member of at most `limit` bytes.

        Raises:
            error: It is larger, encrypted, damaged or packed in an unknown way.
        """
        where = self._where(name)
        try:
            info = self._zip.getinfo(name)
            _check_limit(info.file_size, limit, where, self._error)
            with self._zip.open(info) as member:
                return member.read(limit + 1)
        except MoERoutingError:
            raise
        except Exception as cause:
            # Over damaged, encrypted and otherwise packed members, `zipfile` raises a dozen kinds.
            raise self._error(f"{where}: cannot be read: {_reason(cause)}") from cause

    def read_text(self, name: str, limit: int) -> str:
        """Read a member of at most `limit` bytes of UTF-8 text.

        Raises:
            error: As for `read_bytes`, or it is not UTF-8 text.
        """
        return decode(self.read_bytes(name, limit), self._where(name), self._error)

    def _where(self, name: str) -> str:
        return f"{self._path}: {printable(name)}"


_END = b"PK\x05\x06"
_END64 = b"PK\x06\x06"


def _directory_size(file: BinaryIO) -> int:
    """Return the size of a zip file's table of contents, as its last record says; 0 without one."""
    # The record has 22 bytes, and a comment of up to 65,535 may follow; zip64's stands before it.
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 70_000))
    tail = file.read(70_000)
    end = tail.rfind(_END)
    found = int.from_bytes(tail[end + 12 : end + 16], "little") if end >= 0 else 0
    end64 = tail.rfind(_END64, 0, max(end, 0))
    if end64 >= 0:
        found = int.from_bytes(tail[end64 + 40 : end64 + 48], "little")
    return found
