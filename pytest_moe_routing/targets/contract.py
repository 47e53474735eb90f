"""The names of a framework that its probes rely on, as its `contract.yaml` lists them.

The contract says which releases have a name under which spelling, what the probe uses it for, and
which questions have no answer without it. `Names` is the contract of one release: a question whose
names the release does not have is `Unsupported`, and nothing is assumed in its place.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from packaging.version import InvalidVersion, Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.errors import DataError, Unsupported
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.targets.definitions import Definitions

#: What a probe is asked; a row names those that have no answer without it.
QUESTIONS = (
    *("numbers", "verdicts", "modular", "layouts", "model_code", "routers"),
    *("transformers_backend", "accepted_keys", "checkpoints"),
)
_ROW = {"is", "members", "own", "use", "without", "schemes"}
_SPELLING = {"name", "since", "until"}
#: So many missing names are quoted in one message, and how.
_QUOTED = 3
_ROW_QUOTED = re.compile(r"\(contract row '([^']+)': ")


@dataclass(frozen=True)
class Spelling:
    """A name as some releases have it.

    Attributes:
        module: Full name of the module.
        path: Dotted name in it, with a parameter in parentheses at the end; "" for the module.
        since: First known release that has it; None for all before `until`.
        until: Last known release that has it; None for all since.
    """

    module: str
    path: str
    since: Version | None = None
    until: Version | None = None

    def __str__(self) -> str:
        return f"{self.module}:{self.path}" if self.path else self.module

    def is_in(self, release: Version | None) -> bool:
        """Return whether a release is expected to have it; None is later than all known ones."""
        if release is None:
            return self.until is None
        return (self.since is None or self.since <= release) and (
            self.until is None or release <= self.until
        )


@dataclass(frozen=True)
class Row:
    """One name, under all its spellings, in order of preference.

    Attributes:
        key: How the probe calls it.
        use: What the probe uses it for.
        without: Questions that have no answer without it.
        schemes: Quantization schemes that need it; None for all of them.
        own: Whether the class of a member must define it itself, and not inherit it.
    """

    key: str
    spellings: tuple[Spelling, ...]
    use: str
    without: frozenset[str]
    schemes: tuple[str, ...] | None = None
    own: bool = False

    def spellings_in(self, release: Version | None) -> tuple[Spelling, ...]:
        """Return the spellings that a release is expected to have."""
        return tuple(spelling for spelling in self.spellings if spelling.is_in(release))

    def concerns(self, question: str, scheme: str | None) -> bool:
        """Return whether a question about a scheme, or about none, needs this name."""
        if question not in self.without:
            return False
        return scheme is None or self.schemes is None or scheme in self.schemes

    def lost(self) -> str:
        """Say what cannot be judged without it."""
        questions = ", ".join(q.replace("_", " ") for q in QUESTIONS if q in self.without)
        return f"{questions} of {', '.join(self.schemes)}" if self.schemes else questions


@dataclass(frozen=True)
class Contract:
    """What one framework's probes rely on.

    Attributes:
        package: The framework's top-level package.
        title: The framework's name.
        distributions: Distributions that contain the package.
        rows: By key.
        run: Modules and packages that the probe runs for real; all others are stubs.
        unbuilt: Modules that some builds have no file of.
        third_party: Third-party packages that are stubs, installed or not.
    """

    package: str
    title: str
    distributions: tuple[str, ...]
    rows: Mapping[str, Row]
    run: tuple[str, ...]
    unbuilt: tuple[str, ...]
    third_party: tuple[str, ...]

    @classmethod
    @cache
    def of(cls, package: str) -> Contract:
        """Read the packaged contract of a framework.

        Raises:
            DataError: A row of it cannot be.
        """
        return read(package, read_data(__package__, package, "contract.yaml"))

    @cached_property
    def _members(self) -> Mapping[str, list[Row]]:
        """The rows of members, by the key of their row."""
        members: dict[str, list[Row]] = {}
        for key, row in self.rows.items():
            for end in (place for place, sign in enumerate(key) if sign in ".("):
                members.setdefault(key[:end], []).append(row)
        return members

    def members(self, key: str) -> list[Row]:
        """Return the rows of a row's members."""
        return list(self._members.get(key, ()))


