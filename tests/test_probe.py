"""A child process that is asked: what it may do to the process that asks, which is nothing."""

from __future__ import annotations

import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from processes import is_alive, wait_until_gone

import pytest_moe_routing
from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.targets import child as children
from pytest_moe_routing.targets import probe as probes
from pytest_moe_routing.targets import server
from pytest_moe_routing.targets.probe import Limits, Probe

BEGIN = """
import os, signal, sys, threading, time
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.server import serve

def echo(**arguments):
    return arguments

def main():
    serve({"echo": echo, "run": run})

"""


@pytest.fixture
def child(tmp_path, monkeypatch):
    """A function that makes the probe of a module with this text, with a short deadline."""
    monkeypatch.syspath_prepend(tmp_path)
    made = []

    def make(text, seconds=20.0, memory=Limits.memory, answer=Limits.answer, **options):
        name = f"child_{len(made)}"
        (tmp_path / f"{name}.py").write_text(BEGIN + textwrap.dedent(text))
        monkeypatch.setattr(probes, "LIMITS", Limits(seconds, memory, answer))
        made.append(Probe("mine", name, "argument", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_answers_past_all_noise(child):
    probe = child(
        """
        def run(word):
            print("noise of the framework")
            os.write(1, b"and of its C code")
            return [word, *sys.argv[1:], sys.stdin.read()]
        """
    )
    assert probe.ask("run", word="gr\u00fc\u00df") == ["gr\u00fc\u00df", "argument", ""]
    assert probe.ask("run", word="x" * 300_000) == ["x" * 300_000, "argument", ""]
    assert probe.ask("echo", a=[1, None, 2.5]) == {"a": [1, None, 2.5]}


@pytest.mark.parametrize("keeps", [True, False])
def test_it_keeps_bytecode_as_this_process_does_and_none_of_what_is_judged(
    child, tmp_path, monkeypatch, keeps
):
    monkeypatch.setattr(sys, "dont_write_bytecode", not keeps)
    (tmp_path / "judged.py").touch()
    probe = child("""
        def run():
            import judged
            return judged.__name__
        """)
    assert probe.ask("run") == "judged"
    kept = [path.name.partition(".")[0] for path in tmp_path.glob("__pycache__/*")]
    assert kept == (["child_0"] if keeps else [])


def test_what_it_cannot_answer_and_what_fails_are_answers(child):
    probe = child(
        """
        def run(how):
            if how == "unsupported":
                raise Unsupported("not known to 0.1")
            return 1 / 0 if how == "fail" else object()
        """
    )
    with pytest.raises(Unsupported, match=r"mine: not known to 0\.1"):
        probe.ask("run", how="unsupported")
    with pytest.raises(TargetError, match=r"(?s)mine failed at run:.*ZeroDivisionError"):
        probe.ask("run", how="fail")
    with pytest.raises(TargetError, match="not JSON serializable") as caught:
        probe.ask("run", how="object")
    place, _, raised = caught.value.summary.removeprefix("target mine failed at run: ").partition(
        " "
    )
    assert place.startswith("pytest_moe_routing/targets/server.py:")
    assert raised == "TypeError: Object of type object is not JSON serializable"
    assert probe.ask("echo", word="still here") == {"word": "still here"}


def test_the_text_of_an_exception_has_an_end(child):
    probe = child(
        """
        def run(how):
            text = "x" * 50_000_000 if how == "wide" else "x\\\\n" * 1_000_000
            raise (Unsupported if how == "unsupported" else RuntimeError)(text)
        """
    )
    for how in ("wide", "long", "unsupported"):
        with pytest.raises((TargetError, Unsupported)) as caught:
            probe.ask("run", how=how)
        assert len(str(caught.value)) < 20_000


# -- a child that never answers -------------------------------------------------------------------

HANGS = {
    "loop": ("def run():\n    while True: pass", "in run"),
    "lock": ("def run():\n    threading.Event().wait()", "in wait"),
    "C": ("def run():\n    sum(range(10**12))", "in run"),
    "import": ("time.sleep(1000)\ndef run(): pass", "in <module>"),
    "stopped": ("def run():\n    os.kill(os.getpid(), signal.SIGSTOP)", "It had stopped itself"),
    "stopped at import": (
        "os.kill(os.getpid(), signal.SIGSTOP)\ndef run(): pass",
        "It had stopped itself",
    ),
    "recursion": (
        "def run():\n    sys.setrecursionlimit(10**9)\n    def f(): f()\n    time.sleep(1000)\n    f()",
        "in run",
    ),
}


@pytest.mark.parametrize("name", HANGS)
def test_a_child_that_hangs_is_ended_and_says_where_it_was(child, name):
    text, where = HANGS[name]
    probe = child(text, seconds=3.0)
    with pytest.raises(TargetError) as caught:
        probe.ask("run")
    message = str(caught.value)
    assert message.startswith("target mine: run: no answer within 3 s; its process was ended. It ")
    assert where in message
    assert "_listen" not in message
    assert "server.py" not in message
    # The other questions are not asked: they end at once, in the same words.
    started = time.monotonic()
    with pytest.raises(TargetError) as again:
        probe.ask("echo")
    assert str(again.value) == message
    assert time.monotonic() - started < 1


def test_a_question_that_nobody_reads_has_a_deadline(child):
    probe = child("os.kill(os.getpid(), signal.SIGSTOP)\ndef run(): pass", seconds=1.0)
    with pytest.raises(TargetError, match="It had stopped itself"):
        probe.ask("run", more_than_a_pipe_holds="x" * 1_000_000)


def test_an_answer_that_never_ends_has_a_deadline(child, monkeypatch):
    """Its first byte comes in time, and so does each next one."""
    monkeypatch.setattr(children, "_LONG_GRACE", 2.0)
    probe = child(
        """
        from pytest_moe_routing.targets import server
        def run():
            for number in range(3, 20):
                try:
                    os.write(number, server.HEADER.pack(server.MARK, 1, 1000))
                    for _ in range(1000):
                        os.write(number, b" ")
                        time.sleep(0.05)
                except OSError:
                    pass
        """,
        seconds=1.0,
    )
    started = time.monotonic()
    with pytest.raises(TargetError, match="no answer within 1 s; its process was ended"):
        probe.ask("run")
    assert time.monotonic() - started < 20


def test_a_child_that_reads_what_nobody_writes_goes_on(child):
    probe = child("sys.stdin.read()\ndef run(): return input()")
    with pytest.raises(TargetError, match="EOFError"):
        probe.ask("run")


LEFT = {
    "thread": "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "at exit": "import atexit\natexit.register(time.sleep, 1000)",
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.parametrize("end", ["close", "exit", "raise"])
def test_what_is_left_to_run_keeps_nobody_waiting(child, name, end):
    probe = child(
        f"{LEFT[name]}\ndef run():\n    {'sys.exit(3)' if end == 'exit' else 'raise BaseException(3)'}"
    )
    probe.ask("echo")
    started = time.monotonic()
    if end != "close":
        with pytest.raises(TargetError, match=f"ended with {3 if end == 'exit' else 1}"):
            probe.ask("run")
    probe.close()
    assert time.monotonic() - started < 5


# -- a child that ends ----------------------------------------------------------------------------

DIES = {
    "exit": ("print('last words'); os._exit(3)", r"(?s)ended with 3; its last words:.*last words"),
    "signal": ("os.kill(os.getpid(), signal.SIGKILL)", "ended with -9"),
    "crash": ("import ctypes; ctypes.string_at(0)", "(?s)ended with -11.*Segmentation fault"),
    "flood": ("print('x' * 1000_000, flush=True); os._exit(1)", "ended with 1"),
    "closed": ("os.closerange(0, 100); time.sleep(1000)", "no exit code, after closing its output"),
    "no such module": (None, "(?s)ended with 1.*ModuleNotFoundError"),
}


@pytest.mark.parametrize("name", DIES)
def test_a_child_that_ends_leaves_its_last_words(child, name):
    text, message = DIES[name]
    probe = child(f"def run():\n    {text}") if text else Probe("mine", "no.such_module")
    with pytest.raises(TargetError, match=message) as caught:
        probe.ask("run")
    assert len(str(caught.value)) < 10_000
    with pytest.raises(TargetError, match=message):
        probe.ask("echo")
    probe.close()
    probe.close()


def test_a_child_that_dies_between_questions(child):
    probe = child("def run():\n    threading.Timer(0.2, lambda: os._exit(4)).start()")
    probe.ask("run")
    time.sleep(0.6)
    with pytest.raises(TargetError, match="echo: its process ended with 4"):
        probe.ask("echo", word="x" * 1_000_000)


def test_what_it_forked_ends_with_it(child, tmp_path):
    """It holds no end of our pipes either: an answer is seen to be missing at once."""
    probe = child(
        """
        def run(how):
            pid = os.fork()
            if not pid:
                time.sleep(1000)
            if how == "die":
                os._exit(5)
            return pid
        """,
        seconds=10.0,
    )
    pid = probe.ask("run", how="go on")
    assert is_alive(pid)
    started = time.monotonic()
    with pytest.raises(TargetError, match="ended with 5"):
        probe.ask("run", how="die")
    assert time.monotonic() - started < 5
    assert wait_until_gone(pid)


def test_what_it_started_has_none_of_our_descriptors(child):
    probe = child(
        """
        import subprocess
        def run():
            program = "import os; print(*(os.readlink(f'/proc/self/fd/{n}') for n in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{n}')))"
            return subprocess.run([sys.executable, "-c", program], close_fds=False, capture_output=True, text=True).stdout
        """
    )
    answer = probe.ask("run")
    inherited = [name for name in answer.split() if "pipe" in name]
    # Those of its own `capture_output`, and no other.
    assert len(inherited) <= 2


# -- a child that answers with something else ----------------------------------------------------

GARBAGE = {
    "text": "b'garbage' * 10",
    "a frame of another number": "server.HEADER.pack(server.MARK, 77, 2) + b'{}'",
    "no JSON": "server.HEADER.pack(server.MARK, 1, 9) + b'{garbage}'",
    "no mapping": "server.HEADER.pack(server.MARK, 1, 4) + b'2.50'",
    "no kind": 'server.HEADER.pack(server.MARK, 1, 2) + b"{}"',
    "two kinds": 'server.HEADER.pack(server.MARK, 1, 25) + b\'{"answer": 1, "error": ""}\'',
    "an error that is no text": "server.HEADER.pack(server.MARK, 1, 12) + b'{\"error\": 1}'",
    "without end": "server.HEADER.pack(server.MARK, 1, 1 << 60)",
    "more than an answer": ("server.HEADER.pack(server.MARK, 1, 15) + b'[{\"answer\": 1}][]'"),
    "nesting": "server.HEADER.pack(server.MARK, 1, 200_000) + b'[' * 200_000",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_among_the_answers_is_one_error(child, name):
    """Whatever a framework writes to descriptors that it should leave alone."""
    probe = child(
        f"""
        from pytest_moe_routing.targets import server
        def run():
            for number in range(3, 20):
                try:
                    if "pipe" in os.readlink(f"/proc/self/fd/{{number}}"):
                        os.write(number, {GARBAGE[name]})
                except OSError:
                    pass
            time.sleep(1000)
        """,
        seconds=10.0,
    )
    with pytest.raises(TargetError, match=r"^target mine: run: .*; its process was ended$"):
        probe.ask("run")


def test_an_answer_that_is_too_large(child):
    probe = child("def run(): return 'x' * 2_000_000", answer=1_000_000)
    with pytest.raises(
        TargetError, match=r"its answer has 20000.. bytes, expected at most 1000000"
    ):
        probe.ask("run")


def test_an_answer_of_another_type(child):
    probe = child("def run(): return [1, 'a', True]", answers={"run": list[int], "echo": Any})
    with pytest.raises(TargetError, match=r"run: the answer\[1\] is 'a', expected an integer; its"):
        probe.ask("run")


def test_patches_of_what_answers_are_made_with_reach_no_answer(child):
    probe = child(
        """
        def run():
            import json, queue, struct, threading
            def broken(*_, **__): raise RuntimeError("patched")
            json.dumps = json.loads = os.write = os.read = os.dup = broken
            queue.SimpleQueue = threading.Thread = struct.Struct = broken
            sys.stdout = sys.stderr = None
            return "fine"
        """
    )
    assert probe.ask("run") == "fine"
    assert probe.ask("echo", again=1) == {"again": 1}


# -- its surroundings -----------------------------------------------------------------------------


def test_its_environment_is_a_list_of_what_it_may_see(child, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "tok123")
    monkeypatch.setenv("PYTHONSTARTUP", "/nowhere")
    monkeypatch.setenv("PYTHONHASHSEED", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("MINE_SWITCH", "1")
    monkeypatch.chdir("/")
    probe = child(
        "def run(): return [dict(os.environ), os.getcwd(), sys.path]", switches=("MINE_SWITCH",)
    )
    environment, directory, places = probe.ask("run")
    assert not {"SECRET_TOKEN", "PYTHONSTARTUP"} & set(environment)
    assert {"PATH", "CUDA_VISIBLE_DEVICES", "MINE_SWITCH"} <= set(environment)
    assert environment["HOME"] == environment["TMPDIR"] == directory
    # Sets in messages have the same order in every run.
    assert environment["PYTHONHASHSEED"] == "0"
    assert directory not in (str(Path.cwd()), str(Path.home()))
    assert str(Path.cwd()) not in places
    probe.close()
    assert not Path(directory).exists()


def test_modules_of_the_users_directory_take_no_ones_place(child, tmp_path, monkeypatch):
    """Not even if the tests' process has that directory among its places of modules."""
    (tmp_path / "work").mkdir()
    for name in ("random", "packaging", "nothing_else_has_it"):
        (tmp_path / f"work/{name}.py").write_text("raise RuntimeError('shadowed')")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(tmp_path / "work")
    probe = child("import random, packaging\ndef run():\n    import nothing_else_has_it")
    with pytest.raises(
        TargetError, match="ModuleNotFoundError: No module named 'nothing_else_has_"
    ):
        probe.ask("run")


def test_it_runs_this_package_even_if_another_copy_is_found_first(child, tmp_path):
    other = tmp_path / "installed" / "pytest_moe_routing"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("raise RuntimeError('another copy')")
    probe = child(
        "import pytest_moe_routing\ndef run(): return [sys.path, pytest_moe_routing.__file__]",
        variables={"PYTHONPATH": str(other.parent)},
    )
    places, file = probe.ask("run")
    assert str(other.parent) in places
    assert file == pytest_moe_routing.__file__


def test_it_has_no_more_memory_than_its_limit(child):
    resource = pytest.importorskip("resource")
    probe = child("def run(): return len(bytearray(3 << 30))", memory=1 << 30)
    with pytest.raises(TargetError, match=r"(?s)failed at run:.*MemoryError"):
        probe.ask("run")
    assert resource.getrlimit(resource.RLIMIT_DATA)[0] != 1 << 30


def test_its_files_have_an_end(child):
    probe = child(
        "def run():\n    with open('big', 'wb') as f:\n        for _ in range(100): f.write(bytes(1_000_000))"
    )
    with pytest.raises(TargetError, match=r"(?s)failed at run:.*File too large"):
        probe.ask("run")


def test_memory_is_looked_for_as_often_as_a_process_has_grown(monkeypatch):
    sizes, collected = iter([0, 2**29, 2**29 + 1, 10, 2**29 + 10, 2**29 + 11, 20]), []
    monkeypatch.setattr(server.gc, "collect", lambda: collected.append(1))
    collector = server.Collector(lambda: next(sizes))
    counts = []
    for _ in range(4):
        collector.look()
        counts.append(len(collected))
    assert counts == [0, 1, 1, 2]
