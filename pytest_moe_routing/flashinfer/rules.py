"""FlashInfer's fused MoE kernels, release by release: `releases.yaml`, looked up.

This module knows how to read the rules, not one fact about FlashInfer.
"""

from __future__ import annotations

import inspect
from bisect import bisect_right
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from importlib import metadata
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.errors import ReleaseError
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.flashinfer import signatures
from pytest_moe_routing.flashinfer.check import check_data
from pytest_moe_routing.flashinfer.grammar import EntryPoint, KernelCall, Rule, Violation
from pytest_moe_routing.inputs import parse_release
from pytest_moe_routing.routing.methods import METHODS, RoutingMethodType
from pytest_moe_routing.routing.recipe import Recipe

DISTRIBUTION = "flashinfer-python"


@cache
def _data() -> dict[str, Any]:
    data: dict[str, Any] = read_data(__package__, "releases.yaml")
    check_data(data)
    data["rules"] = [Rule(**row) for row in data["rules"]]
    data["entry_points"] = {n: EntryPoint(**row) for n, row in data["entry_points"].items()}
    return data


def known_releases() -> list[str]:
    """Return the releases in the data, oldest first."""
    return list(_data()["releases"])


def installed_release() -> str | None:
    """Return the installed flashinfer-python, without importing it."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


#: What a rule changes in a recipe: (arguments ignored, fields overridden).
_Change = tuple[tuple[str, ...], tuple[tuple[str, Any], ...]]


@dataclass(frozen=True)
class _Kernel:
    """The rules for one method on one scheme, in one release, by what they do."""

    limits: tuple[Rule, ...]
    changes: tuple[tuple[Rule, _Change], ...]
    noted: tuple[Rule, ...]


@cache
def _rules(release: str) -> tuple[Rule, ...]:
    """Return the rules that hold in a release."""
    return tuple(rule for rule in _data()["rules"] if rule.in_force(Version(release)))


@cache
def _kernel(release: str, scheme: str, method: str) -> _Kernel:
    rules = [rule for rule in _rules(release) if rule.covers(scheme, method)]
    return _Kernel(
        limits=tuple(rule for rule in rules if rule.effect),
        changes=tuple(
            (rule, (tuple(rule.ignores), tuple(rule.recipe.items())))
            for rule in rules
            if rule.ignores or rule.recipe
        ),
        noted=tuple(rule for rule in rules if rule.note),
    )


@cache
def _entry_point(release: str, scheme: str) -> EntryPoint | None:
    entry: EntryPoint | None = _data()["entry_points"].get(scheme)
    return entry if entry and Version(entry.since) <= Version(release) else None


@cache
def _is_since(since: str, release: str) -> bool:
    return Version(since) <= Version(release)


@cache
def _honored(release: str, method: str) -> frozenset[str]:
    """Return the arguments that a method of a release honors."""
    row = METHODS.get(RoutingMethodType[method])
    ignored = {name for rule in _rules(release) if method in rule.methods for name in rule.ignores}
    return row.honors - ignored if row else frozenset()


#: The arguments of a call that its recipe depends on, besides the rules.
_BOUND = (
    *("method", "top_k", "bias", "bias_dtype", "n_group", "topk_group"),
    *("routed_scaling_factor", "weight_on", "scale_after"),
)
_arguments = attrgetter(*_BOUND)


@lru_cache(maxsize=1 << 16)
def _recipe(arguments: tuple[Any, ...], changes: tuple[_Change, ...]) -> Recipe:
    """Return the recipe of a call's method, bound to its `_BOUND` and changed by rules."""
    call = SimpleNamespace(**dict(zip(_BOUND, arguments, strict=True)))
    row = METHODS[RoutingMethodType[call.method]]
    ignored = {name for ignores, _ in changes for name in ignores}
    bound = (replace(row, honors=row.honors - ignored) if ignored else row).bind(
        top_k=call.top_k,
        bias=call.bias == "router",
        n_group=max(call.n_group, 1),
        # Kernels without groups do not look at it.
        topk_group=max(call.topk_group, 1) if call.n_group > 1 else 1,
        routed_scaling_factor=call.routed_scaling_factor,
        weight_on=call.weight_on,
    )
    overrides: dict[str, Any] = {"scale": bound.scale * call.scale_after}
    if bound.bias:
        overrides["bias_dtype"] = call.bias_dtype
    for _, overridden in changes:
        overrides.update(overridden)
    overrides = {name: value for name, value in overrides.items() if getattr(bound, name) != value}
    return replace(bound, **overrides) if overrides else bound


