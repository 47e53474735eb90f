"""FlashInfer's fused MoE kernels, release by release: `flashinfer.yaml`, looked up.

This module knows how to read the rules, not one fact about FlashInfer.
"""

from __future__ import annotations

import operator
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import metadata, resources
from typing import Any

from packaging.version import InvalidVersion, Version

from pytest_moe_routing.errors import ReleaseError
from pytest_moe_routing.routing.methods import METHODS, RoutingMethodType
from pytest_moe_routing.routing.recipe import Recipe

DISTRIBUTION = "flashinfer-python"


@dataclass(frozen=True)
class KernelCall:
    """The routing arguments that reach a fused kernel.

    Attributes:
        backend: Whose entry point is called, e.g. `fp8_block`.
        method: Name of the routing method.
        n_group, topk_group: As passed; 0 stands for None as well.
        bias: What is passed as routing bias: `none`, `zeros` or the `router`'s own.
        weight_on: `input` when the routing scales are applied on the input.
    """

    backend: str
    method: str
    num_experts: int
    top_k: int
    logits_dtype: str
    n_group: int = 0
    topk_group: int = 0
    bias: str = "none"
    bias_dtype: str = "float32"
    routed_scaling_factor: float = 1.0
    weight_on: str = "output"

    @property
    def group_size(self) -> int:
        return self.num_experts // max(self.n_group, 1)

    @property
    def kept_experts(self) -> int:
        return max(self.topk_group, 1) * self.group_size


_OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
_TEST = re.compile(r"(==|!=|<=|>=|<|>|%|in:)(\S+)")


def _holds(call: KernelCall, name: str, condition: str) -> bool:
    """Whether `name` of the call meets every part of a condition such as `>=1 <=n_group`."""
    value = getattr(call, name)
    for sign, operand in _TEST.findall(condition):
        if sign == "in:":
            met = value in operand.split(",")
        else:
            other = getattr(call, operand, operand)
            if isinstance(value, int):
                other = int(other)
            met = value % other == 0 if sign == "%" else _OPERATORS[sign](value, other)
        if not met:
            return False
    return True


@dataclass(frozen=True)
class Rule:
    """One row of `flashinfer.yaml`; its header explains the fields."""

    fact: str
    since: str = "0"
    until: str = ""
    backends: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    when: Mapping[str, str] = field(default_factory=dict)
    require: Mapping[str, str] = field(default_factory=dict)
    effect: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    note: str = ""

    def in_force(self, release: Version) -> bool:
        return Version(self.since) <= release and (not self.until or release < Version(self.until))

    def concerns(self, call: KernelCall) -> bool:
        return (
            (not self.backends or call.backend in self.backends)
            and (not self.methods or call.method in self.methods)
            and all(_holds(call, name, test) for name, test in self.when.items())
        )

    def broken(self, call: KernelCall) -> str | None:
        """How the call breaks this rule, in words; None when it does not."""
        if not self.effect or not self.concerns(call):
            return None
        if not self.require:
            return self.fact
        for name, test in self.require.items():
            if not _holds(call, name, test):
                return f"{name} is {getattr(call, name)}, not {test}: {self.fact}"
        return None


@dataclass(frozen=True)
class EntryPoint:
    """A fused MoE function, as one backend uses it."""

    function: str
    since: str
    weight_on: tuple[str, ...]
    multiple_of: int
    activations: Mapping[str, str]


