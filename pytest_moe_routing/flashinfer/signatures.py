"""Parameters of FlashInfer's entry points, release by release: `signatures.yaml`, looked up."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.errors import DataError


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = read_data(__package__, "signatures.yaml")
    return data


def functions(release: str) -> tuple[str, ...]:
    """Return the entry points that a release has."""
    return tuple(name for name in _data()["functions"] if parameters(name, release) is not None)


def parameters(function: str, release: str) -> tuple[str, ...] | None:
    """Each parameter as `name` or `name=default`, with a `*` before those given by name only.

    None when the release has no such entry point.
    """
    timeline = _data()["functions"].get(function, {})
    past = [r for r in sorted(timeline, key=Version) if Version(r) <= Version(release)]
    if not past:
        return None
    found = _split(timeline[past[0]])
    for turn in past[1:]:
        found = edited(found, timeline[turn], f"{function} at {turn}")
    return tuple(found)


def edited(base: list[str], edits: Mapping[str, str], where: str) -> list[str]:
    """Return a list of parameters after the edits of one release.

    Raises:
        DataError: An edit of another kind, or of a parameter that is not there.
    """
    found = list(base)
    for kind, value in edits.items():
        *verb, name = kind.rsplit(" ", 1)
        if kind == "drop":
            for dropped in _split(value):
                del found[_place(found, dropped, where)]
        elif verb == ["instead of"]:
            found[_place(found, name, where)] = value
        elif verb == ["after"]:
            after = _place(found, name, where) + 1
            found[after:after] = _split(value)
        else:
            raise DataError(
                f"signatures.yaml, {where}: found {kind!r}, "
                "expected `drop`, `instead of NAME` or `after NAME`"
            )
    return found


def enums() -> tuple[str, ...]:
    """Return the enums that arguments are taken from, in any release."""
    return tuple(_data()["enums"])


@cache
def enum(name: str, release: str) -> Mapping[str, int]:
    """Members and numbers of an enum that arguments are taken from; empty before its time."""
    timeline = _data()["enums"].get(name, {})
    past = [r for r in timeline if Version(r) <= Version(release)]
    members = timeline[max(past, key=Version)] if past else []
    return {member: number for number, member in enumerate(members)}


@cache
def signature(function: str, release: str) -> inspect.Signature | None:
    """Return the signature of an entry point, defaults that are enum members as their numbers.

    None when the release has no such entry point.
    """
    found = parameters(function, release)
    if found is None:
        return None
    (function_,) = ast.parse(f"def f({', '.join(found)}): ...").body
    assert isinstance(function_, ast.FunctionDef)
    return inspect.Signature(
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY
                if by_name
                else inspect.Parameter.POSITIONAL_OR_KEYWORD,
                default=inspect.Parameter.empty if default is None else _value(default, release),
            )
            for name, default, by_name in each_parameter(function_.args)
        ]
    )


def each_parameter(arguments: ast.arguments) -> Iterator[tuple[str, ast.expr | None, bool]]:
    """Name, default and whether it is given by name only, of every plain parameter."""
    places = [*arguments.posonlyargs, *arguments.args]
    missing = [None] * (len(places) - len(arguments.defaults))
    for argument, default in zip(places, [*missing, *arguments.defaults], strict=True):
        yield argument.arg, default, False
    for argument, by_name in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield argument.arg, by_name, True


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _place(found: list[str], name: str, where: str) -> int:
    for place, parameter in enumerate(found):
        if parameter.split("=")[0] == name:
            return place
    raise DataError(f"signatures.yaml, {where}: there is no parameter {name!r}")


def _value(default: ast.expr, release: str) -> object:
    """Return a literal, a constant, the number of a member `Enum.Member` or `Enum.Member.value`.

    Of a dtype `torch.NAME`, it is the name.
    """
    if isinstance(default, ast.Constant):
        return default.value
    if isinstance(default, ast.Name):
        return _data()["constants"][default.id]
    name, member = ast.unparse(default).removesuffix(".value").split(".")
    if name == "torch":
        return member
    return enum(name, release)[member]
