"""Checks the answers of a child process against the types that its questions have.

A type is written as in an annotation: `dict[str, int]`, `list[str]`, `str | None`, `float` (which
an integer is as well), `tuple[str, bool, str]` (a list of exactly these), a `TypedDict`, `Any`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import NoneType, UnionType
from typing import (
    Any,
    NotRequired,
    Required,
    TypedDict,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from pytest_moe_routing.escape import shorten

#: Returns what is wrong with a value, without its place; None if it is of the type.
_Check = Callable[[Any], str | None]


class _Response(TypedDict):
    answer: str
    why: str
    switches: list[str]


class RequestAnswer(_Response, total=False):
    """What becomes of a request around routing; see `oracle.around`."""

    source: str
    raised_in: str


class RuleAnswer(TypedDict):
    """Which code keeps a kernel from a model; see `oracle.target.Rule`."""

    name: str
    source: str
    instead: str


class _Taken(TypedDict):
    experts: str
    name: str
    device: str
    requested: bool
    placements: list[str]


class PlacementsAnswer(TypedDict):
    """Where experts of FlashInfer are taken; see `oracle.placed.Placements`."""

    taken: list[_Taken]
    flags: dict[str, list[str]]
    requests: dict[str, str]
    compared: list[str]


class AcceptedKeysAnswer(TypedDict):
    """Which quantization keys experts accept; see `oracle.accepted_keys.AcceptedKeys`."""

    name: str
    keys: list[str]
    accepted: dict[str, list[list[str]]]
    function: str
    source: str


class MisnamedAnswer(TypedDict):
    """A weight that code loads into another matrix's place; see `oracle.misnamed`."""

    name: str
    own: str
    place: str
    line: int
    file: str
    function: str


class TakenIn(TypedDict):
    """The cases in which a class of experts is taken, by their places."""

    experts: str
    device: str
    way: str
    cases: list[int]


class _Choice(TypedDict):
    score: str
    normalize: str
    top_k: int
    rounded: str


class _MethodRouted(TypedDict):
    accepted: bool
    calls: list[_Choice]
    unknown: str


class RouterAnswer(TypedDict):
    """How monolithic experts route; see `oracle.taken.Router`."""

    experts: str
    gate: str
    source: str
    num_experts: int
    top_k: int
    methods: dict[str, _MethodRouted]


class TakenExpertsAnswer(TypedDict):
    """Which class of experts is taken in each case; see `oracle.taken.TakenExperts`."""

    taken: list[TakenIn]
    kept_out: list[TakenIn]
    preceded: list[TakenIn]
    switches: dict[str, list[str]]
    routers: list[RouterAnswer]
    elsewhere: list[str]
    unasked: dict[str, list[int]]
    without_splits: str


class KeptAnswer(TypedDict):
    """What keeps a class of experts from a model; see `oracle.taken.Kept`."""

    exists: bool
    is_gate: bool
    name: str
    source: str


class ServedAnswer(TypedDict):
    """What serves a checkpoint; see `oracle.checkpoints.Served`."""

    name: str
    method: str
    schemes: list[str]
    keys: list[str]
    source: str
    rejection: str
    rejected_in: str


def problem(hint: Any, value: object, where: str = "the answer") -> str | None:
    """Return what is wrong with a value that JSON had; None if it is of the type."""
    found = _check(hint)(value)
    return None if found is None else where + found


@cache
def _check(hint: Any) -> _Check:
    """Return the check of a type, which is made once: a run checks ten thousands of answers."""
    if hint is Any:
        return _accept
    options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    checks = [(_kinds(option), _check_within(option)) for option in options]
    expected = " or ".join(map(_name, options))

    def check(value: Any) -> str | None:
        first = None
        for kinds, check_within in checks:
            if type(value) in kinds:
                found = check_within(value)
                if found is None:
                    return None
                first = first or found
        return first or f" is {shorten(repr(value))}, expected {expected}"

    return check


def _accept(_value: Any) -> None:
    """Find nothing wrong."""


def _kind(hint: Any) -> Any:
    return dict if is_typeddict(hint) else get_origin(hint) or hint


def _kinds(hint: Any) -> tuple[type, ...]:
    """Return the types that JSON has for a type, a bool being no integer."""
    kind = _kind(hint)
    return {tuple: (list,), float: (float, int), None: (NoneType,)}.get(kind, (kind,))


def _check_within(hint: Any) -> _Check:
    """Return the check of what a value of the right kind contains."""
    of = get_args(hint)
    if is_typeddict(hint):
        return _check_keys(hint)
    if get_origin(hint) is dict:
        return _check_values(_check(of[1]))
    if get_origin(hint) is list:
        return _check_items(_check(of[0]))
    if get_origin(hint) is tuple:
        return _check_places([_check(kind) for kind in of])
    return _accept


def _check_keys(hint: Any) -> _Check:
    checks = {key: _check(of) for key, of in get_type_hints(hint).items()}
    required = _required_keys(hint)

    def check(value: Any) -> str | None:
        if missing := required - value.keys():
            return f" has no {', '.join(sorted(missing))}"
        for key, item in value.items():
            if key in checks and (found := checks[key](item)) is not None:
                return f".{key}{found}"
        return None

    return check


def _required_keys(hint: Any) -> set[str]:
    """Return the keys that a value must have.

    `__required_keys__` alone misses `Required` and `NotRequired` in annotations that are text, as
    all are in modules that import `annotations`.
    """
    marks = {key: get_origin(of) for key, of in get_type_hints(hint, include_extras=True).items()}
    usual = hint.__required_keys__
    return {k for k, m in marks.items() if m is Required or (k in usual and m is not NotRequired)}


def _check_values(check_one: _Check) -> _Check:
    def check(value: Any) -> str | None:
        for key, item in value.items():
            if (found := check_one(item)) is not None:
                return f".{shorten(key)}{found}"
        return None

    return check


def _check_items(check_one: _Check) -> _Check:
    def check(value: Any) -> str | None:
        for place, item in enumerate(value):
            if (found := check_one(item)) is not None:
                return f"[{place}]{found}"
        return None

    return check


def _check_places(checks: Sequence[_Check]) -> _Check:
    def check(value: Any) -> str | None:
        if len(checks) != len(value):
            return f" has {len(value)} items, expected {len(checks)}"
        for place, (check_one, item) in enumerate(zip(checks, value, strict=True)):
            if (found := check_one(item)) is not None:
                return f"[{place}]{found}"
        return None

    return check


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
    return _NAMES.get(_kind(hint), str(hint))
