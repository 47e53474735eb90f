"""Forked runs of pytest are as new processes are, but for what is imported."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import miniatures
import pytest

INNER = """
import os, sys
import miniatures

def test_inner():
    assert os.getppid() == OUTER
    assert not hasattr(miniatures, "left")
    assert "torch" in sys.modules
    for number in range(3, 100):
        if os.path.exists(f"/proc/self/fd/{number}"):
            assert os.readlink(f"/proc/self/fd/{number}") != PIPE
"""


def test_a_run_is_a_process_of_its_own_without_what_this_one_left(host, monkeypatch):
    monkeypatch.setattr(miniatures, "left", True, raising=False)
    reads, writes = os.pipe()
    pipe = str(Path(f"/proc/self/fd/{reads}").readlink())
    host.makepyfile(test_host=f"OUTER, PIPE = {os.getpid()}, {pipe!r}\n{INNER}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = host.runpytest_subprocess("-p", "no:cacheprovider")
    os.close(reads)
    os.close(writes)
    assert result.ret == pytest.ExitCode.OK
    result.assert_outcomes(passed=1)
    assert miniatures.left


@pytest.mark.parametrize(
    ("line", "status"),
    [("os._exit(3)", 3), ("os.kill(os.getpid(), 9)", -9), ("raise KeyboardInterrupt", 2)],
)
def test_however_it_ends_this_one_goes_on(host, line, status):
    host.makepyfile(test_host=f"import os\ndef test_inner(): {line}\n")
    assert host.runpytest_subprocess("-p", "no:cacheprovider").ret == status


def test_workers_find_what_the_run_finds(host):
    host.makepyfile(test_host="import miniatures\ndef test_inner(): pass\n")
    result = host.runpytest_subprocess("-p", "no:cacheprovider", "-n1")
    result.assert_outcomes(passed=1)