def read(package: str, data: Mapping[str, Any]) -> Contract:
    """Make a contract from the mapping that a `contract.yaml` holds.

    Raises:
        DataError: A row of it cannot be.
    """
    within: Mapping[str, str] = data["within"]
    rows: dict[str, Row] = {}
    for key, entry in data["names"].items():
        for row in _rows(key, entry, within):
            if row.key in rows:
                raise DataError(f"{package}/contract.yaml: {row.key} is listed twice")
            rows[row.key] = row
    return Contract(
        package=package,
        title=data["title"],
        distributions=tuple(data["distributions"]),
        rows=rows,
        run=tuple(_full(name, within) for name in data["run"]),
        unbuilt=tuple(data["unbuilt"]),
        third_party=tuple(data["third_party"]),
    )


def _full(name: str, within: Mapping[str, str]) -> str:
    """Return a name with the abbreviation at its start written out."""
    first, dot, rest = name.partition(".")
    first, colon, path = first.partition(":")
    return within.get(first, first) + colon + path + dot + rest


def _rows(key: str, entry: Mapping[str, Any], within: Mapping[str, str]) -> Iterator[Row]:
    unknown = set(entry) - _ROW
    if unknown or "is" not in entry or not entry.get("use"):
        raise DataError(
            f"contract.yaml: row {key} has {', '.join(sorted(entry))}; valid keys are "
            f"{', '.join(sorted(_ROW))}, of which 'is' and 'use' are required"
        )
    without, schemes = frozenset(entry["without"]), entry.get("schemes")
    if not without or without - set(QUESTIONS):
        raise DataError(
            f"contract.yaml: row {key} is needed for {', '.join(without) or 'nothing'}; valid "
            f"questions are {', '.join(QUESTIONS)}"
        )
    if schemes is not None and set(schemes) - set(SERVED_SCHEMES):
        raise DataError(f"contract.yaml: row {key} names an unknown scheme")
    owners = tuple(_spelling(key, item, within) for item in _list(entry["is"]))
    shared = (entry["use"], without, None if schemes is None else tuple(schemes))
    own = bool(entry.get("own"))
    yield Row(key, owners, *shared)
    for item in entry.get("members", ()):
        member = item if isinstance(item, str) else item["name"]
        limits = _spelling(key, item, {})
        joined = member if member.startswith("(") else f".{member}"
        spellings = tuple(
            Spelling(
                owner.module,
                f"{owner.path}{joined}" if owner.path else member,
                max(filter(None, (owner.since, limits.since)), default=None),
                min(filter(None, (owner.until, limits.until)), default=None),
            )
            for owner in owners
            if _overlap(owner, limits)
        )
        if not spellings:
            raise DataError(f"contract.yaml: row {key}{joined} is in no release")
        yield Row(f"{key}{joined}", spellings, *shared, own)


def _overlap(one: Spelling, other: Spelling) -> bool:
    starts = max(filter(None, (one.since, other.since)), default=None)
    ends = min(filter(None, (one.until, other.until)), default=None)
    return starts is None or ends is None or starts <= ends


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _spelling(key: str, item: Any, within: Mapping[str, str]) -> Spelling:
    entry: Mapping[str, Any] = {"name": item} if isinstance(item, str) else item
    if "name" not in entry or set(entry) - _SPELLING:
        raise DataError(
            f"contract.yaml: a spelling of {key} has {', '.join(sorted(entry))}; valid keys are "
            f"{', '.join(sorted(_SPELLING))}, of which 'name' is required"
        )
    module, _, path = _full(entry["name"], within).partition(":")
    limits = (entry.get(limit) for limit in ("since", "until"))
    return Spelling(module, path, *(None if v is None else Version(str(v)) for v in limits))


def release_of(version: str) -> Version | None:
    """Return a release number; None for what has none, which counts as later than all known.

    setuptools-scm names a build of a checkout without tags `0.1.dev1+gabc` or, where the project
    says so, `0.0.0.dev0`: such a version says nothing about the release.
    """
    try:
        release = Version(version)
    except InvalidVersion:
        return None
    is_unknown = release.release[:2] <= ((0, 1) if release.is_devrelease else (0, 0))
    return None if is_unknown else release


