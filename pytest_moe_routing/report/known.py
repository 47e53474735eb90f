"""Writes a first ledger of known failures from what a run found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.failure import NO_ANSWERS, failures_of
from pytest_moe_routing.report.endings import stopped_early

if TYPE_CHECKING:
    from pytest_moe_routing.session import MoESession

_HEADER = """\
# Known failures, written by --moe-write-known-failures. Every entry silences one cause in the cases
# that it lists: give it a reason, a link to where the failure is tracked, and, if it is known, the
# range of releases.
"""


#: So many further schemes or models are named in a reason.
_NAMED = 8


def _also(about: Sequence[str]) -> str:
    """Return what a reason says besides the failure that a cause was first seen in."""
    _, *others = dict.fromkeys(about)
    more = f" and {len(others) - _NAMED} more" if others[_NAMED:] else ""
    return f"; also {', '.join(others[:_NAMED])}{more}" if others else ""


class LedgerWriter:
    """The one of a run: registered where the terminal is, not in xdist's workers.

    Args:
        path: The ledger to write; there must be none yet.

    Raises:
        MoERoutingError: There is something at the path.
    """

    def __init__(self, session: MoESession, path: Path) -> None:
        if path.exists():
            raise MoERoutingError(
                f"--moe-write-known-failures: {path} already exists; delete it, or "
                "name another file"
            )
        self.session = session
        self.path = path.absolute()
        #: Why the ledger is not written.
        self.not_written = ""
        #: What each cause says first, by test and cause, and its cases.
        self.causes: dict[tuple[str, str], str] = {}
        self.cases: dict[tuple[str, str], set[str]] = {}
        #: The schemes of each cause, or whatever else its failures are about.
        self.about: dict[tuple[str, str], list[str]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        test, _, case = report.nodeid.rpartition("::")[2].partition("[")
        for failure in failures_of(report.user_properties) if report.failed else ():
            self.causes.setdefault((test, failure.cause), failure.lines[0])
            about = self.about.setdefault((test, failure.cause), [])
            about.append(failure.case.rpartition(" ")[2])
            # A test without parameters has one case, which needs no name.
            self.cases.setdefault((test, failure.cause), set()).add(case.removesuffix("]") or "*")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if stopped_early(session):
            self.not_written = "the run stopped early"
            return
        if any(cause == NO_ANSWERS for _, cause in self.causes):
            self.not_written = "the target did not answer all questions"
            return
        import yaml

        from pytest_moe_routing.goldens import write_in_one_step

        target = self.session.target_id.name
        entries = [
            {
                "test": test,
                "cause": cause,
                "target": target,
                "reason": reason + _also(self.about[test, cause]),
                "cases": sorted(self.cases[test, cause]),
            }
            for (test, cause), reason in sorted(self.causes.items())
        ]
        # Lists stand on as few lines as they fit on.
        text = yaml.safe_dump(
            entries, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
        )
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_in_one_step(self.path, _HEADER + (text if entries else ""))
        except OSError as error:
            self.not_written = f"it cannot be written: {error.strerror}"
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.not_written:
            terminalreporter.write_line(
                f"moe-routing: {self.path} not written, because {self.not_written}", red=True
            )
            return
        count = len(self.causes)
        causes = "1 cause" if count == 1 else f"{count} causes"
        terminalreporter.write_line(f"moe-routing: {causes} written to {self.path}")
