"""Answers of a framework's code that are kept between runs.

An answer holds as long as everything that it may depend on is unchanged: the framework's code and
data files, whether imported, read or only looked for; this package and its data; Python and every
installed distribution, torch among them; the child's command line, with the FlashInfer release;
and the environment that the child sees. A digest of all this names the folder. A file in it is read
with limits, and its answers are checked like those of the child.

Most questions have the same answer as another one, so a file has each answer once: `replies` is a
list of the kind of a reply and what it says, `rows` one of question, arguments and place in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.inputs import Archive, read_bytes

#: The question, its arguments as JSON, and the kind of the reply with what it says.
Row = tuple[str, str, str, Any]

_PACKAGE = Path(__file__).resolve().parents[1]
#: Bytes of a file of answers, as it is stored and as it is read; files of a folder; folders.
_STORED, _READ, _FILES, _FOLDERS = 64_000_000, 512_000_000, 64, 8
#: The largest Python file seen, a generated one, has 1 MB.
_SOURCE = 20_000_000
#: Code, and files from which code takes values.
_TEXTS = (".py", ".json", ".yaml", ".yml", ".toml")
_KINDS = ("answer", "unsupported")
#: What the child sees of the environment, and what says nothing about its answers.
_INDIFFERENT = ("PATH", "HOME", "USERPROFILE", "TMPDIR", "TEMP", "TMP")


@dataclass(frozen=True)
class Store:
    """Where answers are kept.

    Attributes:
        folder: The folder, which need not exist.
        make: Makes it, and returns it.
    """

    folder: Path
    make: Callable[[], Path]


class Kept:
    """The answers that one child gave in earlier runs.

    Args:
        key: What the answers depend on, as `key_of_child` makes it.
        worker: The name of this process among those that run side by side; each has its own file.
    """

    def __init__(self, store: Store, key: str, worker: str) -> None:
        self._store, self._key, self._name = store, key, f"{worker}.json.z"

    def rows(self) -> Iterator[Row]:
        """Yield the answers; none from a file that is damaged, too large or no file of answers.

        What rows have in common is one object.
        """
        folder = self._store.folder / self._key
        try:
            files = sorted(path for path in folder.iterdir() if path.name.endswith(".json.z"))
        except OSError:
            return
        for path in files[:_FILES]:
            try:
                answers = _unpacked(read_bytes(path, _STORED))
            except (MoERoutingError, ValueError, zlib.error, RecursionError):
                continue
            yield from _rows(answers)

    def write(self, rows: Iterable[Row]) -> None:
        """Keep answers in this process's file; where that cannot be, none are kept."""
        replies: dict[str, int] = {}
        kept = [
            (question, arguments, replies.setdefault(_compact([kind, value]), len(replies)))
            for question, arguments, kind, value in rows
            if kind in _KINDS
        ]
        text = f'{{"replies":[{",".join(replies)}],"rows":{_compact(kept)}}}'
        data = zlib.compress(text.encode(), 3)
        if len(data) > _STORED or len(text) > _READ:
            return
        with suppress(OSError):
            folder = self._store.make()
            (folder / self._key).mkdir(parents=True, exist_ok=True)
            temporary = folder / self._key / f".{self._name}.{os.getpid()}"
            temporary.write_bytes(data)
            temporary.replace(folder / self._key / self._name)
            _drop_oldest(folder)


def _unpacked(data: bytes) -> Any:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, _READ)
    if not unpacker.eof:
        raise ValueError("more than is kept")
    return json.loads(text)


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _rows(answers: object) -> Iterator[Row]:
    match answers:
        case {"replies": list(replies), "rows": list(rows)}:
            for row in rows:
                match row:
                    case [str(question), str(arguments), int(place)] if 0 <= place < len(replies):
                        match replies[place]:
                            case [str(kind), value] if kind in _KINDS:
                                yield question, arguments, kind, value


def _drop_oldest(folder: Path) -> None:
    """Leave the folders of the latest keys."""
    folders = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in folders[_FOLDERS:]:
        shutil.rmtree(path, ignore_errors=True)


