"""Questions that a thread asks before the tests do."""

from __future__ import annotations

import textwrap
import threading
import time
from types import SimpleNamespace

import pytest
from processes import wait_until_gone

from pytest_moe_routing.data import packaged_directory
from pytest_moe_routing.errors import TargetError
from pytest_moe_routing.models import load_named
from pytest_moe_routing.oracle import swept_configs
from pytest_moe_routing.oracle.swept_configs import _all_models, is_far, swept_models
from pytest_moe_routing.session import MoESession
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


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """As after the first question of a run that has no answer from an earlier one."""
    monkeypatch.setattr(probes, "CHILD_STARTED", threading.Event())
    probes.CHILD_STARTED.set()


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


def item(name, file, **params):
    config, callspec = SimpleNamespace(), SimpleNamespace(params=params)
    return SimpleNamespace(originalname=name, path=SUITE / file, config=config, callspec=callspec)


def test_a_thread_asks_what_the_tests_will_ask(probe):
    questions = [Questions(probe, "note", [{"word": word}]) for word in ("a", "b")]
    with asking_ahead(target_of(*questions), items(), SESSION):
        # A test waits for the question that the thread asks.
        while not probe._replies:
            time.sleep(0.01)
        assert probe.ask("note", word="b") == ["a", "b"]
    assert probe.ask("note", word="a") == ["a"]


def test_the_first_child_is_asked_what_the_sweep_and_models_need(probe):
    """The tests' own models, then scheme by scheme routers near a family, and far from all."""
    model = load_named("deepseek-r1", packaged_directory())
    near, far = ([n for n in swept_models() if is_far(n) is other] for other in (False, True))
    told = {tuple(near): "near", tuple(far): "far", (model,): "model"}

    class Mine(FrameworkTarget):
        name = package = "mine"

        def verdict_questions(self, models, scheme, *, thorough=True):
            word = f"{scheme} {told[tuple(models)]} {thorough}"
            yield Questions(probe, "note", [{"word": word}])
            # Each after the answers to those before it.
            assert probe._replies

        def choice_questions(self, models, scheme):
            yield Questions(probe, "note", [{"word": f"{scheme} {told[tuple(models)]} choice"}])

        def modular_questions(self, models, scheme):
            yield Questions(probe, "note", [{"word": f"{scheme} {told[tuple(models)]} modular"}])

    verdicts = "test_verdicts.py"
    tests = [
        item("test_config_sweep", "test_config_sweep.py", moe_scheme="bf16"),
        item("test_verdict", verdicts, moe_model=model, moe_scheme="nvfp4"),
        item("test_verdict", verdicts, moe_model=model, moe_scheme="bf16"),
        item("test_modular_call", verdicts, moe_model=model, moe_scheme="nvfp4"),
    ]
    with asking_ahead(Mine.__new__(Mine), tests, SESSION):
        for thread in threading.enumerate():
            if thread.name == "moe-routing-ahead":
                thread.join()
    *_, last = (value for _, value in probe._replies.values())
    assert last == [
        *("nvfp4 model True", "nvfp4 model choice", "bf16 model True", "bf16 model choice"),
        *("nvfp4 model modular", "bf16 near True", "bf16 far False"),
    ]


@pytest.mark.parametrize(
    ("test", "function"),
    [
        ("test_checkpoints", "served.served_otherwise"),
        ("test_around_call", "ignored.ignored_requests"),
    ],
    ids=["of the first child", "of another child"],
)
def test_a_thread_does_ahead_what_tests_do_with_one_question_after_the_other(
    probe, monkeypatch, test, function
):
    """What fails there fails again in the test, and keeps nothing else from being asked."""

    def check(target, scheme, models):
        if scheme == "bf16":
            probe.ask("die")
        probe.ask("note", word=scheme)

    monkeypatch.setattr(f"pytest_moe_routing.oracle.{function}", check)
    session = SimpleNamespace(models_in=lambda scheme: ["a model"])
    verdicts = "test_verdicts.py"
    schemes = "mxfp8", "bf16", "nvfp4"
    tests = [item(test, verdicts, moe_scheme=s) for s in schemes]
    with asking_ahead(target_of(), tests, session):
        for thread in threading.enumerate():
            if thread.name == "moe-routing-ahead":
                thread.join()
    assert [value for _, value in probe._replies.values()] == [["mxfp8"], ["nvfp4"]]
    with pytest.raises(TargetError, match="target mine: die: its process ended with 3"):
        probe.ask("die")


