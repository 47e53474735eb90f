"""The conditions in which rules about FlashInfer are written, and the calls that they judge."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, get_type_hints

from packaging.version import Version

from pytest_moe_routing.routing.methods import FIELDS


@dataclass(frozen=True)
class KernelCall:
    """The routing arguments that reach a fused kernel.

    Attributes:
        scheme: Whose entry point is called, e.g. `fp8_block`.
        method: Name of the routing method.
        n_group, topk_group: As passed; 0 stands for None as well.
        bias: What is passed as routing bias: `none`, `zeros` or the `router`'s own.
        weight_on: `input` when the routing scales are applied on the input.
        scale_after: What the layer multiplies the kernel's output by.
    """

    scheme: str
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
    scale_after: float = 1.0

    @property
    def group_size(self) -> int:
        return self.num_experts // max(self.n_group, 1)

    @property
    def kept_experts(self) -> int:
        return max(self.topk_group, 1) * self.group_size

    def __str__(self) -> str:
        """Write the method with the arguments that are not its defaults."""
        arguments = []
        if self.n_group:
            arguments += [f"n_group={self.n_group}", f"topk_group={self.topk_group}"]
        if self.bias == "zeros":
            arguments.append("bias=zeros")
        if self.routed_scaling_factor != 1.0:
            arguments.append(f"routed_scaling_factor={self.routed_scaling_factor:g}")
        if self.weight_on == "input":
            arguments.append("use_routing_scales_on_input=True")
        return f"{self.method}({', '.join(arguments)})"


#: Names that conditions may use, and those of them that are numbers.
_PROPERTIES = {"group_size", "kept_experts"}


_NAMES = {f.name for f in fields(KernelCall)} | _PROPERTIES


_NUMBERS = {n for n, t in get_type_hints(KernelCall).items() if t in (int, float)} | _PROPERTIES


_OPERATORS: Mapping[str, Callable[[Any, Any], bool]] = {
    "%": lambda value, divisor: bool(divisor) and value % divisor == 0,
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}


CONDITION_TEST = re.compile(r"(==|!=|<=|>=|<|>|%|in:)(\S+)")


_WORDS: Mapping[str, str] = {
    "%": "a multiple of ",
    "==": "",
    "!=": "any value but ",
    "<=": "at most ",
    ">=": "at least ",
    "<": "less than ",
    ">": "more than ",
    "in:": "",
}


def in_words(condition: str) -> str:
    """Return a condition as a person reads it: `at least 1 and at most n_group`."""
    return " and ".join(
        _WORDS[sign] + operand.replace(",", " or ")
        for sign, operand in CONDITION_TEST.findall(condition)
    )


_Test = Callable[[KernelCall], bool]


def _test(name: str, sign: str, operand: str) -> _Test:
    """Whether `name` of a call meets one part of a condition, such as `<=n_group`."""
    value = operator.attrgetter(name)
    if sign == "in:":
        members = frozenset(operand.split(","))
        return lambda call: value(call) in members
    compare = _OPERATORS[sign]
    if operand in _NAMES:
        other = operator.attrgetter(operand)
        return lambda call: compare(value(call), other(call))
    constant = float(operand) if name in _NUMBERS else operand
    return lambda call: compare(value(call), constant)


def _tests(conditions: Mapping[str, str]) -> tuple[tuple[str, _Test], ...]:
    """Conditions by name, each as (name, whether all its parts hold)."""

    def every(parts: list[_Test]) -> _Test:
        return parts[0] if len(parts) == 1 else lambda call: all(part(call) for part in parts)

    return tuple(
        (name, every([_test(name, *part) for part in CONDITION_TEST.findall(condition)]))
        for name, condition in conditions.items()
    )


@dataclass(frozen=True)
class Rule:
    """One row of `releases.yaml`; its header explains the fields."""

    fact: str
    since: str = "0"
    until: str = ""
    schemes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    when: Mapping[str, str] = field(default_factory=dict)
    require: Mapping[str, str] = field(default_factory=dict)
    effect: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    ignores: tuple[str, ...] = ()
    note: str = ""

    def in_force(self, release: Version) -> bool:
        return Version(self.since) <= release and (not self.until or release < Version(self.until))

    @property
    def changes(self) -> frozenset[str]:
        """The fields of the method's recipe that it changes."""
        return frozenset(self.recipe) | {FIELDS[argument] for argument in self.ignores}

    def covers(self, scheme: str, method: str) -> bool:
        """Whether calls of this method on this scheme can be concerned at all."""
        return (not self.schemes or scheme in self.schemes) and (
            not self.methods or method in self.methods
        )

    @cached_property
    def _when(self) -> tuple[tuple[str, _Test], ...]:
        return _tests(self.when)

    @cached_property
    def _require(self) -> tuple[tuple[str, _Test], ...]:
        return _tests(self.require)

    def applies(self, call: KernelCall) -> bool:
        """Whether a call that it covers meets `when`."""
        return all(test(call) for _, test in self._when)

    def violation(self, call: KernelCall) -> Violation | None:
        """How a call that it covers violates this rule; None if it does not."""
        if not self.effect or not self.applies(call):
            return None
        for name, test in self._require:
            if not test(call):
                return Violation(self, name, self.require[name], getattr(call, name))
        return None if self.require else Violation(self)


@dataclass(frozen=True)
class Violation:
    """A rule that a call violates.

    Attributes:
        field: The field of the call that does not meet `required`; empty if the rule excludes the
            call as a whole.
        found: The value of that field.
    """

    rule: Rule
    field: str = ""
    required: str = ""
    found: str | int | float | None = None

    @property
    def is_error(self) -> bool:
        """Whether the launcher rejects the call; otherwise the kernel computes garbage."""
        return self.rule.effect == "error"

    def __str__(self) -> str:
        if not self.field:
            return self.rule.fact
        return f"{self.field} is {self.found}, expected {in_words(self.required)}: {self.rule.fact}"


@dataclass(frozen=True)
class EntryPoint:
    """What a release's fused MoE function does for one scheme; `schemes.py` names the function.

    The header of `releases.yaml` explains the fields.
    """

    since: str
    weight_on: tuple[str, ...]
    multiple_of: int
    activations: Mapping[str, str]
    activation_limit: Mapping[str, str] = field(default_factory=dict)
    float32_weights: str = ""
