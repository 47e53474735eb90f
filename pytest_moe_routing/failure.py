"""The causes of a failed test, as values that travel in its user properties."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any

from pytest_moe_routing.escape import printable

#: The user property in which a test states the causes of its failure.
PROPERTY = "moe_failures"
#: Lines of one block, and characters of a line.
_BLOCK = 15
_WIDTH = 100


class Rank(IntEnum):
    """How urgent a failure is: silent ones first."""

    SILENT = 0
    LOUD = 1
    MISSED = 2
    DOWNCAST = 3
    LATENT = 4


@dataclass(frozen=True)
class Failure:
    """One cause of a failed test.

    Attributes:
        cause: A stable id, without models and their numbers: what a ledger names.
        case: The model and scheme, or whatever else of the test the cause concerns.
        lines: The explanation.
        source: File and line of the target's code that is to blame, if they are known.
    """

    cause: str
    rank: Rank
    case: str
    lines: tuple[str, ...]
    source: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"rank": int(self.rank), "lines": list(self.lines)}

    def block(self, cases: Iterable[str] = (), width: int | None = None) -> list[str]:
        """Return the explanation in at most 15 lines, with the other cases and the cause's id.

        A latent cause is one line.

        Args:
            width: Characters of that line; as many as it takes if None.
        """
        if self.rank is Rank.LATENT:
            where = ", ".join(dict.fromkeys((self.case, *cases)))
            line = f"{self.lines[0]} ({'; '.join((where, *self.lines[1:]))})  [{self.cause}]"
            fits = width is None or len(line) <= width
            return [line if fits else f"{line[: width - 3]}..."]  # type: ignore[operator]
        others = [case for case in dict.fromkeys(cases) if case != self.case]
        tail = [_listed(f"  also     {len(others)} more: ", others)] if others else []
        tail.append(f"  cause    {self.cause}")
        room = _BLOCK - len(tail)
        lines = list(self.lines)
        return (lines if len(lines) <= room else [*lines[: room - 1], "  ..."]) + tail


def _listed(start: str, names: Sequence[str]) -> str:
    """Names on one line, as many as fit."""
    text = start
    for place, name in enumerate(names):
        more = f" and {len(names) - place} others"
        if len(text) + len(name) + len(more) > _WIDTH and place:
            return text + more.lstrip(",")
        text += ("" if place == 0 else ", ") + name
    return text


def text_of(
    failures: Iterable[Failure],
    cases: Mapping[str, Iterable[str]] | None = None,
    width: int | None = None,
) -> str:
    """Return the message of a test that fails for these causes; see `Failure.block`."""
    blocks = (failure.block((cases or {}).get(failure.cause, ()), width) for failure in failures)
    # Latent causes are a list; the others are paragraphs.
    text = "".join(
        ("" if place == 0 else "\n" if len(block) == 1 else "\n\n") + "\n".join(block)
        for place, block in enumerate(blocks)
    )
    return printable(text)


def failures_of(properties: Iterable[tuple[str, Any]]) -> list[Failure]:
    """Return the causes that a test stated in its user properties."""
    stated = dict(properties).get(PROPERTY, [])
    return [
        Failure(f["cause"], Rank(f["rank"]), f["case"], tuple(f["lines"]), f["source"])
        for f in stated
    ]
