"""What a run leaves in the terminal: the verdict table, and what the GPU tests came to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


class Reporter:
    """Collects verdicts and GPU outcomes from test reports, xdist workers' included."""

    def __init__(self, *, require_gpu: bool) -> None:
        self.require_gpu = require_gpu
        self.verdicts: list[dict[str, str]] = []
        self.gpu: Counter[str] = Counter()
        self.gpu_skips: Counter[str] = Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties: dict[str, Any] = dict(report.user_properties)
        if report.when == "call" and "moe_verdict" in properties:
            self.verdicts.append(properties["moe_verdict"])
        if "moe_gpu" in properties and (report.when == "call" or report.outcome == "skipped"):
            self.gpu[report.outcome] += 1
            if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
                self.gpu_skips[report.longrepr[2]] += 1

    @property
    def lacks_gpu(self) -> bool:
        return self.require_gpu and not (self.gpu["passed"] or self.gpu["failed"])

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.lacks_gpu and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        write = terminalreporter.write_line
        if self.verdicts:
            terminalreporter.section("MoE routing verdicts")
            for line in table(self.verdicts):
                write(line)
        if self.lacks_gpu:
            write(
                f"moe-routing: --moe-require-gpu, but no GPU test ran; {sum(self.gpu.values())} "
                "were skipped:",
                red=True,
            )
            for reason, count in self.gpu_skips.most_common():
                write(f"  {count} x {reason}", red=True)


def table(verdicts: list[dict[str, str]]) -> list[str]:
    """Verdicts as a table: one row per model, one column per backend."""
    models = sorted({v["model"] for v in verdicts})
    backends = list(
        dict.fromkeys(v["backend"] for v in sorted(verdicts, key=lambda v: v["backend"]))
    )
    cells = {
        (v["model"], v["backend"]): v["verdict"]
        + (f" ({v['method']})" if v["verdict"] != "fallback" else "")
        for v in verdicts
    }
    rows = [["model", *backends]]
    rows += [
        [model, *(cells.get((model, backend), "-") for backend in backends)] for model in models
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    counts = Counter(v["verdict"] for v in verdicts)
    total = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    contexts = sorted({f"{v['target']}, {v['flashinfer']}" for v in verdicts})
    return [*lines, f"{total}; {'; '.join(contexts)}"]
