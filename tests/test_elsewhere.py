"""A copy of the process computes what this one would: each test runs in a process without torch."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

BEGIN = """
    import os, signal, sys, threading, time
    from pytest_moe_routing.suite.elsewhere import can_copy, computing

    here = os.getpid()

    def place():
        return "here" if os.getpid() == here else "elsewhere"
"""


def run(script):
    """Run a script that asserts, and return what it prints."""
    script = textwrap.dedent(BEGIN) + textwrap.dedent(script)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


pytestmark = pytest.mark.skipif(
    run("print(can_copy())") != "True\n", reason="one core, or a system without forks"
)


def test_results_are_those_of_a_copy_with_all_that_is_changed_here():
    run("""
        import math
        math.pi = 3
        with computing({"a": place, "pi": lambda: math.pi}) as result:
            assert result("pi", lambda: 4) == 3
            assert result("a", place) == "elsewhere"
            # Not computed there, and taken already.
            assert result("b", place) == result("a", place) == "here"
    """)


@pytest.mark.parametrize(
    "fails", ["1 / 0", "os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(3)", "threading.Lock()"]
)
def test_what_fails_there_is_computed_here(fails):
    run(f"""
        def fail():
            if place() == "elsewhere":
                return {fails}
            return "here"

        with computing({{"first": place, "fails": fail, "last": place}}) as result:
            assert result("first", place) == "elsewhere"
            assert result("fails", fail) == "here"
            print(result("last", place))
    """)


def test_what_it_prints_is_nobodys():
    told = run("""
        def loud():
            print("loud", flush=True)
            os.write(2, b"loud")

        with computing({"loud": loud}) as result:
            assert result("loud", lambda: "here") is None
    """)
    assert told == ""


def test_it_ends_with_what_needs_it():
    run("""
        with computing({"pid": os.getpid, "long": lambda: time.sleep(100)}) as result:
            pid = result("pid", lambda: None)
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            pass
        else:
            raise AssertionError("it still runs")
    """)


def test_it_ends_after_its_parent_was_killed():
    """It has pytest's own descriptor of the output: what reads the output would wait as long."""
    script = textwrap.dedent(BEGIN) + textwrap.dedent("""
        os.dup(1)
        large = {n: lambda: bytes(1 << 20) for n in range(9)}
        with computing({"first": place, **large}) as result:
            result("first", place)
            os.kill(here, signal.SIGKILL)
    """)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=60, check=False
    )
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "missed",
    ["import torch", "threading.Thread(target=time.sleep, args=(1,), daemon=True).start()"],
)
def test_there_is_no_copy_where_it_would_lack_threads(missed):
    run(f"""
        {missed}
        with computing({{"a": place}}) as result:
            assert result("a", place) == "here"
    """)


def test_a_sweep_that_finds_mistakes_is_the_same():
    told = run("""
        from functools import partial
        from pytest_moe_routing.flashinfer import FlashInfer
        from pytest_moe_routing.oracle.config_sweep import CachedTarget, sweep
        from pytest_moe_routing.oracle.target import Classification
        from pytest_moe_routing.targets.builtin.target import BuiltinTarget

        class Broken(BuiltinTarget):
            def classify(self, model):
                return Classification("Renormalize", ("always",))

            def gates(self, model, scheme, method):
                return ()

        compute = partial(sweep, CachedTarget(Broken(FlashInfer.of("0.7.2"))), "bf16", ())
        with computing({"sweep": compute}) as result:
            found = result("sweep", list)
        assert found == compute()
        print(len(found.causes))
    """)
    assert int(told) > 3
