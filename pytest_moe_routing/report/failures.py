"""Failures by cause: each cause is shown once, with every case that it concerns.

A test of the suite may fail for several causes, and a cause may fail many tests. A test states its
causes as `Failure` values in a user property. The terminal then shows the first test of each cause,
and counts the others as `repeated`; all of them are failed tests to pytest, JUnit and `--lf`.
Without `-v`, one defect in several places is one block, and what is latent is one list at the end.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_moe_routing.escape import printable
from pytest_moe_routing.failure import CUT, PROPERTY, Failure, Rank, failures_of, joined, text_of
from pytest_moe_routing.session import SUITE_IDS

_SAME = "repeated"
_RARITY, _URGENCY = attrgetter("is_opt_in", "rarity"), attrgetter("urgency")
#: The place in a report: of failures of one urgency, those that most people can meet come first.
_PLACE = attrgetter("urgency", "rarity")
#: Where a failure that states no cause is shown: among loud ones that are met by default.
_OF_NO_CAUSE = _PLACE(Failure("", Rank.LOUD, "", ()))
#: The options of a short summary that nobody asked for.
_DEFAULT_SUMMARY = "fE"


def fail(record_property: Callable[[str, Any], None], failures: Sequence[Failure]) -> None:
    """Fail the test for these causes, most urgent first; do nothing if there are none."""
    __tracebackhide__ = True
    if failures:
        ordered = sorted(failures, key=_URGENCY)
        record_property(PROPERTY, [failure.as_dict() for failure in ordered])
        pytest.fail(text_of(ordered), pytrace=False)


def _entitle(report: pytest.TestReport, title: str) -> None:
    """Show a report under a title in place of its test's name; its id stays as it is."""
    file, line, _ = report.location
    report.location = (file, line, printable(title))


@dataclass(frozen=True)
class _Message:
    """A failure's text, and its summary.

    In a CI job pytest prints the message of each failure again in its short summary, without
    shortening it; a plain string would be told twice.
    """

    text: str
    summary: str

    @property
    def reprcrash(self) -> SimpleNamespace:
        return SimpleNamespace(message=self.summary)

    def toterminal(self, tw: Any) -> None:
        tw.line(self.text)

    def __str__(self) -> str:
        return self.text


