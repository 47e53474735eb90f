"""Records of a run: one per verdict, and one per test that says something else. Plain data.

A record is what travels: from xdist's workers to the terminal, from one runner to another as a line
of JSON, from a run to a report. `docs/report.schema.json` describes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import StrEnum
from functools import cache, cached_property
from types import UnionType
from typing import Any, ClassVar, Self, get_args, get_origin, get_type_hints

from pytest_moe_routing.escape import shorten
from pytest_moe_routing.oracle.finding import Finding
from pytest_moe_routing.oracle.verdict import Verdict


class Reach(StrEnum):
    """Who can meet a verdict, from everybody to nobody."""

    PUBLISHED = "a published checkpoint"
    OWN = "the checkpoint of this config"
    PRODUCIBLE = "a checkpoint that anyone could produce"
    OPT_IN = "only with an opt-in switch"
    NO_MODEL = "no known model"


@dataclass(frozen=True)
class Known:
    """The entry of a ledger that a failure matches."""

    reason: str
    link: str


class _Record:
    """Reading and writing of records as plain data."""

    KIND: ClassVar[str]
    #: The fields that say what a record is about; there is one record for each.
    ABOUT: ClassVar[tuple[str, ...]]

    @property
    def key(self) -> tuple[str, ...]:
        return (self.KIND, *(str(getattr(self, name)) for name in self.ABOUT))

    def as_dict(self) -> dict[str, Any]:
        """Return the record as JSON, its kind first."""
        return {"kind": self.KIND} | {
            f.name: _plain(getattr(self, f.name))
            for f in fields(self)  # type: ignore[arg-type]
        }

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """Read `as_dict`; keys of later versions are ignored.

        Raises:
            ValueError: A key is missing, or has a value of another type; names the key.
        """
        hints, values = _hints(cls), {}  # type: ignore[arg-type]
        for f in fields(cls):  # type: ignore[arg-type]
            if f.name not in data:
                if f.default is MISSING and f.default_factory is MISSING:
                    raise ValueError(f"the key {f.name!r} is missing")
                continue
            try:
                values[f.name] = _parse(hints[f.name], data[f.name])
            except (TypeError, ValueError, KeyError) as error:
                found = shorten(repr(data[f.name]))
                raise ValueError(f"{f.name}: found {found}, expected {error}") from None
        return cls(**values)


@cache
def _hints(cls: Any) -> dict[str, Any]:
    """Return the types of a kind's fields, cached: a run reads thousands of records."""
    return get_type_hints(cls)


