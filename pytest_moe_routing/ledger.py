"""A team's ledger of known failures: what may fail, why, and since when; and that it still does.

A YAML list; an entry's keys are the fields of `KnownFailure`. What a run makes of the entries is
here as well: a case that fails as known is an xfail, one that passes fails, and an entry that no
case matches is reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from packaging.version import Version

from pytest_moe_routing.errors import MoERoutingError, Unsupported
from pytest_moe_routing.escape import is_web_address, printable, shorten
from pytest_moe_routing.failure import NO_ANSWERS, PROPERTY, Failure, failures_of, text_of
from pytest_moe_routing.inputs import parse_release
from pytest_moe_routing.models.kinds import Problem, key
from pytest_moe_routing.models.sections import Section, compose, fail_at, show
from pytest_moe_routing.targets import target_names

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

#: The entries about a test's case, and those about other cases of the test.
_ENTRIES = pytest.StashKey[tuple[list["KnownFailure"], list["KnownFailure"]]]()
#: Where a worker leaves what it matched for the controller.
_OUTPUT = "moe_known_failures"


@dataclass(frozen=True)
class KnownFailure:
    """One entry. Releases are ranges: from `since` on, and before `until`."""

    #: The target's name, without `@PATH`.
    target: str = key(str)
    reason: str = key(str)
    #: The id of the cause, as a failure shows it. Required for tests that state their causes;
    #: without it, an entry is about any failure of a test that states none, such as a GPU test.
    cause: str | None = key(str, default=None, nullable=True)
    #: A shell pattern of the ids in a test's brackets, as in `test_verdict[deepseek-r1-nvfp4]`.
    case: str = key(str, default="*")
    #: Several of them; an entry is then loaded once for each, as its `case`.
    cases: tuple[str, ...] = key(str, many=True, default=())
    test: str = key(str, default="test_verdict")
    link: str | None = key(str, default=None, nullable=True)
    since: str | None = key(str, default=None, nullable=True)
    until: str | None = key(str, default=None, nullable=True)
    flashinfer_since: str | None = key(str, default=None, nullable=True)
    flashinfer_until: str | None = key(str, default=None, nullable=True)
    #: FILE:LINE of the entry.
    place: str = field(default="", compare=False)

    def problems(self) -> Iterator[Problem]:
        """Values of the right kind that make no entry."""
        for name in ("case", "reason"):
            if not getattr(self, name).strip():
                yield name, "nothing", "text"
        if self.cases and self.case != "*":
            yield "cases", "case as well", "one of the two"
        if not all(map(str.strip, self.cases)):
            yield "cases", "nothing", "a list of shell patterns"
        if self.cause is not None and not self.cause.strip():
            yield "cause", "nothing", "the id of a cause"
        if self.cause == NO_ANSWERS:
            yield "cause", repr(self.cause), "another one: such a target was not asked the rest"
        if self.link is not None and not is_web_address(self.link):
            yield "link", repr(self.link), "https://..., where the failure is tracked"
        if ":" not in self.target and self.target not in target_names():
            names = ", ".join(target_names())
            yield "target", repr(self.target), f"one of {names}, or module:Class"
        for prefix in ("", "flashinfer_"):
            bounds = []
            for name in (f"{prefix}since", f"{prefix}until"):
                if (text := getattr(self, name)) is None:
                    continue
                try:
                    bounds.append(parse_release(text))
                except ValueError:
                    yield name, shorten(repr(text)), "a release such as 0.30.0"
            if len(bounds) == 2 and bounds[0] >= bounds[1]:
                yield f"{prefix}until", repr(text), "a release after 'since'"

    @property
    def id(self) -> tuple[str, str]:
        """What identifies the entry, with one of its cases."""
        return self.place, self.case

    def matches(self, test: str, case: str) -> bool:
        return test == self.test and fnmatchcase(case, self.case)

    @property
    def is_about_one_case(self) -> bool:
        return not set("*?[") & set(self.case)

    def __str__(self) -> str:
        return printable(f"{self.reason} ({self.link})" if self.link else self.reason)


def load_ledger(file: Path) -> list[KnownFailure]:
    """Read a ledger.

    Raises:
        ModelError: The file cannot be read, or an entry is not as `KnownFailure` says.
    """
    root = compose(file)
    if root is None:
        return []
    if not isinstance(root, yaml.SequenceNode):
        fail_at(file, root.start_mark.line + 1, "the file", show(root), "a list of entries")
    entries = []
    for node in root.value:
        line = node.start_mark.line + 1
        entry: KnownFailure = Section(file, node, line=line).build(KnownFailure)
        place = f"{file}:{line}"
        for case in entry.cases or (entry.case,):
            entries.append(replace(entry, case=case, cases=(), place=place))
    return entries


def in_force(
    entries: Sequence[KnownFailure], *, target: str, release: Callable[[], str], flashinfer: str
) -> list[KnownFailure]:
    """Return the entries about a target, by the name in its `TargetId`, and these releases.

    The target's own release is asked for only when an entry depends on it.

    Raises:
        MoERoutingError: An entry has a range of releases, and the target does not say its own. Or
            two entries are about the same cause of the same case.
    """

    def concerns(entry: KnownFailure) -> bool:
        if entry.target != target:
            return False
        if not _is_between(Version(flashinfer), entry.flashinfer_since, entry.flashinfer_until):
            return False
        if entry.since is None and entry.until is None:
            return True
        where = f"{entry.place}: 'since' and 'until' need the release of {target}"
        try:
            found = release()
            return _is_between(parse_release(found), entry.since, entry.until)
        except Unsupported as error:
            raise MoERoutingError(f"{where}, but {error}") from None
        except ValueError:
            raise MoERoutingError(
                f"{where}: found {shorten(repr(found))}, expected a number"
            ) from None

    found: dict[tuple[str, str, str | None], KnownFailure] = {}
    for entry in filter(concerns, entries):
        first = found.setdefault((entry.test, entry.case, entry.cause), entry)
        if first is not entry:
            cause = f"the cause {entry.cause!r}" if entry.cause else "failures without a cause"
            raise MoERoutingError(
                f"{entry.place}: found the case {shorten(repr(entry.case))} for {cause} again, "
                f"expected it once; it is also in the entry at {first.place}"
            )
    return list(found.values())


def _is_between(release: Version, since: str | None, until: str | None) -> bool:
    return (since is None or release >= Version(since)) and (
        until is None or release < Version(until)
    )


class LedgerPlugin:
    """Applies entries to the tests that it is shown, and reports which of them still matched.

    An entry silences one cause, in its cases: a test is an xfail only if every cause of its failure
    is known there.

    Args:
        entries: Those that apply to the target and release of this run.
        whole_suite: Whether the run is about every case of the suite, so that an entry that matches
            none, or whose cause no case shows, makes the run fail.
    """

    def __init__(self, entries: Sequence[KnownFailure], *, whole_suite: bool) -> None:
        self.entries = entries
        self.whole_suite = whole_suite
        #: Ids of entries that matched a case; None until a collection has finished.
        self.matched: set[tuple[str, str]] | None = None
        #: Ids of entries whose cases ran, and of those whose cause was seen.
        self.ran: set[tuple[str, str]] = set()
        self.seen: set[tuple[str, str]] = set()
        #: Places of entries whose cause was seen in a case that they do not list, with that case.
        self.new: set[tuple[str, str]] = set()

    def mark(self, item: pytest.Item, test: str, case: str) -> None:
        """Remember which entries are about a collected test."""
        own = [entry for entry in self.entries if entry.test == test]
        found = [entry for entry in own if entry.matches(test, case)]
        places = {entry.place for entry in found}
        if own:
            item.stash[_ENTRIES] = found, [entry for entry in own if entry.place not in places]
        self.matched = (self.matched or set()) | {entry.id for entry in found}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        entries, others = item.stash.get(_ENTRIES, ([], []))
        runs_all = item.config.getoption("runxfail", False)
        if call.when != "call" or report.skipped or runs_all:
            return report
        # A test of a scheme or a router may fail only for models that this run did not choose.
        if self.whole_suite or (hasattr(item, "callspec") and "moe_model" in item.callspec.params):
            self.ran |= {entry.id for entry in entries}
        failures = failures_of(report.user_properties)
        if failures and (entries or others):
            case = item.callspec.id if hasattr(item, "callspec") else ""
            self._apply(report, entries, self._named(failures, entries, others, case))
        elif not failures:
            self._apply_without_cause(report, [e for e in entries if e.cause is None])
        return report

    def _named(
        self,
        failures: Sequence[Failure],
        entries: Sequence[KnownFailure],
        others: Sequence[KnownFailure],
        case: str,
    ) -> list[Failure]:
        """Return failures, each with the entry that knows its cause in other cases alone."""
        known = {entry.cause for entry in entries}
        places = {e.cause: e.place for e in reversed(others) if e.cause not in known}
        self.new |= {(places[f.cause], case) for f in failures if f.cause in places}
        return [replace(f, entry=places.get(f.cause, "")) for f in failures]

    def _apply(
        self,
        report: pytest.TestReport,
        entries: Sequence[KnownFailure],
        failures: Sequence[Failure],
    ) -> None:
        """Silence the known causes of a failed test."""
        by_cause = {entry.cause: entry for entry in reversed(entries)}
        causes = {failure.cause: failure.cause for failure in failures}
        if not self.whole_suite:
            # A ledger of the whole suite names a cause after models that this run did not choose.
            others = [f for f in failures if f.cause not in by_cause and f.if_met in by_cause]
            causes |= {failure.cause: failure.if_met for failure in others}
        known = [by_cause[cause] for cause in causes.values() if cause in by_cause]
        self.seen |= {entry.id for entry in entries if entry.cause in causes.values()}
        unknown = [failure for failure in failures if causes[failure.cause] not in by_cause]
        if not unknown:
            _xfail(report, known[0])
        else:
            report.longrepr = text_of(unknown)
        properties = [(n, v) for n, v in report.user_properties if n != PROPERTY]
        stated = [(PROPERTY, [failure.as_dict() for failure in unknown])] if unknown else []
        report.user_properties = [*properties, *stated]
        for entry in entries:
            if entry.cause is None and unknown:
                text = "names no cause, but this test states its causes; add 'cause: ID'"
                report.sections.append(("known failures", f"{entry.place} {text}"))

    def _apply_without_cause(
        self, report: pytest.TestReport, entries: Sequence[KnownFailure]
    ) -> None:
        """Silence a failure of a test that states no causes; fail if there is none any more."""
        if not entries:
            return
        self.seen |= {entry.id for entry in entries}
        if report.passed:
            case = report.nodeid.rpartition("::")[2]
            places = ", ".join(f"{entry.place} ({entry})" for entry in entries)
            report.outcome = "failed"
            report.longrepr = f"{case}: known failure is gone: remove or narrow the entry {places}"
            report.user_properties.append(("moe_gone", report.longrepr))
        else:
            _xfail(report, entries[0])

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over what a worker found; each of them collects all."""
        found = getattr(node, "workeroutput", {}).get(_OUTPUT)
        if found is not None:
            matched, ran, seen, new = found
            if matched is not None:
                self.matched = (self.matched or set()) | set(matched)
            self.ran |= set(ran)
            self.seen |= set(seen)
            self.new |= set(new)

    @property
    def unmatched(self) -> list[KnownFailure]:
        """Entries that no collected case matched; none if nothing was collected at all."""
        if self.matched is None:
            return []
        return [entry for entry in self.entries if entry.id not in self.matched]

    @property
    def gone(self) -> list[KnownFailure]:
        """Entries whose cause none of their cases shows any more."""
        return [
            entry
            for entry in self.entries
            if entry.id in self.ran
            and entry.id not in self.seen
            and (self.whole_suite or entry.is_about_one_case)
        ]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        output = getattr(session.config, "workeroutput", None)
        if output is not None:
            matched = None if self.matched is None else sorted(self.matched)
            output[_OUTPUT] = [matched, *map(sorted, (self.ran, self.seen, self.new))]
            return
        stale = self.gone or (self.unmatched and self.whole_suite)
        if stale and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        def write(head: str, lines: Iterable[str], color: str = "red") -> None:
            for line in (f"moe-routing: {head}:", *(f"  {line}" for line in lines)):
                terminalreporter.write_line(line, **{color: True})

        if self.new:
            head = "known causes in new cases; fix them, or add the cases to the entry"
            write(head, (f"{place}: {cases}" for place, cases in _joined(self.new).items()))
        if self.gone:
            head = "known failures that no longer occur; remove or narrow them, unless their cases "
            head += "are now missed or not judged, or fail for another cause"
            write(head, map(_line, _by_place(self.gone)))
        unmatched = [*_by_place(self.unmatched)]
        if self.whole_suite and unmatched:
            write("known failures that match no case (remove them)", map(_line, unmatched))
        elif unmatched and terminalreporter.verbosity > 0:
            head = "known failures that match no case (only part of the suite was chosen)"
            write(head, map(_line, unmatched), "yellow")
        elif unmatched:
            why = "only part of the suite was chosen; -v lists them"
            text = f"moe-routing: known failures that match no case: {len(unmatched)} ({why})"
            terminalreporter.write_line(text)


def _joined(ids: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the cases of each place."""
    found: dict[str, list[str]] = {}
    for place, case in sorted(ids):
        found.setdefault(place, []).append(case)
    return {place: ", ".join(cases) for place, cases in found.items()}


def _line(found: tuple[KnownFailure, str]) -> str:
    entry, cases = found
    return f"{entry.test}[{cases}] ({entry.place}): {entry}"


def _by_place(entries: Sequence[KnownFailure]) -> Iterator[tuple[KnownFailure, str]]:
    """Yield an entry of each place, with all of its cases that are given."""
    cases = _joined(entry.id for entry in entries)
    for entry in {entry.place: entry for entry in entries}.values():
        yield entry, cases[entry.place]


def _xfail(report: pytest.TestReport, entry: KnownFailure) -> None:
    """Turn a failed test into an expected failure."""
    report.outcome = "skipped"
    report.wasxfail = str(entry)
    known = {"reason": entry.reason, "link": entry.link or ""}
    report.user_properties.append(("moe_known", known))
