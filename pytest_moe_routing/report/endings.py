"""How a run went, as far as reports depend on it. A plugin of every process of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

#: Exit statuses of a run that failed nowhere.
PASSED = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)
#: There if every test that was chosen ran.
_FINISHED = pytest.StashKey[bool]()
_LEFT_OUT = pytest.StashKey[Counter[str]]()
#: Where a worker leaves what it left out for the controller.
_OUTPUT = "moe_left_out"


def stopped_early(session: pytest.Session) -> bool:
    """Return whether tests that were chosen did not run: half a result looks like a whole one."""
    # A second Ctrl-C may end pytest's handling of the first one: the exit status is then that of a
    # run that passed.
    ended = session.exitstatus in (*PASSED, pytest.ExitCode.TESTS_FAILED)
    finished = ended and session.stash.get(_FINISHED, False)
    return bool(not finished or session.shouldfail or session.shouldstop)


def leave_out(config: pytest.Config, reasons: Iterable[str]) -> None:
    """Remember the reason of each collected test that the run does not ask."""
    config.stash[_LEFT_OUT] = Counter(reasons)


def left_out(config: pytest.Config) -> Counter[str]:
    """Return how many tests the run does not ask, by reason."""
    return config.stash.get(_LEFT_OUT, Counter())


@pytest.hookimpl(wrapper=True)
def pytest_runtestloop(session: pytest.Session) -> Iterator[None]:
    result = yield
    session.stash[_FINISHED] = True
    return result


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output[_OUTPUT] = dict(left_out(session.config))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker left out; each of them collects all."""
    if found := getattr(node, "workeroutput", {}).get(_OUTPUT):
        leave_out(node.config, Counter(found).elements())