class Grouping:
    """Shows each cause once. Registered where the terminal is, not in xdist's workers."""

    def __init__(self) -> None:
        self._cases: dict[str, list[str]] = {}
        #: Of each cause, the first of those failures that most people can meet.
        self._first: dict[str, Failure] = {}
        #: What differs in all cases of each cause; the cause itself if one of them does not say.
        self._differs: dict[str, set[str]] = {}
        self._shown: list[tuple[pytest.TestReport, list[Failure]]] = []
        #: Whether a report is shown; pytest asks for a status more than once.
        self._is_shown: dict[int, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport, config: pytest.Config
    ) -> tuple[str, str, str] | None:
        if not isinstance(report, pytest.TestReport):
            return None
        if report.passed and report.when == "call" and report.nodeid.startswith(SUITE_IDS):
            # Nobody reads a thousand dots in a file.
            terminal = config.pluginmanager.get_plugin("terminalreporter")
            return None if terminal is None or terminal.isatty else ("passed", "", "PASSED")
        if report.skipped and not hasattr(report, "wasxfail"):
            # Most of thousands of tests do not suit the target: they are counted at the end.
            is_ours = "moe_case" in dict(report.user_properties)
            return ("skipped", "", "SKIPPED") if is_ours else None
        if not report.failed:
            return None
        failures = failures_of(report.user_properties)
        if report.when != "call" or not failures:
            return None
        if id(report) not in self._is_shown:
            # A test may meet one cause in several places; the first is the most urgent.
            new = [f for f in reversed(failures) if f.cause not in self._cases]
            fresh = [*{f.cause: f for f in new}.values()][::-1]
            for failure in failures:
                self._cases.setdefault(failure.cause, []).append(failure.case)
                first = self._first.setdefault(failure.cause, failure)
                self._first[failure.cause] = min(first, failure, key=_RARITY)
                differs = failure.differs or (failure.cause,)
                self._differs.setdefault(failure.cause, set()).update(differs)
            if fresh:
                self._shown.append((report, fresh))
            self._is_shown[id(report)] = bool(fresh)
        return None if self._is_shown[id(report)] else (_SAME, "", "REPEATED")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Complete the shown failures with all of their cases, and put the urgent ones first."""
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        if terminal is None or terminal.verbosity > 0:
            shown = [(r, [self._first[f.cause] for f in failures]) for r, failures in self._shown]
            texts = {id(report): text_of(failures, self._cases) for report, failures in shown}
            order = {id(report): min(map(_PLACE, failures)) for report, failures in shown}
        else:
            texts, order = self._brief(terminal._tw.fullwidth)
        for report, failures in self._shown:
            if id(report) in texts:
                # pytest declares the types that it makes itself, and takes any with these methods.
                message = _Message(texts[id(report)], printable(failures[0].lines[0]))
                report.longrepr = message  # type: ignore[assignment]
        if terminal is None:
            return
        failed = terminal.stats.get("failed", [])
        moved = [report for report, _ in self._shown if id(report) not in texts]
        if moved:
            failed[:] = [report for report in failed if report not in moved]
            terminal.stats.setdefault(_SAME, []).extend(moved)
        failed.sort(key=lambda report: order.get(id(report), _OF_NO_CAUSE))

    def _brief(self, width: int) -> tuple[dict[int, str], dict[int, Any]]:
        """Return what to show with each report, each defect once, and how urgent that is.

        A report whose every defect is shown with another one has no text. A defect that is less
        urgent than another test's is shown behind that, whichever test has found it.
        """
        defects: dict[tuple[Rank, str], list[Failure]] = {}
        defect_of = self._defects()
        owners: dict[tuple[Rank, str], pytest.TestReport] = {}
        latent = [f for _, failures in self._shown for f in failures if f.rank is Rank.LATENT]
        for report, failures in self._shown:
            for failure in failures:
                if failure.rank is not Rank.LATENT:
                    defect = defect_of[failure.cause]
                    owners.setdefault(defect, report)
                    defects.setdefault(defect, []).append(failure)
        urgency = {
            defect: min(map(_PLACE, (self._first[failure.cause] for failure in failures)))
            for defect, failures in defects.items()
        }
        blocks: dict[int, list[list[str]]] = {}
        order: dict[int, Any] = {}
        last = self._shown[-1][0] if self._shown else None
        for defect in sorted(defects, key=urgency.__getitem__):
            owner = owners[defect]
            if id(owner) not in blocks:
                last, order[id(owner)] = owner, urgency[defect]
            blocks.setdefault(id(last), []).append(self._block(defects[defect], width))
        texts: dict[int, str] = {}
        for report, _ in self._shown:
            if id(report) in blocks:
                first, *_ = own = blocks[id(report)]
                _entitle(report, first.pop(0))
                texts[id(report)] = printable("\n".join(chain.from_iterable(own)))
        if latent:
            assert last is not None
            free = [report for report, _ in self._shown if id(report) not in texts]
            lines = joined(self._latent(latent, width))
            if free:
                last = free[-1]
                _entitle(
                    last, "latent: no known model meets these on a GPU without an opt-in switch"
                )
                order[id(last)] = _PLACE(latent[0])
            texts[id(last)] = "\n\n".join(filter(None, (texts.get(id(last)), lines)))
        return texts, order

    def _latent(self, failures: Sequence[Failure], width: int) -> list[list[str]]:
        """Return a line for each defect that nobody meets, and what the lines leave out."""
        parts = {failure.cause: self._differs[failure.cause] for failure in failures}
        defects: dict[tuple[Rank, str], list[Failure]] = {}
        for failure in failures:
            own = parts[failure.cause]
            if own != set().union(*(other for other in parts.values() if other < own)):
                defects.setdefault(failure.defect, []).append(failure)
        blocks = []
        for first, *others in defects.values():
            times = f"{1 + len(others)} x " if others else ""
            [line] = first.block(self._cases[first.cause], width - len(times))
            blocks.append([times + line])
        left_out = len(failures) - sum(map(len, defects.values()))
        combined = [f"{left_out} more only combine causes of this list"] if left_out else []
        if len(blocks) < len(failures) or any(line.endswith(CUT) for [line] in blocks):
            blocks.append(["; ".join((*combined, "--lf -v shows each in full"))])
        return blocks

    def _defects(self) -> dict[str, tuple[Rank, str]]:
        """Return the defect of each cause.

        A cause that another test has found before has that test's defect, and so does one that has
        everything of a cause found before and more.
        """
        found: dict[str, tuple[Rank, str]] = {}
        for failure in (failure for _, failures in self._shown for failure in failures):
            own = self._differs[failure.cause]
            first = (c for c in found if own <= self._differs[c] or own > self._differs[c])
            found[failure.cause] = next((found[cause] for cause in first), failure.defect)
        return found

    def _block(self, failures: Sequence[Failure], width: int) -> list[str]:
        """Return the block of one defect, wherever it is."""
        first, *others = sorted((self._first[f.cause] for f in failures), key=_RARITY)
        elsewhere = [other.elsewhere(self._cases[other.cause], first.reach) for other in others]
        return first.block(self._cases[first.cause], width, elsewhere)

    @pytest.hookimpl(tryfirst=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Say how the counts add up, and shorten the summary.

        Tests that were shown just above are left out of the short summary, unless asked for.
        """
        self._write_counts(terminalreporter)
        failed = {id(report) for report in terminalreporter.stats.get("failed", [])}
        is_default = terminalreporter.config.option.reportchars == _DEFAULT_SUMMARY
        if is_default and failed and failed <= {id(report) for report, _ in self._shown}:
            chars = terminalreporter.reportchars
            terminalreporter.reportchars = chars.replace("f", "")

    def _write_counts(self, reporter: pytest.TerminalReporter) -> None:
        """Write what each kind of failed test is, where one of them is not pytest's own."""
        counts = {kind: len(reporter.stats.get(kind, ())) for kind in ("failed", _SAME, "xfailed")}
        if not counts[_SAME] or reporter.verbosity < 0:
            return
        is_latent = any(f.rank is Rank.LATENT for _, failures in self._shown for f in failures)
        causes = "shown or latent causes" if is_latent else "shown causes"
        parts = [f"{counts['failed']} shown (failed)", f"{counts[_SAME]} of {causes} (repeated)"]
        if counts["xfailed"]:
            parts.append(f"{counts['xfailed']} accepted as known (xfailed)")
        text = f"{sum(counts.values())} tests failed: {', '.join(parts)}"
        for line in textwrap.wrap(text, max(reporter._tw.fullwidth, 40), subsequent_indent="  "):
            reporter.write_line(line)
