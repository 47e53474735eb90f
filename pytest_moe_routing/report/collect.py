"""Collects what the tests of a run found, xdist workers' included, and reports it at the end.

Imported by every pytest run of an environment: what makes reports is loaded when there is one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.escape import excerpt, printable
from pytest_moe_routing.failure import failures_of
from pytest_moe_routing.report.endings import PASSED, left_out, stopped_early
from pytest_moe_routing.report.unanswered import (
    PROPERTY,
    TESTS,
    Unanswered,
    questions_of,
    told,
    without_count,
)

if TYPE_CHECKING:
    from collections import Counter

    from pytest_moe_routing.oracle.record import Record, UnansweredRecord, VerdictRecord
    from pytest_moe_routing.session import MoESession

#: Lines of a failed test's message that are kept.
_LINES = 60


class Reporter:
    """The one of a run: registered where the terminal is, not in xdist's workers.

    Args:
        paths: Report files to write.

    Raises:
        MoERoutingError: A path has no known format.
    """

    def __init__(self, session: MoESession, *, paths: Sequence[Path] = ()) -> None:
        if paths:
            from pytest_moe_routing.report.files import check_suffix

            for path in paths:
                check_suffix(path)
        self.session = session
        self.paths = [path.absolute() for path in paths]
        #: Whether failures of the host's own tests are kept as well.
        self.keeps_all = bool(paths)
        self.records: dict[tuple[str, ...], Record] = {}
        self.written: list[Path] = []
        self.problems: list[str] = []
        #: Commands for GitHub Actions.
        self.annotations: list[str] = []
        self.unanswered = Unanswered()
        #: Tests that are skipped, as their framework has no answer.
        self.skipped = 0

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        if report.when == "call":
            self.unanswered.add(properties)
            for unanswered in self._unanswered(report, properties):
                self.records[unanswered.key] = unanswered
        if report.when == "teardown":
            # JUnit writes these, each as text: words that a CI can filter by.
            report.user_properties = list(_words(properties))
        record = self._record(report, properties)
        # A test that failed stays so, whatever its teardown says.
        if record is not None:
            before = self.records.get(record.key)
            if before is None or before.outcome != "failed":
                self.records[record.key] = record

    def _record(self, report: pytest.TestReport, properties: dict[str, Any]) -> Record | None:
        is_verdict = "moe_verdict" in properties and report.when == "call"
        if not (is_verdict or self._is_told(report, properties)):
            return None
        from pytest_moe_routing.oracle.finding import Finding, Kind
        from pytest_moe_routing.oracle.record import Known, TestRecord, VerdictRecord

        outcome = "xfailed" if hasattr(report, "wasxfail") and report.skipped else report.outcome
        known = Known(**properties["moe_known"]) if "moe_known" in properties else None
        if is_verdict:
            verdict = VerdictRecord.of(properties["moe_verdict"])
            gone = [properties["moe_gone"]] if "moe_gone" in properties else []
            notes = (Finding(Kind.PRECISION, "known failures", fact=text) for text in gone)
            return replace(verdict, outcome=outcome, known=known, notes=(*verdict.notes, *notes))
        gpu: dict[str, str] = properties.get("moe_gpu", {})
        causes = failures_of(properties.items())
        return TestRecord(
            flashinfer=self._flashinfer,
            device=gpu.get("gpu") or gpu.get("missing", ""),
            case=properties.get("moe_case") or report.nodeid.rpartition("/")[2],
            outcome=outcome,
            message=_message(report),
            known=known,
            causes=tuple(failure.cause for failure in causes),
            source=next((failure.source for failure in causes if failure.source), ""),
        )

    def _unanswered(
        self, report: pytest.TestReport, properties: dict[str, Any]
    ) -> Iterator[UnansweredRecord]:
        """Yield what a test could not ask."""
        for sentence, reason, count in questions_of(properties):
            from pytest_moe_routing.oracle.record import UnansweredRecord

            if sentence == TESTS:
                self.skipped += 1
            yield UnansweredRecord(
                *self._target,
                flashinfer=self._flashinfer,
                case=properties.get("moe_case") or report.nodeid.rpartition("/")[2],
                what=without_count(sentence),
                reason=reason,
                count=count,
            )

    @cached_property
    def _target(self) -> tuple[str, str]:
        """The target that is asked, and its release."""
        source = self.session.located.source
        return self.session.target_id.name, source.version if source else ""

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Keep what cannot be collected: its tests are missing from everything else."""
        if report.failed and self.keeps_all:
            from pytest_moe_routing.oracle.record import TestRecord

            record = TestRecord(
                flashinfer=self._flashinfer,
                device="",
                case=report.nodeid,
                outcome="failed",
                message=_message(report),
            )
            self.records[record.key] = record

    def _is_told(self, report: pytest.TestReport, properties: dict[str, Any]) -> bool:
        if report.when == "call" and ("moe_gpu" in properties or "moe_known" in properties):
            return True
        if "moe_case" in properties or self.keeps_all:
            return report.failed or ("moe_gpu" in properties and report.skipped)
        return False

    @cached_property
    def _flashinfer(self) -> str:
        try:
            return str(self.session.flashinfer)
        except MoERoutingError as error:
            # Said to every test that asks for the release, so also here.
            return str(error)

    @property
    def verdicts(self) -> list[VerdictRecord]:
        from pytest_moe_routing.oracle.record import VerdictRecord

        return [record for record in self.records.values() if isinstance(record, VerdictRecord)]

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        is_written = session.config.option.collectonly or self._write(session)
        if not is_written and session.exitstatus in PASSED:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _write(self, session: pytest.Session) -> bool:
        """Write the report files; whether all are written."""
        if stopped_early(session):
            self.problems = [
                f"report {path}: not written, because the run stopped early" for path in self.paths
            ]
            return False
        if self.paths:
            from pytest_moe_routing.report.files import write_report
        for path in self.paths:
            try:
                write_report(path, list(self.records.values()))
            except MoERoutingError as error:
                self.problems.append(str(error))
            else:
                self.written.append(path)
        if self.records and os.environ.get("GITHUB_ACTIONS") == "true":
            self._tell_github()
        return not self.problems

    def _tell_github(self) -> None:
        from pytest_moe_routing.report import github

        records = list(self.records.values())
        self.annotations = list(github.commands(records))
        try:
            github.append_summary(records)
        except MoERoutingError as error:
            self.problems.append(str(error))

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        skipped = left_out(terminalreporter.config)
        if terminalreporter.verbosity < 0:
            self._write_not_judged(terminalreporter)
        elif self.records or skipped or self.unanswered:
            self._write_summary(terminalreporter, skipped)
        for path in self.written:
            terminalreporter.write_line(printable(f"moe-routing: report {path}"))
        for line in self.annotations:
            terminalreporter.write_line(line)
        for problem in self.problems:
            terminalreporter.write_line(f"moe-routing: {problem}", red=True)

    def _write_not_judged(self, reporter: pytest.TerminalReporter) -> None:
        """Write the one line about what is not judged that a quiet run has."""
        verdicts = sum(not verdict.verdict.is_given for verdict in self.verdicts)
        within = len(self.unanswered)
        parts = [
            f"{count} {what}{'' if count == 1 else 's'}{where}"
            for count, what, where in (
                (verdicts, "verdict", ""),
                (self.skipped, "skipped test", ""),
                (within, "question", " within tests"),
            )
            if count
        ]
        if parts:
            reporter.ensure_newline()
            reporter.write_line(f"moe-routing: not judged: {', '.join(parts)}")

    def _write_summary(self, reporter: pytest.TerminalReporter, skipped: Counter[str]) -> None:
        from pytest_moe_routing.report import terminal

        width = reporter._tw.fullwidth
        reporter.ensure_newline()
        every = reporter.verbosity > 0
        lines: list[terminal.Line] = []
        if self.verdicts:
            reporter.section("MoE routing verdicts")
            lines += terminal.summary(self.verdicts, every=every, width=width)
        for text in self.unanswered.lines(every=every):
            lines += terminal.wrapped(text, width)
        if skipped:
            reasons = (
                f"{count} {why if count > 1 else why.replace('tests', 'test', 1)}"
                for why, count in skipped.most_common()
            )
            lines += terminal.wrapped(f"left out: {', '.join(reasons)}", width)
        for line in lines:
            for piece in line:
                reporter.write(printable(piece.text), **piece.markup)
            reporter.write_line("")


def _words(properties: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the properties of a test, those with structure as several short ones."""
    for name, value in properties.items():
        if name == "moe_verdict":
            for part in ("model", "scheme", "target", "release", "flashinfer", "verdict"):
                yield f"moe_{part}", value[part]
        elif name == "moe_failures":
            yield "moe_cause", ", ".join(failure["cause"] for failure in value)
        elif name == PROPERTY:
            for sentence, counts in value.items():
                yield name, told(sentence, sum(counts.values()))
        elif name == "moe_not_judged":
            yield name, value["reason"]
        elif not (name.startswith("moe_") and isinstance(value, dict)):
            yield name, value


def _message(report: pytest.CollectReport | pytest.TestReport) -> str:
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return excerpt(report.longreprtext, _LINES)
