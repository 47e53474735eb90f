"""Each public defect that counts as caught is caught, by the case that its row names, in its words.

Releases are run from wheels, which MOE_WHEELS says where to find; rows without theirs are skipped.
"""

from __future__ import annotations

import os

import pytest
from known_bugs import DOCUMENT, HERE, LEAVES, STATUSES, bugs, node, options, page, run

BUGS = bugs()
CASES = [bug for bug in BUGS if bug.case]


def available(place):
    found = options(place)
    if found is None:
        pytest.skip(f"MOE_WHEELS has no {place}")
    return found


@pytest.fixture
def ours(pytester, monkeypatch):
    """Runs that find the targets of these tests."""
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
    # A latent cause is one line, which ends at the terminal's width.
    monkeypatch.setenv("COLUMNS", "400")
    return pytester


@pytest.mark.parametrize("bug", CASES, ids=str)
def test_caught(bug, ours):
    status, text = run(bug, available(bug.in_), ours)
    assert status == pytest.ExitCode.TESTS_FAILED, text
    assert bug.says in text


@pytest.mark.parametrize("bug", [bug for bug in CASES if bug.not_in], ids=str)
def test_gone(bug, ours):
    status, text = run(bug, available(bug.not_in), ours)
    assert status in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED), text
    assert bug.says not in text
    assert " skipped" not in text or (bug.left_open and bug.left_open in text)


def test_rows_are_whole():
    assert len({bug.id for bug in BUGS}) == len(BUGS)
    for bug in BUGS:
        assert bug.status in STATUSES
        caught = bool(bug.test) != bool(bug.case and bug.in_ and bug.says)
        assert caught == (bug.status == "caught"), bug
        assert bool(bug.because) != caught, bug
        assert bug.leaves in ("", *LEAVES), bug
        assert not (bug.leaves and caught), bug
        assert bug.leaves or bug.status != "not obtainable", bug


def test_cases_and_tests_are_there(pytester):
    """No row rests on a test that is gone."""
    # The ids of models that a config makes, and of a target's own routers, are of that run alone.
    own = [bug.config is not None or "test_router" in bug.case for bug in CASES]
    cases = [node(b.case).partition("[" if o else "\0")[0] for b, o in zip(CASES, own, strict=True)]
    tests = [f"{HERE}/{bug.test}" for bug in BUGS if bug.test]
    result = pytester.runpytest_subprocess("--collect-only", "-q", *cases, *tests)
    assert result.ret == 0


def test_page_is_up_to_date():
    assert DOCUMENT.read_text() == page()