def lost_names(package: str, version: str, reason: str) -> list[str]:
    """Return the contract's rows that a reason calls missing, and that the release should have.

    Args:
        reason: Why a question is not judged; `Names.sentence` says what is missing.
    """
    rows, release = Contract.of(package).rows, release_of(version)
    quoted = (key for key in _ROW_QUOTED.findall(reason) if key in rows)
    return [key for key in quoted if rows[key].spellings_in(release)]


class Names:
    """The names of one release of a framework.

    Args:
        version: The release, or any other text for one that is later than all known.
        definitions: Those of the release.
        load: Imports a module; None where nothing is imported.
    """

    def __init__(
        self,
        contract: Contract,
        version: str,
        definitions: Definitions,
        load: Callable[[str], Any] | None = None,
    ) -> None:
        self.contract, self.version, self._load = contract, version, load
        self.definitions, self._release = definitions, release_of(version)
        self._found: dict[str, Spelling | None] = {}
        # The same few questions are asked for every model, and a release does not change.
        self._lacking = cache(self._find_lacking)
        self.has = cache(self.has)  # type: ignore[method-assign]

    def _find(self, row: Row) -> Spelling | None:
        """Return the spelling that the release has: of the expected ones, else of all."""
        if row.key not in self._found:
            spellings = row.spellings_in(self._release) or row.spellings
            self._found[row.key] = next(
                (s for s in spellings if self.definitions.has(s.module, s.path, own=row.own)),
                None,
            )
        return self._found[row.key]

    def missing(self, question: str | None = None, scheme: str | None = None) -> list[Row]:
        """Return the rows that the release is expected to have, and has not.

        Args:
            question: Only the rows that this question needs.
            scheme: Only the rows that this scheme needs.
        """
        return list(self._lacking(question, scheme))

    def _find_lacking(self, question: str | None, scheme: str | None) -> tuple[Row, ...]:
        return tuple(
            row
            for row in self.contract.rows.values()
            if (question is None or row.concerns(question, scheme))
            and row.spellings_in(self._release)
            and self._find(row) is None
        )

    def require(self, question: str, scheme: str | None = None) -> None:
        """Check that the release has every name that a question needs.

        Raises:
            Unsupported: It has not; the message quotes the contract.
        """
        rows = self.missing(question, scheme)
        if rows:
            more = f"; and {len(rows) - _QUOTED} more names" if len(rows) > _QUOTED else ""
            raise Unsupported(self.sentence(*rows[:_QUOTED]) + more)

    def sentence(self, *rows: Row) -> str:
        """Say that the release does not have some names, with the contract's rows."""

        def quoted(row: Row) -> str:
            names = row.spellings_in(self._release) or row.spellings
            return f"no {' or '.join(map(str, names))} (contract row {row.key!r}: {row.use})"

        has = f"not judged: {self.contract.title} {self.version} has "
        return has + "; ".join(map(quoted, rows))

    def spelling(self, key: str) -> Spelling:
        """Return a name as the release has it.

        Raises:
            Unsupported: The release does not have it.
        """
        row = self.contract.rows[key]
        found = self._find(row)
        if found is None:
            raise Unsupported(self.sentence(row))
        return found

    def expects(self, key: str) -> bool:
        """Return whether the contract expects the release to have a name."""
        return bool(self.contract.rows[key].spellings_in(self._release))

    def is_there(self, key: str) -> bool:
        """Return whether the release has a name, expected or not."""
        return self._find(self.contract.rows[key]) is not None

    def has(self, key: str) -> bool:
        """Return whether the release has a name that other releases may lack.

        Raises:
            Unsupported: The contract expects the release to have it, and it has not.
        """
        is_there = self.is_there(key)
        if not is_there and self.expects(key):
            self.spelling(key)
        return is_there

    def get(self, key: str) -> Any:
        """Import what a name stands for.

        Raises:
            Unsupported: The release does not have it.
        """
        spelling = self.spelling(key)
        assert self._load is not None
        value = self._load(spelling.module)
        try:
            for name in filter(None, spelling.path.split(".")):
                value = getattr(value, name)
        except AttributeError:
            raise Unsupported(self.sentence(self.contract.rows[key])) from None
        return value

    def accepted(self, key: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the arguments that a function of the release takes.

        Raises:
            Unsupported: The contract expects the function to take one of the others as well.
        """
        return {name: value for name, value in arguments.items() if self.has(f"{key}({name})")}