@cache
def _data() -> dict[str, Any]:
    import yaml

    text = resources.files(__package__).joinpath("flashinfer.yaml").read_text("utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    data["rules"] = [Rule(**row) for row in data["rules"]]
    data["entry_points"] = {n: EntryPoint(**row) for n, row in data["entry_points"].items()}
    return data


def known_releases() -> list[str]:
    """The releases in the data, oldest first."""
    return list(_data()["releases"])


def installed_release() -> str | None:
    """The installed flashinfer-python, without importing it."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return None


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
        known = known_releases()
        release = release or installed_release() or known[-1]
        try:
            place = bisect_right([Version(r) for r in known], Version(release))
        except InvalidVersion:
            raise ReleaseError(
                f"FlashInfer release: found {release!r}, expected a number such as {known[-1]}"
            ) from None
        if not place:
            raise ReleaseError(f"FlashInfer {release} is older than the oldest known, {known[0]}")
        return cls(release, known[place - 1])

    @cached_property
    def _rules(self) -> list[Rule]:
        return [rule for rule in _data()["rules"] if rule.in_force(Version(self.judged_as))]

    def _in_force(self, timeline: Mapping[str, Any]) -> Any:
        """The newest value of a timeline that is not newer than this release; None before all."""
        past = [r for r in timeline if Version(r) <= Version(self.judged_as)]
        return timeline[max(past, key=Version)] if past else None

    def has(self, since: str) -> bool:
        return Version(since) <= Version(self.judged_as)

    @property
    def methods(self) -> tuple[str, ...]:
        """Names of the routing methods, in the order of their numbers."""
        return tuple(self._in_force(_data()["numbers"]))

    def number(self, method: str) -> int | None:
        """The number of a method in this release; None when it has none."""
        return self.methods.index(method) if method in self.methods else None

    def method(self, number: int) -> str | None:
        """The method that a number means in this release; None when it means none."""
        return self.methods[number] if 0 <= number < len(self.methods) else None

    def honours(self, method: str, argument: str) -> bool:
        """Whether a method of this release heeds an argument: `scale`, `bias`, `n_group`."""
        if method not in self.methods:
            return False
        row = METHODS.get(RoutingMethodType[method])
        ignored = {name for rule in self._rules if method in rule.methods for name in rule.ignores}
        return row is not None and argument in row.honours - ignored

    @property
    def devices(self) -> tuple[int, ...]:
        """Major compute capabilities that the launchers accept."""
        return tuple(self._in_force(_data()["devices"]))

    def entry_point(self, backend: str) -> EntryPoint | None:
        """The entry point that serves a backend's scheme; None when this release has none."""
        entry: EntryPoint | None = _data()["entry_points"].get(backend)
        return entry if entry and self.has(entry.since) else None

    def recipe(self, call: KernelCall) -> Recipe:
        """What the kernel computes when called so; meaningful only if it is not `refused`."""
        method = METHODS[RoutingMethodType[call.method]]
        ignored: set[str] = set()
        overrides: dict[str, Any] = {}
        for rule in self._rules:
            if rule.concerns(call):
                ignored.update(rule.ignores)
                overrides.update(rule.recipe)
        bound = replace(method, honours=method.honours - ignored).bind(
            top_k=call.top_k,
            bias=call.bias == "router",
            n_group=max(call.n_group, 1),
            topk_group=max(call.topk_group, 1),
            scale=call.routed_scaling_factor,
            weight_on=call.weight_on,
        )
        if bound.bias:
            overrides = {"bias_dtype": call.bias_dtype, **overrides}
        return replace(bound, **overrides)

    def troubles(self, call: KernelCall) -> list[tuple[str, str]]:
        """Rules that the call breaks, as (`error` or `garbage`, in words), errors first."""
        if self.number(call.method) is None or call.method == "Unspecified":
            return [("error", f"FlashInfer {self.judged_as} has no routing method {call.method}")]
        found = [(rule.effect, how) for rule in self._rules if (how := rule.broken(call))]
        return sorted(found, key=lambda trouble: trouble[0])

    def facts(self, call: KernelCall) -> list[str]:
        """Why `recipe` is not the method's row of the newest release."""
        rules = [rule for rule in self._rules if rule.recipe or rule.ignores]
        return [rule.fact for rule in rules if rule.concerns(call)]

    def notes(self, call: KernelCall) -> list[str]:
        """What is a matter of precision in this call."""
        return [rule.note for rule in self._rules if rule.note and rule.concerns(call)]

    def __str__(self) -> str:
        as_ = "" if self.release == self.judged_as else f" (judged as {self.judged_as})"
        return f"FlashInfer {self.release}{as_}"
