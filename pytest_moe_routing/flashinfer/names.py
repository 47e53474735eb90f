"""Names of FlashInfer, release by release: `names.yaml`, looked up."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.flashinfer.signatures import each_parameter

#: The sections of `names.yaml`.
MODULES, NAMES, ENUMS, FUNCTIONS = "modules", "names", "enums", "functions"


#: By section and key of `names.yaml`, the words of one release.
Listing = Mapping[str, Mapping[str, Collection[str]]]


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = read_data(__package__, "names.yaml")
    return data


@cache
def listed_releases() -> tuple[str, ...]:
    """Return the releases whose names are known, oldest first."""
    return tuple(_data()["releases"].split())


@dataclass(frozen=True)
class Names:
    """What code can import from one FlashInfer release.

    Attributes:
        release: One of the listed releases.
    """

    release: str

    @classmethod
    def of(cls, release: str) -> Names | None:
        """Look a release up; None if its names are not known."""
        version = Version(release)
        known = next((r for r in listed_releases() if Version(r) == version), None)
        return None if known is None else cls(known)

    def has_module(self, module: str) -> bool | None:
        """Return whether the release has a module; None if those of its package are not listed."""
        package, _, name = module.rpartition(".")
        if not package:
            return True
        if self.has_module(package) is False:
            return False
        words = self._words(MODULES, package)
        if words is None:
            # What is listed with its names, and not with its modules, is no package.
            return None if self._words(NAMES, package) is None else False
        return name in words

    def has(self, module: str, name: str) -> bool | None:
        """Return whether a module has a name; None if its names are not listed."""
        words = self._words(NAMES, module)
        return None if words is None else name in words

    def members(self, enum: str) -> Collection[str] | None:
        """Return members and methods of an enum; None if they are not listed."""
        return self._words(ENUMS, enum) or None

    def signature(self, function: str) -> inspect.Signature | None:
        """Return the parameters of a function; None if they are not listed."""
        words = self._words(FUNCTIONS, function)
        return _signature(next(iter(words))) if words else None

    def missing(self, full: str) -> str:
        """Return the part of a dotted name, from its start, that the release lacks; "" if none.

        Args:
            full: A module, a name in one, or a member of an enum: `flashinfer.SfLayout.layout_8x4`.
        """
        module, *parts = full.split(".")
        for place, part in enumerate(parts):
            here = f"{module}.{part}"
            if self.has(module, part):
                members = self.members(part)
                member = next(iter(parts[place + 1 :]), "")
                is_known = not member or members is None or member in members
                return "" if is_known or member.startswith("__") else f"{here}.{member}"
            if not self.has_module(here):
                is_listed = self.has(module, part) is False or self.has_module(here) is False
                return here if is_listed and not part.startswith("__") else ""
            module = here
        return ""

    def listing(self) -> Listing:
        """Return all that is listed of this release; nothing under any key if it is not listed."""
        releases = listed_releases()
        place = releases.index(self.release) if self.release in releases else -1

        def covers(span: str) -> bool:
            since, until = span.split("..")
            start = releases.index(since) if since else 0
            end = releases.index(until) if until else len(releases)
            return start <= place <= end

        return {
            section: {
                key: frozenset(
                    word for span, words in spans.items() if covers(span) for word in words.split()
                )
                for key, spans in _data()[section].items()
            }
            for section in (MODULES, NAMES, ENUMS, FUNCTIONS)
        }

    def _words(self, section: str, key: str) -> Collection[str] | None:
        return self._listing[section].get(key)

    @cached_property
    def _listing(self) -> Listing:
        return self.listing()


@cache
def is_in_any_release(full: str) -> bool:
    """Return whether a listed release has a dotted name; see `Names.missing`."""
    return any(not Names(release).missing(full) for release in listed_releases())


@cache
def _signature(listed: str) -> inspect.Signature:
    """Return a signature from what is listed: `(a,b=0,*,c=0)`."""
    (function,) = ast.parse(f"def f{listed}: ...").body
    assert isinstance(function, ast.FunctionDef)
    kinds = inspect.Parameter
    found = [
        kinds(
            name,
            kinds.KEYWORD_ONLY if by_name else kinds.POSITIONAL_OR_KEYWORD,
            default=kinds.empty if default is None else None,
        )
        for name, default, by_name in each_parameter(function.args)
    ]
    arguments = function.args
    if arguments.vararg:
        place = next((i for i, p in enumerate(found) if p.kind is kinds.KEYWORD_ONLY), len(found))
        found.insert(place, kinds(arguments.vararg.arg, kinds.VAR_POSITIONAL))
    if arguments.kwarg:
        found.append(kinds(arguments.kwarg.arg, kinds.VAR_KEYWORD))
    return inspect.Signature(found)