def test_many_questions_are_asked_a_few_at_a_time(probe):
    """So another thread has its turn soon."""
    assert probe.ask_ahead("note", [{"word": n} for n in range(120)])
    assert probe._number == 3
    assert probe.ask("note", word=119) == [*range(120)]


def test_processes_of_a_parallel_run_ask_nothing_ahead(probe):
    questions = [Questions(probe, "note", [{"word": "a"}])]
    with asking_ahead(target_of(*questions), items(workerinput={}), SESSION):
        assert threading.active_count() == 1
        assert probe.ask("note", word="b") == ["b"]


def test_nothing_is_done_ahead_before_a_question_without_an_answer(probe):
    """Until then, all answers are known from an earlier run: a thread would only cost time."""
    probes.CHILD_STARTED.clear()
    questions = [Questions(probe, "note", [{"word": "a"}])]
    with asking_ahead(target_of(*questions), items(), SESSION):
        time.sleep(0.3)
        assert probe._replies == {}
        probe.ask("note", word="b")
        while len(probe._replies) < 2:
            time.sleep(0.01)
    assert probe.ask("note", word="a") == ["b", "a"]


def test_threads_that_need_the_swept_models_at_once_have_the_same_ones(monkeypatch):
    """What is known of a model is found by comparing it, unless it is the same object."""
    _all_models.cache_clear()
    routers, found = swept_configs.swept_routers, []
    monkeypatch.setattr(
        swept_configs, "swept_routers", lambda *a: time.sleep(0.1) or routers(*a)[:9]
    )
    threads = [threading.Thread(target=lambda: found.append(swept_models())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.undo()
    _all_models.cache_clear()
    assert found[0] is found[1]


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


def test_the_end_of_a_run_ends_the_thread_among_many_questions(probe):
    """It asks neither the rest of them nor what depends on their answers."""
    went_on = []

    class Mine(FrameworkTarget):
        name = package = "mine"

        def questions_ahead(self, method, models):
            yield Questions(probe, "note", ({"word": n, "seconds": 0.01} for n in range(10_000)))
            went_on.append(method)

    with asking_ahead(Mine.__new__(Mine), items(), SESSION):
        while not probe._replies:
            time.sleep(0.01)
    assert "moe-routing-ahead" not in {thread.name for thread in threading.enumerate()}
    assert len(probe._replies) < 1000
    assert went_on == []


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


def test_a_child_starts_before_it_is_asked(probe):
    probe.start()
    begun = probe._child
    assert probe.ask("note", word="a") == ["a"]
    assert probe._child is begun


def test_a_child_that_may_not_be_asked_does_not_start(probe):
    probe._earlier = {"a question": ("answer", 1)}
    probe.start()
    assert probe._child is None


@pytest.mark.parametrize("serial", [True, False])
def test_children_start_where_this_process_runs_the_tests(serial, monkeypatch):
    done = []

    class Mine(FrameworkTarget):
        name = package = "mine"

        def start(self):
            done.append("start")

        def method_numbers(self):
            done.append("ask")

    session = MoESession("mine", [], [], None, [])
    for name in ("located", "flashinfer", "models", "target"):
        monkeypatch.setattr(MoESession, name, Mine.__new__(Mine))
    session.check(ask=True, serial=serial)
    assert done == ["start", "ask"] if serial else ["ask"]
