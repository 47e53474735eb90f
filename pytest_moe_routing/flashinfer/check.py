"""`releases.yaml` is checked when read: a slip in a rule must not become a wrong verdict."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields, replace
from typing import Any

from packaging.version import Version

from pytest_moe_routing.errors import DataError, RecipeError
from pytest_moe_routing.flashinfer import signatures
from pytest_moe_routing.flashinfer.grammar import CONDITION_TEST, EntryPoint, KernelCall, Rule
from pytest_moe_routing.models.spec import ACTIVATIONS, DTYPES
from pytest_moe_routing.routing.methods import FIELDS, METHODS, RoutingMethodType
from pytest_moe_routing.routing.recipe import Recipe
from pytest_moe_routing.schemes import SERVED_SCHEMES, kernel_of

_PROPERTIES = inspect.getmembers(KernelCall, lambda member: isinstance(member, property))
#: What conditions may speak of.
_NAMES = {f.name for f in fields(KernelCall)} | {name for name, _ in _PROPERTIES}
_WORDS = {
    "bias": ("none", "zeros", "router"),
    "weight_on": ("output", "input"),
    "logits_dtype": DTYPES,
    "bias_dtype": DTYPES,
}


def check_data(data: Mapping[str, Any]) -> None:
    """Raise `DataError`, naming the place, if anything in the data cannot be."""
    releases = data["releases"]
    if releases != sorted(releases, key=Version):
        raise DataError("releases.yaml, releases: expected oldest first")
    for turn, methods in data["numbers"].items():
        where = f"numbers at {turn}"
        _each(where, "release", [turn], releases)
        _each(where, "method", methods, RoutingMethodType.__members__)
    for turn in data["devices"]:
        _each("devices", "release", [turn], releases)
    for scheme, row in data["entry_points"].items():
        _check_entry_point(f"entry point of {scheme}", scheme, row, releases)
    facts = set()
    for place, row in enumerate(data["rules"], 1):
        where = f"rule {place} ({row.get('fact', 'no fact')})"
        _check_rule(where, row, releases, data["entry_points"])
        _each(where, "fact", [row["fact"]], () if row["fact"] in facts else [row["fact"]])
        facts.add(row["fact"])


def _each(where: str, what: str, found: Iterable[Any], valid: Iterable[Any]) -> None:
    known = list(valid)
    for value in found:
        if value not in known:
            expected = f"one of {', '.join(map(str, known))}" if known else "one of its own"
            raise DataError(f"releases.yaml, {where}: found {what} {value!r}, expected {expected}")


def _fields(where: str, row: Mapping[str, Any], cls: type) -> None:
    _each(where, "field", row, [f.name for f in fields(cls)])
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING and f.name not in row:
            raise DataError(f"releases.yaml, {where}: has no {f.name}")


def _check_entry_point(
    where: str, scheme: str, row: Mapping[str, Any], releases: list[str]
) -> None:
    _each("entry points", "scheme", [scheme], SERVED_SCHEMES)
    kernel = kernel_of(scheme)
    _fields(where, row, EntryPoint)
    _each(where, "release", [row["since"], *row["activations"].values()], releases)
    limits = row.get("activation_limit", {})
    _each(where, "release", limits.values(), releases)
    if "float32_weights" in row:
        _each(where, "release", [row["float32_weights"]], releases)
    _each(where, "clamped activation", limits, row["activations"])
    _each(where, "activation", row["activations"], ACTIVATIONS)
    _each(where, "weight side", row["weight_on"], _WORDS["weight_on"])
    _each(where, "activation of schemes.py", kernel.activations, row["activations"])
    _each(where, "function", [kernel.function()], signatures.functions(row["since"]))


def _check_rule(
    where: str, row: Mapping[str, Any], releases: list[str], schemes: Iterable[str]
) -> None:
    _fields(where, row, Rule)
    _each(where, "release", [row[k] for k in ("since", "until") if k in row], releases)
    _each(where, "scheme", row.get("schemes", ()), schemes)
    _each(where, "method", row.get("methods", ()), RoutingMethodType.__members__)
    _each(where, "recipe field", row.get("recipe", ()), [f.name for f in fields(Recipe)])
    if "ignores" in row or "recipe" in row:
        _check_change(where, row)
    if "effect" in row:
        _each(where, "effect", [row["effect"]], ("error", "garbage"))
    elif "require" in row or not row.keys() & {"recipe", "ignores", "note"}:
        raise DataError(f"releases.yaml, {where}: has no effect")
    for part in ("when", "require"):
        for name, condition in row.get(part, {}).items():
            _each(where, f"name in {part}", [name], _NAMES)
            _check_condition(f"{where}, {part} {name}", name, condition)


def _check_change(where: str, row: Mapping[str, Any]) -> None:
    """Raise `DataError` unless a rule changes what each of its methods computes."""
    if not row.get("methods"):
        raise DataError(f"releases.yaml, {where}: has no methods, whose recipe it would change")
    ignored = set(row.get("ignores", ()))
    _each(where, "argument", ignored, FIELDS)
    for name in row["methods"]:
        method = METHODS.get(RoutingMethodType[name])
        if method is None:
            raise DataError(f"releases.yaml, {where}: {name} has no recipe to change")
        if ignored - method.honors:
            extra = ", ".join(sorted(ignored - method.honors))
            raise DataError(f"releases.yaml, {where}: {name} ignores {extra} in all releases")
        # A limit to some of one group means nothing.
        if len(ignored & {"n_group", "topk_group"}) == 1:
            raise DataError(
                f"releases.yaml, {where}: found one of n_group and topk_group in ignores, "
                "expected both or none"
            )
        try:
            changed = replace(method.recipe, **row.get("recipe", {}))
        except (RecipeError, TypeError) as error:
            raise DataError(f"releases.yaml, {where}: {error}") from None
        # What a call sets, such as the dtype of its bias, is no field of the method's own.
        if row.get("recipe") and changed == method.recipe:
            raise DataError(f"releases.yaml, {where}: the recipe of {name} has these fields anyway")


def _check_condition(where: str, name: str, condition: object) -> None:
    if not isinstance(condition, str) or not condition or CONDITION_TEST.sub("", condition).strip():
        raise DataError(f"releases.yaml, {where}: found {condition!r}, expected such as '<=8'")
    for sign, operand in CONDITION_TEST.findall(condition):
        if name in _WORDS:
            _each(where, "operator", [sign], ("==", "!=", "in:"))
            _each(where, "value", operand.split(","), _WORDS[name])
        elif sign == "in:" or not (operand.isdigit() or operand in _NAMES):
            raise DataError(
                f"releases.yaml, {where}: found {sign}{operand}, expected a number or a name"
            )
