"""Slow tests say that they run: on a terminal, and not in a log."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from pytest_moe_routing.kernels import build

RUN = (
    *("--moe-golden", "--moe-target", "miniatures:Vllm022", "-k", "test_quick"),
    *("-p", "no:cacheprovider", "test_config_sweep.py"),
)


def on_a_terminal(command, **options):
    """Run a command whose output is a terminal, and return what it shows."""
    master, slave = pty.openpty()
    process = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, **options)
    os.close(slave)
    shown = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:  # Linux says so when the last writer is gone
            break
        if not part:
            break
        shown += part
    process.wait()
    os.close(master)
    return shown.decode()


@pytest.fixture
def run(host):
    """A run of a quick test in a module that has the name of a slow one."""
    host.makeini("[pytest]\n")
    host.makepyfile(test_config_sweep="def test_quick(): pass")
    return [sys.executable, "-m", "pytest", *RUN]


@pytest.mark.parametrize("workers", [(), ("-n2",)], ids=["serial", "n2"])
def test_a_terminal_sees_which_slow_test_runs(run, host, workers):
    shown = on_a_terminal([*run, *workers], cwd=host.path)
    assert "running test_quick ..." in shown
    assert "1 passed" in shown


def test_a_log_does_not(run, host):
    result = subprocess.run(run, cwd=host.path, capture_output=True, text=True, check=False)
    assert "1 passed" in result.stdout
    assert "running" not in result.stdout + result.stderr


def test_suite_tests_that_pass_are_dots_on_a_terminal_only(host):
    """A log has a line for each module. Tests of the host are shown as pytest shows them."""
    suite = "test_verdicts.py::test_verdict[mixtral-8x7b-bf16]"
    tests = ["test_host.py", f"pytest_moe_routing/suite/{suite}"]
    run = [sys.executable, "-m", "pytest", "--moe-golden", "-p", "no:cacheprovider", *tests]
    result = subprocess.run(run, cwd=host.path, capture_output=True, text=True, check=False)
    assert "2 passed" in result.stdout
    name = re.escape(suite.partition("::")[0])
    assert re.search(r"^test_host.py \. ", result.stdout, re.MULTILINE)
    assert re.search(rf"^\S*{name} +\[100%\]", result.stdout, re.MULTILINE)
    shown = on_a_terminal(run, cwd=host.path)
    assert re.search(rf"{name}\W.*\. .*100%", shown)


def test_a_build_is_announced_on_a_terminal(tmp_path):
    with (
        (tmp_path / "log").open("w") as log,
        build.one_at_a_time(tmp_path / "l", "x", log.fileno()),
    ):
        pass
    assert (tmp_path / "log").read_text() == ""
    master, slave = pty.openpty()
    with build.one_at_a_time(tmp_path / "l", "the kernels", slave):
        pass
    assert b"moe-routing: building the kernels, which takes minutes" in os.read(master, 200)
    os.close(master)
    os.close(slave)