def _plain(value: Any) -> Any:
    """Convert a field to JSON, without the tuples and enums that xdist does not carry."""
    if isinstance(value, Finding):
        return {name: _plain(part) for name, part in value.as_dict().items()}
    if isinstance(value, Known):
        return asdict(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value.value if isinstance(value, StrEnum) else value


def _parse(hint: Any, value: Any) -> Any:
    """Convert a JSON value to the type of a field.

    Raises:
        TypeError, ValueError, KeyError: The value does not fit; the message is what would.
    """
    if isinstance(hint, UnionType):
        options = [option for option in get_args(hint) if option is not type(None)]
        return None if value is None else _parse(options[0], value)
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError("a list")
        return tuple(_parse(get_args(hint)[0], item) for item in value)
    if hint in (Known, Finding):
        if not isinstance(value, dict):
            raise TypeError("a mapping")
        if hint is Finding:
            return Finding.of(value)
        if not all(isinstance(value.get(name), str) for name in ("reason", "link")):
            raise TypeError("a reason and a link")
        return Known(value["reason"], value["link"])
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        if value not in list(hint):
            raise ValueError(f"one of {', '.join(hint)}")
        return hint(value)
    if get_origin(hint) is dict or hint is dict:
        if not isinstance(value, dict):
            raise TypeError("a mapping")
        return value
    if not isinstance(value, hint) or isinstance(value, bool) != (hint is bool):
        raise TypeError({str: "text", int: "an integer", bool: "true or false"}[hint])
    return value


@dataclass(frozen=True)
class VerdictRecord(_Record):
    """One verdict, with everything that led to it.

    Attributes:
        target, release: The system that decided, and its release.
        flashinfer, judged_as: The FlashInfer release, and the known one whose facts were used.
        method, path: The routing method that the target chose, and the answers that led to it.
        router: The model's recipe, or why there is none.
        gates: Names of all gates that were asked.
        rejected_by: Names of the gates that said no, with their reasons.
        by_choice: Whether the target rejected the model to route by itself on purpose.
        kernel: The recipe that the kernel computes; None if it does not run.
        findings: What is wrong.
        notes: Matters of precision, for a kernel that runs.
        counterexample: A token that is routed otherwise, as `Counterexample.as_dict` has it.
        exact: The calls that would have computed the model's router.
        call: The call that computes the model exactly, as `calls.arguments_of` has it: the target's
            own, or the first that would have; None if no kernel of the release does.
        obstacles: Why no call of a fused kernel of the release would be exact; empty if one would.
        reason: Why there is no verdict.
        site: The code that makes the kernel call.
        received: The routing method and arguments that reach a kernel that is wrong or fails.
        source: File and line of the target's code that is to blame, if they are known.
        opt_in: Switches without which the target would not have taken this path.
        by_default: Whether the target is known to take this path by default.
        reach_question: Why it is not known whether the target takes this path by default, where it
            should be known. The reach is then that of the checkpoint.
        lost_since: The release whose fused kernel runs, where this one's no longer does, or no
            longer by default; empty if the kernel is not lost.
        rule: The function of the target that keeps a lost kernel from the model, if it is known.
        instead: What the target takes by default instead of a lost kernel, if that is known.
        outcome: The outcome of the test that gave the verdict.
    """

    KIND: ClassVar[str] = "verdict"
    ABOUT: ClassVar[tuple[str, ...]] = (
        "target",
        "release",
        "flashinfer",
        "model",
        "scheme",
    )

    model: str
    scheme: str
    target: str
    release: str
    flashinfer: str
    judged_as: str
    verdict: Verdict
    reach: Reach
    router: str
    method: str = ""
    path: tuple[str, ...] = ()
    gates: tuple[str, ...] = ()
    rejected_by: dict[str, str] = field(default_factory=dict)
    by_choice: bool = False
    kernel: str | None = None
    findings: tuple[Finding, ...] = ()
    notes: tuple[Finding, ...] = ()
    counterexample: dict[str, Any] | None = None
    exact: tuple[str, ...] = ()
    call: dict[str, Any] | None = None
    obstacles: tuple[str, ...] = ()
    reason: str = ""
    site: str = ""
    received: str = ""
    source: str = ""
    opt_in: tuple[str, ...] = ()
    by_default: bool = False
    reach_question: str = ""
    lost_since: str = ""
    rule: str = ""
    instead: str = ""
    outcome: str = ""
    known: Known | None = None

    @property
    def decider(self) -> tuple[str, str, str, str]:
        """Who decided, for which kernels."""
        return self.target, self.release, self.flashinfer, self.judged_as

    @cached_property
    def cause(self) -> str:
        """A stable id of what is wrong, without the model and its numbers; empty if nothing is."""
        if self.lost_since or self.verdict is Verdict.MISSED:
            # Gates are asked in an order, and the first no is the target's reason.
            what = (
                "by default" if self.verdict is Verdict.EXACT else next(iter(self.rejected_by), "")
            )
            method = self.method if what == "routing method" else ""
            kind = "lost" if self.lost_since else "missed"
            return ":".join(filter(None, (kind, what, method, self.rule))).replace(" ", "-")
        if self.verdict in (Verdict.WRONG, Verdict.CRASH):
            what = "+".join(dict.fromkeys(f.id for f in self.findings))
            return ":".join(filter(None, (self.verdict, what, self.site))).replace(" ", "-")
        return ""

    @property
    def fails(self) -> bool:
        """Whether the verdict is the target's fault, by the table in docs/verdicts.md."""
        if self.verdict in (Verdict.WRONG, Verdict.CRASH, Verdict.ERROR):
            return self.reach is not Reach.NO_MODEL
        reachable = self.reach not in (Reach.OPT_IN, Reach.NO_MODEL)
        is_missed = self.verdict is Verdict.MISSED and reachable and not self.by_choice
        return is_missed or bool(self.lost_since)


@dataclass(frozen=True)
class TestRecord(_Record):
    """A GPU test, or another test of the suite that failed.

    Attributes:
        flashinfer: The FlashInfer release in words.
        device: The GPU, or why there is none.
        case: File, name and parameters of the test.
        causes: Stable ids of what is wrong; none if the test names none.
        source: File and line of the target's code that is to blame, if they are known.
    """

    KIND: ClassVar[str] = "test"
    ABOUT: ClassVar[tuple[str, ...]] = ("flashinfer", "device", "case")
    __test__: ClassVar[bool] = False

    flashinfer: str
    device: str
    case: str
    outcome: str
    message: str
    known: Known | None = None
    causes: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class UnansweredRecord(_Record):
    """Questions that a test could not ask, or that have no answer, for one reason.

    Attributes:
        target, release: The system that was asked, and its release; empty if it has none.
        flashinfer: The FlashInfer release in words.
        case: File, name and parameters of the test.
        what: What is not judged, in words.
        count: How many of it.
    """

    KIND: ClassVar[str] = "unanswered"
    ABOUT: ClassVar[tuple[str, ...]] = (
        *("target", "release", "flashinfer"),
        *("case", "what", "reason"),
    )
    #: It is about no failure of its test.
    outcome: ClassVar[str] = ""
    known: ClassVar[None] = None

    target: str
    release: str
    flashinfer: str
    case: str
    what: str
    reason: str
    count: int


#: What a case of a test came to.
Result = VerdictRecord | TestRecord
Record = Result | UnansweredRecord
KINDS: Mapping[str, type[Record]] = {
    cls.KIND: cls for cls in (VerdictRecord, TestRecord, UnansweredRecord)
}
