"""Failures by cause: each cause is shown once, with every case that it concerns.

A test of the suite may fail for several causes, and a cause may fail many tests. A test states its
causes as `Failure` values in a user property. The terminal then shows the first test of each cause,
and counts the others as `repeated`; all of them are failed tests to pytest, JUnit and `--lf`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from pytest_moe_routing.failure import PROPERTY, Failure, Rank, failures_of, text_of

_SAME = "repeated"


def fail(record_property: Callable[[str, Any], None], failures: Sequence[Failure]) -> None:
    """Fail the test for these causes, most urgent first; do nothing if there are none."""
    __tracebackhide__ = True
    if failures:
        ordered = sorted(failures, key=lambda failure: failure.rank)
        record_property(PROPERTY, [failure.as_dict() for failure in ordered])
        pytest.fail(text_of(ordered), pytrace=False)


@dataclass(frozen=True)
class _Message:
    """A failure's text whose first line is its summary.

    In a CI job pytest prints the message of each failure again in its short summary, without
    shortening it; a plain string would be told twice.
    """

    text: str

    @property
    def reprcrash(self) -> SimpleNamespace:
        return SimpleNamespace(message=self.text.partition("\n")[0])

    def toterminal(self, tw: Any) -> None:
        tw.line(self.text)

    def __str__(self) -> str:
        return self.text


class Grouping:
    """Shows each cause once. Registered where the terminal is, not in xdist's workers."""

    def __init__(self) -> None:
        self._cases: dict[str, list[str]] = {}
        self._shown: list[tuple[pytest.TestReport, list[Failure]]] = []
        #: Whether a report is shown; pytest asks for a status more than once.
        self._is_shown: dict[int, bool] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, str] | None:
        if not isinstance(report, pytest.TestReport) or not report.failed:
            return None
        failures = failures_of(report.user_properties)
        if report.when != "call" or not failures:
            return None
        if id(report) not in self._is_shown:
            fresh = [failure for failure in failures if failure.cause not in self._cases]
            for failure in failures:
                self._cases.setdefault(failure.cause, []).append(failure.case)
            if fresh:
                self._shown.append((report, fresh))
            self._is_shown[id(report)] = bool(fresh)
        return None if self._is_shown[id(report)] else (_SAME, "f", "REPEATED")

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Complete the shown failures with all of their cases, and put the urgent ones first."""
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        width = None
        if terminal is not None and terminal.verbosity <= 0:
            width = terminal._tw.fullwidth
        for report, failures in self._shown:
            text = text_of(failures, self._cases, width)
            # pytest declares the types that it makes itself, and takes any with these methods.
            report.longrepr = _Message(text)  # type: ignore[assignment]
        ranks = {id(report): failures[0].rank for report, failures in self._shown}
        if terminal is not None:
            failed = terminal.stats.get("failed", [])
            # A failure that states no cause is as urgent as a loud one.
            failed.sort(key=lambda report: ranks.get(id(report), Rank.LOUD))
