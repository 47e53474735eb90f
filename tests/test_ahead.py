"""Questions that a thread asks before the tests do."""

from __future__ import annotations

import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
from processes import wait_until_gone

from pytest_moe_routing.errors import TargetError
from pytest_moe_routing.suite.ahead import asking_ahead
from pytest_moe_routing.suite.selection import SUITE
from pytest_moe_routing.targets import probe as probes
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.probe import Limits, Probe, Questions

CHILD = """
import os, time
from pytest_moe_routing.targets.server import serve

asked = []

def note(word, seconds=0.0):
    time.sleep(seconds)
    asked.append(word)
    return asked

def die():
    os._exit(3)

def main():
    serve({"note": note, "die": die, "pid": os.getpid})
"""


@pytest.fixture
def probe(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(probes, "LIMITS", Limits(seconds=60.0))
    (tmp_path / "child_of_test.py").write_text(textwrap.dedent(CHILD))
    made = Probe("mine", "child_of_test")
    yield made
    made.close()


def target_of(*questions):
    """A framework whose further questions are these, whatever test and models they are for."""

    class Mine(FrameworkTarget):
        name = package = "mine"

        def questions_ahead(self, method, models):
            assert (method, list(models)) == ("router_runs", ["a model"])
            return questions

    return Mine.__new__(Mine)


def items(**config):
    path = SUITE / "test_router.py"
    return [
        SimpleNamespace(originalname="test_router", path=path, config=SimpleNamespace(**config))
    ]


SESSION = SimpleNamespace(models=["a model"])


def test_a_thread_asks_what_the_tests_will_ask(probe):
    questions = [Questions(probe, "note", [{"word": word}]) for word in ("a", "b")]
    with asking_ahead(target_of(*questions), items(), SESSION):
        # A test waits for the question that the thread asks.
        while not probe._replies:
            time.sleep(0.01)
        assert probe.ask("note", word="b") == ["a", "b"]
    assert probe.ask("note", word="a") == ["a"]


def test_processes_of_a_parallel_run_ask_nothing_ahead(probe):
    questions = [Questions(probe, "note", [{"word": "a"}])]
    with asking_ahead(target_of(*questions), items(workerinput={}), SESSION):
        assert threading.active_count() == 1
        assert probe.ask("note", word="b") == ["b"]


def test_threads_take_turns(probe):
    """A question of a test comes next, however many others the thread has."""
    questions = [Questions(probe, "note", [{"word": n, "seconds": 0.1}]) for n in range(30)]
    with asking_ahead(target_of(*questions), items(), SESSION):
        while not probe._replies:
            time.sleep(0.01)
        place = probe.ask("note", word="mine").index("mine")
    assert 1 <= place < 15


def test_a_child_that_fails_ahead_is_asked_again(probe):
    """What a test says does not depend on what a thread asked before."""
    assert probe.ask_ahead("note", [{"word": "a"}])
    assert not probe.ask_ahead("die", [{}])
    assert probe.ask("note", word="b") == ["b"]
    with pytest.raises(TargetError, match="target mine: die: its process ended with 3"):
        probe.ask("die")
    with pytest.raises(TargetError, match="target mine: die: its process ended with 3"):
        probe.ask("note", word="c")
    assert not probe.ask_ahead("note", [{"word": "c"}])


def test_the_thread_ends_at_a_child_that_fails(probe):
    questions = [Questions(probe, "die", [{}]), Questions(probe, "note", [{"word": "a"}])]
    with asking_ahead(target_of(*questions), items(), SESSION):
        for thread in threading.enumerate():
            if thread.name == "moe-routing-ahead":
                thread.join()
    assert probe._replies == {}


def test_the_end_of_a_run_ends_the_child_of_a_question_without_end(probe, monkeypatch):
    monkeypatch.setattr("pytest_moe_routing.suite.ahead._GRACE", 0.2)
    pid = probe.ask("pid")
    questions = [Questions(probe, "note", [{"word": "a", "seconds": 1000}])]
    start = time.monotonic()
    with asking_ahead(target_of(*questions), items(), SESSION):
        time.sleep(0.2)
    probe.close()
    assert time.monotonic() - start < 30
    assert wait_until_gone(pid)
