"""How a run ended, as far as reports depend on it."""

from __future__ import annotations

import pytest

#: Exit statuses of a run that failed nowhere.
PASSED = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


def stopped_early(session: pytest.Session) -> bool:
    """Return whether tests that were chosen did not run: half a result looks like a whole one."""
    ended = session.exitstatus in (*PASSED, pytest.ExitCode.TESTS_FAILED)
    return bool(not ended or session.shouldfail or session.shouldstop)
