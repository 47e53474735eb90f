"""Children that are forks of one process which has imported torch."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from processes import wait_until_gone

from pytest_moe_routing.targets import child as children
from pytest_moe_routing.targets import forked
from pytest_moe_routing.targets.probe import Probe

CHILD = """
import os, sys, time
imported = "torch" in sys.modules
from pytest_moe_routing.targets.server import serve

def about():
    return {"pid": os.getpid(), "parent": os.getppid(), "imported": imported}

def name():
    with open("/proc/self/comm") as file:
        return file.read().strip()

def die(code):
    os._exit(code)

def wait():
    time.sleep(1.5)
    return "fine"

def main():
    serve({"about": about, "name": name, "die": die, "wait": wait, "arguments": lambda: sys.argv})
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks on Linux alone")


@pytest.fixture
def probe(tmp_path, monkeypatch):
    """A function that makes the probe of one and the same module."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "child_of_forks.py").write_text(textwrap.dedent(CHILD))
    made = []

    def make(*arguments):
        made.append(Probe("mine", "child_of_forks", *arguments))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_children_are_forks_of_one_process(probe):
    first, second = probe("a").ask("about"), probe("b").ask("about")
    assert first["parent"] == second["parent"]
    assert first["parent"] not in (os.getpid(), os.getppid())
    assert first["pid"] != second["pid"]
    assert first["imported"]
    assert second["imported"]


def test_each_has_its_name_and_arguments(probe):
    assert probe().ask("name") == "child_of_forks"
    assert probe("one", "two").ask("arguments") == ["child_of_forks", "one", "two"]


def test_where_nothing_is_forked_a_child_starts_by_itself(probe, monkeypatch):
    monkeypatch.setattr(children, "can_fork", lambda: False)
    mine = probe()
    about = mine.ask("about")
    assert about["parent"] == os.getpid()
    assert not about["imported"]
    with pytest.raises(Exception, match="its process ended with 3"):
        mine.ask("die", code=3)
    other = probe("other")
    pid = other.ask("about")["pid"]
    other.close()
    assert wait_until_gone(pid)


def test_where_the_system_forbids_what_it_needs_nothing_is_forked(monkeypatch):
    def refused(pid):
        raise PermissionError(1, "Operation not permitted")

    assert forked.can_fork()
    forked.can_fork.cache_clear()
    monkeypatch.setattr(os, "pidfd_open", refused)
    assert not forked.can_fork()
    forked.can_fork.cache_clear()


@pytest.mark.parametrize("size", [50_000, 70_000, 120_000])
def test_a_request_of_any_size_has_a_child(probe, monkeypatch, size):
    """One that the server does not read to its end would end the server."""
    for name in ("MOE_A", "MOE_B"):
        monkeypatch.setenv(name, "x" * size)
    assert probe().ask("about")["imported"] is (size == 50_000)


def test_a_child_goes_on_without_the_server(probe):
    mine = probe()
    server = mine.ask("about")["parent"]
    killer = threading.Timer(0.3, os.kill, (server, signal.SIGKILL))
    killer.start()
    assert mine.ask("wait") == "fine"
    with pytest.raises(Exception, match="its process ended with -9"):
        mine.ask("die", code=3)


def test_a_child_that_cannot_be_asked_for_leaves_the_others(probe, monkeypatch):
    first = probe()
    first.ask("about")

    def too_many(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(forked.socket, "send_fds", too_many)
        assert not probe("second").ask("about")["imported"]
    assert first.ask("wait") == "fine"


def test_a_server_that_is_gone_is_replaced(probe):
    """What it has forked goes on to answer, and ends with us."""
    before = probe("before")
    about = before.ask("about")
    os.kill(about["parent"], signal.SIGKILL)
    assert wait_until_gone(about["parent"])
    assert before.ask("name") == "child_of_forks"
    assert probe("next").ask("name")
    after = probe("after").ask("about")
    assert after["imported"]
    assert after["parent"] not in (about["parent"], os.getpid())
    before.close()
    assert wait_until_gone(about["pid"])


def test_threads_that_ask_at_once_have_one_server(probe, monkeypatch):
    class Slow(forked._ForkServer):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            time.sleep(0.5)

    monkeypatch.setattr(forked, "_server", None)
    monkeypatch.setattr(forked, "_ForkServer", Slow)
    probes = [probe(str(number)) for number in range(3)]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda each: each.ask("about"), probes))
    assert len({about["pid"] for about in found}) == 3
    assert len({about["parent"] for about in found}) == 1
    assert forked._server.is_ours()
    for each in probes:
        each.close()


def test_a_request_may_have_the_descriptors_of_a_child_that_is_gone(probe):
    """A server that finds both at once does not take one for the other."""
    first = probe("first")
    about = first.ask("about")
    for number in range(5):
        os.kill(about["parent"], signal.SIGSTOP)
        process = first._child._process
        os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        second = probe(str(number))
        second.start()
        os.kill(about["parent"], signal.SIGCONT)
        assert second.ask("about")["parent"] == about["parent"]
        first = second


def test_a_copy_of_this_process_has_a_server_of_its_own(probe):
    ours = probe("ours").ask("about")
    reading, writing = os.pipe()
    copy = os.fork()
    if copy == 0:
        try:
            theirs = Probe("mine", "child_of_forks", "theirs")
            os.write(writing, str(theirs.ask("about")["parent"]).encode())
            theirs.close()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        parent = int(file.read())
    os.waitpid(copy, 0)
    assert parent != ours["parent"]
    # It ends with the last process that could ask it.
    assert wait_until_gone(parent)
    assert probe("again").ask("about")["parent"] == ours["parent"]


def test_a_child_that_another_thread_has_ended_is_not_waited_for(probe):
    mine = probe()
    mine.ask("about")
    process = mine._child._process
    mine.close()
    started = time.monotonic()
    assert process.wait(20.0) == -signal.SIGKILL
    assert time.monotonic() - started < 5


def test_a_child_that_is_ended_before_it_is_forked(probe, tmp_path):
    """As by an interrupt while torch is imported: nothing is left of it."""
    server = forked._server
    forked._server = None
    try:
        mine = probe("early")
        mine.start()
        folder = mine._child._folder
        mine.close()
        assert not folder.exists()
        about = probe("late").ask("about")
        assert about["imported"]
        forks = Path(f"/proc/{about['parent']}/task/{about['parent']}/children")
        for child in forks.read_text().split():
            assert child == str(about["pid"]) or wait_until_gone(int(child))
    finally:
        forked._server = server