def key_of_sources(root: Path, package: str, distributions: Iterable[str]) -> str | None:
    """Return what every answer of a framework's code depends on, in one word.

    None if it cannot be told, as a file cannot be read.

    Args:
        root: The directory or the wheel that has the framework's package in it.
        package: The framework's package.
        distributions: Names of the distributions that contain the package.
    """
    try:
        parts = [
            _of_sources(root, package),
            _of_sources(_PACKAGE.parent, _PACKAGE.name, all_files=True),
            [_metadata(root, name) for name in distributions],
            [sys.version, sys.platform, _installed()],
        ]
    except (OSError, ValueError, MoERoutingError):
        return None
    return _digest(parts)


def key_of_child(sources: str, command: Iterable[str], environment: Mapping[str, str]) -> str:
    """Return what the answers of one child depend on, in one word.

    Args:
        sources: See `key_of_sources`.
        command: The module that the child runs and its arguments, without the sources' place.
        environment: What the child sees of it.
    """
    seen = {name: text for name, text in environment.items() if name not in _INDIFFERENT}
    return _digest([sources, list(command), sorted(seen.items())])


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:40]


@cache
def _installed() -> list[str]:
    """Name and release of every installed distribution, and the state of an editable one's code."""
    return sorted(
        f"{found.name} {found.version} {_of_editable(found)}" for found in metadata.distributions()
    )


def _of_editable(distribution: metadata.Distribution) -> str:
    """Return what changes with the code of an editable distribution; empty for any other one.

    Its code changes without its release. Here it is identified by sizes and times: a checkout may
    have thousands of files, few of which are imported.

    Raises:
        OSError: A file cannot be looked at.
        ValueError: What states where it is from is no JSON.
    """
    match json.loads(distribution.read_text("direct_url.json") or "{}"):
        case {"url": str(url), "dir_info": {"editable": True}}:
            root, states = Path(url2pathname(urlsplit(url).path)), []
        case _:
            return ""
    if _PACKAGE.is_relative_to(root.resolve()):
        return ""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(each for each in folders if not each.startswith((".", "__pycache__")))
        for file in sorted(each for each in files if each.endswith(_TEXTS)):
            state = Path(folder, file).lstat()
            states.append((os.path.relpath(folder, root), file, state.st_size, state.st_mtime_ns))
    return _digest(states)


def _metadata(root: Path, name: str) -> list[str]:
    found = metadata.Distribution.discover(name=name, path=[str(root)])
    return [each.read_text("METADATA") or "" for each in found]


def _of_sources(root: Path, package: str, *, all_files: bool = False) -> str:
    """Return a digest of a package: the names of all its files, and the text of code and data.

    Raises:
        OSError, MoERoutingError: A file cannot be read.
    """
    digest = hashlib.sha256()
    for name, data in _members(root, package, all_files):
        digest.update(f"{len(name)} {len(data)} {name}".encode("utf-8", "surrogateescape"))
        digest.update(data)
    return digest.hexdigest()


def _members(root: Path, package: str, all_files: bool) -> Iterator[tuple[str, bytes]]:
    """Yield the files of a package by name; without their text if that says nothing."""
    if root.is_file():
        with Archive(root) as wheel:
            for name in sorted(wheel.names):
                if name.startswith(f"{package}/"):
                    is_read = name.endswith(_TEXTS)
                    yield name, wheel.read_bytes(name, _SOURCE) if is_read else b""
        return
    # The name of each directory: links may lead to one again, and around in a circle.
    names: dict[str, str] = {}
    for folder, folders, files in os.walk(root / package, followlinks=True):
        name = os.path.relpath(folder, root)
        first = names.setdefault(os.path.realpath(folder), name)
        if first != name:
            yield name, first.encode("utf-8", "surrogateescape")
            folders[:] = []
            continue
        folders[:] = sorted(each for each in folders if each != "__pycache__")
        for file in sorted(files):
            path = Path(folder, file)
            is_read = all_files or file.endswith(_TEXTS)
            # What is no regular file, such as a pipe, is never read by an import either.
            is_read = is_read and path.exists() and stat.S_ISREG(path.stat().st_mode)
            yield str(path.relative_to(root)), read_bytes(path, _SOURCE) if is_read else b""