@dataclass(frozen=True)
class FlashInfer:
    """The kernels of one FlashInfer release.

    Attributes:
        release: The release asked for.
        judged_as: The newest known release that is not newer; its facts are used.
    """

    release: str
    judged_as: str

    @classmethod
    def of(cls, release: str | None = None) -> FlashInfer:
        """Look a release up: the given one, else the installed one, else the newest known.

        Raises:
            ReleaseError: Not a release number, or older than the oldest known release.
        """
        return _of(release or installed_release() or known_releases()[-1])

    def _in_force(self, timeline: Mapping[str, Any]) -> Any:
        """Return the newest value of a timeline up to this release; None before all of them."""
        past = [r for r in timeline if Version(r) <= Version(self.judged_as)]
        return timeline[max(past, key=Version)] if past else None

    def has(self, since: str) -> bool:
        return _is_since(since, self.judged_as)

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Names of the routing methods, in the order of their numbers."""
        return tuple(self._in_force(_data()["numbers"]))

    def number(self, method: str) -> int | None:
        """Return the number of a method in this release; None if it has none."""
        return self.methods.index(method) if method in self.methods else None

    def method(self, number: int) -> str | None:
        """Return the method that a number means in this release; None if it means none."""
        return self.methods[number] if 0 <= number < len(self.methods) else None

    def honors(self, method: str, argument: str) -> bool:
        """Return whether a method of this release honors an argument, by its name in `KernelCall`.

        Those are `bias`, `n_group`, `topk_group` and `routed_scaling_factor`.
        """
        return method in self.methods and argument in _honored(self.judged_as, method)

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """Major compute capabilities that the launchers accept."""
        return tuple(self._in_force(_data()["devices"]))

    def entry_point(self, scheme: str) -> EntryPoint | None:
        """Return the entry point that serves a scheme; None if this release has none."""
        return _entry_point(self.judged_as, scheme)

    def signature(self, function: str) -> inspect.Signature | None:
        """Return the signature of an entry point, enum members as numbers; None if it has none."""
        return signatures.signature(function, self.release)

    def recipe(self, call: KernelCall) -> Recipe:
        """Return what the kernel computes for this call; meaningful only without `violations`."""
        kernel = _kernel(self.judged_as, call.scheme, call.method)
        changes = tuple(change for rule, change in kernel.changes if rule.applies(call))
        return _recipe(_arguments(call), changes)

    def violations(self, call: KernelCall) -> list[Violation]:
        """Return the rules that the call violates, errors first."""
        if self.number(call.method) is None or call.method == "Unspecified":
            fact = f"FlashInfer {self.judged_as} has no routing method {call.method}"
            return [Violation(Rule(fact, effect="error"))]
        found = (
            rule.violation(call)
            for rule in _kernel(self.judged_as, call.scheme, call.method).limits
        )
        return sorted((v for v in found if v), key=lambda violation: not violation.is_error)

    def size_violations(self, scheme: str, num_experts: int, top_k: int) -> list[Violation]:
        """Return the errors of a launcher that is given so many experts, whatever routes."""
        call = KernelCall(scheme, "Default", num_experts, top_k, logits_dtype="float32")
        found = (
            rule.violation(call)
            for rule in _kernel(self.judged_as, scheme, call.method).limits
            if not (rule.methods or rule.when) and {*rule.require} <= {"num_experts", "top_k"}
        )
        return [each for each in found if each and each.is_error]

    @property
    def tile_rows(self) -> int:
        """What the rows of the first weights must be a multiple of, at a TRT-LLM kernel."""
        return int(_data()["tile_rows"])

    def tile_columns(self, scheme: str) -> int:
        """Return what the columns of hidden states must be a multiple of, likewise."""
        return int(_data()["tile_columns"].get(scheme, 1))

    def facts(self, call: KernelCall, about: Collection[str] | None = None) -> list[str]:
        """Return why fields of `recipe`, all or these, differ from the method's row."""
        kernel = _kernel(self.judged_as, call.scheme, call.method)
        return [
            rule.fact
            for rule, _ in kernel.changes
            if (about is None or not rule.changes.isdisjoint(about)) and rule.applies(call)
        ]

    def notes(self, call: KernelCall) -> list[str]:
        """Return what is a matter of precision in this call."""
        kernel = _kernel(self.judged_as, call.scheme, call.method)
        return [rule.note for rule in kernel.noted if rule.applies(call)]

    def __str__(self) -> str:
        as_ = "" if self.release == self.judged_as else f" (judged as {self.judged_as})"
        return f"FlashInfer {self.release}{as_}"


@cache
def _of(release: str) -> FlashInfer:
    """Look a release up once: what it has is looked up once then as well."""
    known = known_releases()
    try:
        place = bisect_right([Version(r) for r in known], parse_release(release))
    except ValueError:
        found = shorten(repr(release))
        raise ReleaseError(
            f"FlashInfer release: found {found}, expected a release such as {known[-1]}"
        ) from None
    if not place:
        raise ReleaseError(
            f"FlashInfer {release} is older than the oldest known, {known[0]}; "
            "choose another with --moe-flashinfer"
        )
    return FlashInfer(release, known[place - 1])
