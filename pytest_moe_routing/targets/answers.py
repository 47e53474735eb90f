"""Checks the answers of a child process against the types that its questions have.

A type is written as in an annotation: `dict[str, int]`, `list[str]`, `str | None`, `float` (which
an integer is as well), `tuple[str, bool, str]` (a list of exactly these), a `TypedDict`, `Any`.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints, is_typeddict

from pytest_moe_routing.escape import shorten


def problem(hint: Any, value: object, where: str = "the answer") -> str | None:
    """Return what is wrong with a value that JSON had; None if it is of the type."""
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if any(_is_kind(option, value) for option in options):
        fitting = [option for option in options if _is_kind(option, value)]
        found = [_problem_within(option, value, where) for option in fitting]
        return None if None in found else found[0]
    expected = " or ".join(map(_name, options))
    return f"{where} is {shorten(repr(value))}, expected {expected}"


def _is_kind(hint: Any, value: object) -> bool:
    kind = dict if is_typeddict(hint) else get_origin(hint) or hint
    if kind is Any:
        return True
    if kind is tuple:
        kind = list
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _problem_within(hint: Any, value: Any, where: str) -> str | None:
    if is_typeddict(hint):
        if missing := hint.__required_keys__ - value.keys():
            return f"{where} has no {', '.join(sorted(missing))}"
        hints = get_type_hints(hint)
        parts = [
            (hints[key], item, f"{where}.{key}") for key, item in value.items() if key in hints
        ]
    elif get_origin(hint) is dict:
        of = get_args(hint)[1]
        parts = [(of, item, f"{where}.{shorten(key)}") for key, item in value.items()]
    elif get_origin(hint) is list:
        of = get_args(hint)[0]
        parts = [(of, item, f"{where}[{place}]") for place, item in enumerate(value)]
    elif get_origin(hint) is tuple:
        kinds = get_args(hint)
        if len(kinds) != len(value):
            return f"{where} has {len(value)} items, expected {len(kinds)}"
        parts = [
            (kind, item, f"{where}[{n}]")
            for n, (kind, item) in enumerate(zip(kinds, value, strict=True))
        ]
    else:
        return None
    found = (problem(*part) for part in parts)
    return next((text for text in found if text is not None), None)


_NAMES = {
    str: "text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    NoneType: "null",
    None: "null",
}


def _name(hint: Any) -> str:
    return _NAMES.get(dict if is_typeddict(hint) else get_origin(hint) or hint, str(hint))
