"""What the GPU tests of a run came to: on which GPU, with which software, and what did not run."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import PurePath
from typing import Self

import pytest

from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.escape import shorten

#: What can become of a test; of what its phases and its worker say, the last in this order counts.
OUTCOMES = ("unfinished", "passed", "xfailed", "skipped", "failed", "crashed")
#: Outcomes of tests that ran on a GPU.
RAN = ("passed", "xfailed", "failed", "crashed")


@dataclass
class GpuTest:
    """One test that asked for a GPU.

    Attributes:
        function: Its file and name. Not the node id's: that has no file in other repositories.
        machine: The `moe_gpu` property: GPU and software, or why there is no GPU (`missing`).
    """

    function: str
    machine: dict[str, str]
    outcome: str = OUTCOMES[0]
    reason: str = ""


class GpuReporter:
    """Collects GPU tests from reports, those of xdist's workers and of its crashes included.

    Attributes:
        wanted: How many GPU tests must have run.
        option: Who wants that many.
        tests: By node id.
    """

    def __init__(self, wanted: int, option: str) -> None:
        self.wanted = wanted
        self.option = option
        self.tests: dict[str, GpuTest] = {}

    @classmethod
    def of(cls, minimum: str | None, required: bool) -> Self:
        """Make the reporter that the options `--moe-min-gpu-tests` and `--moe-require-gpu` ask for.

        Raises:
            MoERoutingError: The minimum is not a number.
        """
        if minimum and not re.fullmatch("[0-9]{1,9}", minimum):
            found = repr(shorten(minimum))
            raise MoERoutingError(f"--moe-min-gpu-tests: found {found}, expected a number")
        if minimum and int(minimum):
            return cls(int(minimum), f"--moe-min-gpu-tests {minimum}")
        return cls(int(bool(required)), "--moe-require-gpu")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        machine = dict(report.user_properties).get("moe_gpu")
        if isinstance(machine, dict):
            path, _, name = report.location
            function = f"{PurePath(path).name}::{name.partition('[')[0]}"
            self.tests.setdefault(report.nodeid, GpuTest(function, machine))
        if report.nodeid not in self.tests:
            return
        test, outcome = self.tests[report.nodeid], _outcome(report)
        if OUTCOMES.index(outcome) > OUTCOMES.index(test.outcome):
            test.outcome = outcome
            if outcome == "skipped" and isinstance(report.longrepr, tuple):
                test.reason = report.longrepr[2].removeprefix("Skipped: ")

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(
        self, report: pytest.CollectReport | pytest.TestReport
    ) -> tuple[str, str, str] | None:
        """Show no letter for a test that there is no GPU for: they are counted in one line."""
        if not isinstance(report, pytest.TestReport) or not report.skipped:
            return None
        machine = dict(report.user_properties).get("moe_gpu")
        is_without = isinstance(machine, dict) and "missing" in machine
        return ("skipped", "", "SKIPPED") if is_without else None

    @property
    def ran(self) -> int:
        """How many tests ran on a GPU."""
        return sum(test.outcome in RAN for test in self.tests.values())

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.ran < self.wanted and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.tests and terminalreporter.verbosity >= 0:
            terminalreporter.ensure_newline()
            terminalreporter.section("MoE routing on GPUs")
            every = terminalreporter.verbosity > 0
            for line in lines(list(self.tests.values()), every=every):
                terminalreporter.write_line(line)
        if self.ran < self.wanted:
            skipped = sum(test.outcome == "skipped" for test in self.tests.values())
            terminalreporter.write_line(
                f"moe-routing: {self.option}: {self.ran} GPU tests ran, expected at least "
                f"{self.wanted}; {skipped} were skipped",
                red=True,
            )


def _outcome(report: pytest.TestReport) -> str:
    if report.when not in ("setup", "call", "teardown"):
        return "crashed"  # xdist's report of the test that a worker died in is of no phase
    if report.outcome == "passed":
        return "passed" if report.when == "call" else "unfinished"
    if hasattr(report, "wasxfail"):
        return "xfailed"
    return report.outcome if report.outcome in OUTCOMES else "unfinished"  # a rerun, say


def lines(tests: list[GpuTest], *, every: bool = True) -> list[str]:
    """Return the software, each GPU with its outcomes by test function, and reasons of skips.

    Args:
        every: Also show the test functions that had no GPU at all.
    """
    shown = [
        f"{key} {', '.join(values)}"
        for key in dict.fromkeys(key for test in tests for key in test.machine)
        if key not in ("gpu", "uuid", "worker", "missing")
        if (values := sorted({test.machine[key] for test in tests if key in test.machine}))
    ]
    gpus: dict[str, list[GpuTest]] = {}
    for test in tests:
        if every or "missing" not in test.machine:
            gpus.setdefault(_name(test.machine), []).append(test)
    for name, those in sorted(gpus.items()):
        workers = {test.machine["worker"] for test in those if "worker" in test.machine}
        by_number = sorted(workers, key=lambda worker: (len(worker), worker))
        shown.append(name + (f": {', '.join(by_number)}" if workers else ""))
        functions: dict[str, Counter[str]] = {}
        for test in those:
            functions.setdefault(test.function, Counter())[test.outcome] += 1
        width = max(map(len, functions))
        shown += [
            f"  {function:{width}}  {_counts(c)}" for function, c in sorted(functions.items())
        ]
    skips = Counter(test.reason for test in tests if test.outcome == "skipped")
    shown += [f"{count} skipped: {reason}" for reason, count in skips.most_common()]
    return shown


def _name(machine: dict[str, str]) -> str:
    return "no GPU" if "missing" in machine else f"{machine['gpu']}, {machine['uuid']}"


def _counts(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[o]} {o}" for o in reversed(OUTCOMES) if counts[o])
