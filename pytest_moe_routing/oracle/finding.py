"""What is wrong with a decision or a kernel call, as values. `report.text` makes the sentences."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from math import isfinite
from typing import Any, Self

from pytest_moe_routing.models.spec import MOST_APART

#: What a finding may hold: plain data, so that it travels as JSON.
Value = str | int | float | bool | None


class Kind(StrEnum):
    """What a finding is about, and so what its fields mean."""

    #: A field of the recipe: the router has `wanted`, the kernel computes `got`.
    RECIPE = "recipe"
    #: An argument of the call: the layer has `wanted`, the kernel receives `got`.
    ARGUMENT = "argument"
    #: `field` of the call is `got`, and a rule of the launcher or the kernel requires `wanted`.
    LIMIT = "limit"
    #: The number that the target passes for the method `field` means `got` in FlashInfer.
    ENUM = "enum"
    #: The target's code raised the exception `field` with the message `got`, at `where`.
    RAISED = "raised"
    #: The layer applies `field` as `wanted` says, the target's steps as `got` says.
    APPLIED = "applied"
    #: The layer adds `field` to its output as `wanted` says, the target's code as `got` says.
    ADDED = "added"
    #: The layer's config has `got` as `field`, where the model's code requests `wanted`.
    CONFIG = "config"
    #: The selector `field` takes experts although their gates `got` reject the layer.
    CHOICE = "choice"
    #: The kernel reads tensors (`field`) that lie otherwise, as `got` says; or the flag `field` of
    #: the call is `wanted`, and the weights are `got`.
    LAYOUT = "layout"
    #: An argument is less precise (`got`) than the layer (`wanted`).
    DOWNCAST = "downcast"
    #: The experts have the activation `wanted`, and get `got`, which is nearly the same (`NEARLY`
    #: of `models.spec`). `fact` says by how much they differ.
    NEARLY = "nearly"
    #: A matter of precision in the kernel itself, told by `fact`.
    PRECISION = "precision"


#: A file and a line as `Finding.where` has them, where it names both.
_SOURCE = re.compile(r"[\w./-]+\.py:[0-9]+")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        field: The field, argument, method or exception that the finding is about.
        wanted, got: What is right, and what is there instead.
        where: The place in the target's code or the way to the kernel, if it is known.
        fact: What is known about the FlashInfer release that explains the finding.
        raised_in: Of an exception, its type, and file and name of the function that raised it.
        switches: The flags with which a server takes the way to the kernel; empty for those that
            each server takes.
    """

    kind: Kind
    field: str
    wanted: Value = None
    got: Value = None
    where: str = ""
    fact: str = ""
    raised_in: str = ""
    switches: str = ""

    @property
    def cause(self) -> tuple[str, str, str]:
        """What findings of one cause share: neither numbers nor the model."""
        return self.kind.value, self.raised_in or self.field, self.fact

    @property
    def id(self) -> str:
        """What it is about, as ids of causes have it: without values, messages and lines.

        What is applied or added is told by where and how often: that is no value of a model.
        """
        about = f"{self.kind}-{self.raised_in or self.field}"
        words = str(self.got) if self.kind in (Kind.APPLIED, Kind.ADDED) else ""
        return f"{about}-{words}" if words and not re.search("[0-9]", words) else about

    def as_dict(self) -> dict[str, Any]:
        """As JSON has it, which knows no infinite number: such a value is text."""
        values = {name: value for name, value in asdict(self).items() if value not in (None, "")}
        return {
            name: f"{value:.6g}" if isinstance(value, float) and not isfinite(value) else value
            for name, value in values.items()
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Read `as_dict`.

        Raises:
            KeyError, ValueError, TypeError: The data is not a finding.
        """
        return cls(**{**data, "kind": Kind(data["kind"])})


#: The router reads a bias that no weights of a checkpoint fill.
NOT_LOADED = Finding(
    Kind.ARGUMENT,
    "bias",
    "the checkpoint's",
    "a copy that was made before the checkpoint's weights are loaded",
)


def nearly(wanted: str, got: str, where: str = "") -> Finding:
    """Return that experts get another activation that is nearly their own."""
    fact = f"the two differ by at most {MOST_APART:g}"
    return Finding(Kind.NEARLY, "activation", wanted, got, where, fact)


def are_slight(findings: Iterable[Finding]) -> bool:
    """Return whether all that is wrong changes next to nothing."""
    return {finding.kind for finding in findings} == {Kind.NEARLY}


def source_of(findings: Iterable[Finding]) -> str:
    """Return the first file and line that findings name; empty if none does."""
    places = (match[0] for finding in findings if (match := _SOURCE.search(finding.where)))
    return next(places, "")


def at_line(where: str, record: Mapping[str, Any]) -> str:
    """Return the way to a call, followed by its file and line if they were recorded (`at`)."""
    return ", ".join(filter(None, (where, record.get("at"))))


def switches_of(findings: Iterable[Finding]) -> tuple[str, ...]:
    """Return the flags without which nothing of this would be wrong; none if something would."""
    needed = {finding.switches for finding in findings}
    return () if "" in needed else tuple(sorted(needed))


def distinct(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Yield each finding once, at the first place that has it."""
    seen = set()
    for finding in findings:
        what = replace(finding, where="", switches="")
        if what not in seen:
            seen.add(what)
            yield finding


def number_of_tokens(tokens: int) -> str:
    """Return which call is meant, of those that differ in their number of tokens."""
    return f"with {tokens} token{'s' * (tokens > 1)}"


def only_with(
    tokens: int, findings: Iterable[Finding], others: Iterable[Finding]
) -> Iterator[Finding]:
    """Yield findings about a call with so many tokens, but none that is among others.

    Those are about calls with another number of tokens, so the number is part of what is wrong.
    """
    known = {replace(finding, where="") for finding in others}
    count = number_of_tokens(tokens)
    for finding in findings:
        if replace(finding, where="") not in known:
            got = "none" if finding.got is None else finding.got
            shown = f"{got:.6g}" if isinstance(got, float) else got
            yield replace(finding, got=f"{shown} ({count})")
