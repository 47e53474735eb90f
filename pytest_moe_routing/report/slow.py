"""Says on a terminal which slow test is running; a log gets nothing of it."""

from __future__ import annotations

from collections.abc import Collection

import pytest


class SlowTests:
    """The one of a run: registered where the terminal is, not in xdist's workers.

    Args:
        modules: Names of the suite's modules whose tests take long in this run.
    """

    def __init__(self, config: pytest.Config, modules: Collection[str]) -> None:
        self.config = config
        self.modules = modules

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        terminal = self.config.pluginmanager.get_plugin("terminalreporter")
        path, _, test = nodeid.partition("::")
        if terminal is None or not terminal.isatty or terminal.verbosity != 0:
            return
        if path.rpartition("/")[2].removesuffix(".py") in self.modules:
            terminal.ensure_newline()
            terminal.write_line(f"running {test} ...", light=True)
