"""A child process ends with the process that asks it, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import is_alive, wait_until_gone

#: A shell has what it runs in the background ignore interrupts, and the tests with it.
PARENT = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {path!r})
from pytest_moe_routing.targets import child
from pytest_moe_routing.targets.probe import Probe
child.can_fork = lambda: {forks}
probe = Probe("mine", "child_0")
print(probe.ask("pids"), flush=True)
try:
    probe.ask({question!r})
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(1000)
"""
CHILD = """
import os, signal, time
from pytest_moe_routing.targets.server import serve
def loop():
    while True: pass
def pids():
    forked = os.fork()
    if not forked:
        time.sleep(1000)
    return [os.getpid(), forked, os.getcwd()]
def main():
    serve({
        "pids": pids,
        "loop": loop,
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    })
"""


@pytest.mark.parametrize("forks", [True, False], ids=["fork", "own"])
@pytest.mark.parametrize("question", ["loop", "stop"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_it_ends_with_the_process_that_asks(tmp_path, question, how, forks):
    """Also if it loops or is stopped; after an interrupt, even before its parent ends."""
    if sys.platform != "linux":
        pytest.skip("uses /proc")
    (tmp_path / "child_0.py").write_text(CHILD)
    program = PARENT.format(path=str(tmp_path), question=question, forks=forks)
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        pid, forked, home = eval(parent.stdout.readline())
        time.sleep(0.5)
        assert is_alive(pid)
        parent.send_signal(how)
        if how == signal.SIGINT:
            assert parent.stdout.readline() == "interrupted\n"
        assert wait_until_gone(pid)
        assert wait_until_gone(forked)
        for _ in range(50):
            if not Path(home).exists():
                break
            time.sleep(0.1)
        assert not Path(home).parent.exists()
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
