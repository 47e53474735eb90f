"""Sources of a framework whose code hangs, ends, floods, forks or stops: one message each."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from pytest_moe_routing.cli import main
from pytest_moe_routing.targets import probe
from pytest_moe_routing.targets.probe import Limits

#: For one question; the first imports torch, on a machine that may be busy.
SECONDS = 20.0
LAYERS = "vllm/model_executor/layers/fused_moe"
#: What the module does when it is imported, and what the message says then.
FRAMEWORKS = {
    "hangs": (
        "while True: pass",
        rf"no answer within 20 s; .*was in: .*{LAYERS}/router/router_factory.py",
    ),
    "stops": ("os.kill(os.getpid(), 19)", "no answer within 20 s; .*It had stopped itself"),
    "dies": ("os._exit(3)", "its process ended with 3"),
    "leaves": ("sys.exit(4)", "its process ended with 4"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "its process ended with -11"),
    "floods the log": (
        "while True: print('x' * 1_000_000)",
        "failed at classify: .*OSError: .*File too large",
    ),
    "floods the message": ("raise RuntimeError('x' * 50_000_000)", "failed at classify: .*x{100}"),
    "takes all memory": ("bytearray(1 << 40)", "failed at classify: .*MemoryError"),
    "forks": (
        "os.fork() or time.sleep(1000); os._exit(5)",
        "its process ended with 5",
    ),
    "writes to what it has open": (
        "write_to_pipes(); time.sleep(1000)",
        "found something else among its answers",
    ),
    "patches": (
        "import json; json.dumps = json.loads = None; raise RuntimeError('patched')",
        "failed at classify: .*RuntimeError: patched",
    ),
    "escapes": (r"raise RuntimeError('\x1b[2J\u202e')", r"\\x1b\[2J\\u202e"),
    "reads": ("input()", "failed at classify: .*EOFError"),
}
BEGIN = """
import os, sys, time

def write_to_pipes():
    for number in range(20):
        try:
            if "pipe" in os.readlink(f"/proc/self/fd/{number}"):
                os.write(number, b"garbage" * 9)
        except OSError:
            pass

"""


def tree(path, text):
    for name in (
        "vllm",
        "vllm/model_executor",
        "vllm/model_executor/layers",
        LAYERS,
        f"{LAYERS}/router",
    ):
        (path / name).mkdir(parents=True)
        (path / name / "__init__.py").touch()
    (path / LAYERS / "router/router_factory.py").write_text(BEGIN + text)
    return path


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_one_message_within_the_deadline(tmp_path, monkeypatch, capsys, name):
    text, message = FRAMEWORKS[name]
    monkeypatch.setattr(probe, "LIMITS", Limits(seconds=SECONDS))
    path = tree(tmp_path / "0.99", text)
    started = time.monotonic()
    assert main(["history", "vllm", str(path), "--models", "minimax-m2,deepseek-r1"]) == 1
    assert time.monotonic() - started < 3 * SECONDS
    shown = capsys.readouterr().out
    [note] = [line for line in shown.splitlines() if line.startswith("[1] ")]
    assert re.search(message, note)
    assert len(shown) < 5_000
    assert "\x1b" not in shown
    assert not list(Path(tmp_path).rglob("__pycache__"))


def test_the_suite_tells_it_once(host):
    """Every test that asks fails, for one cause with one message."""
    path = tree(host.path / "0.99", "os._exit(3)")
    result = host.runpytest_subprocess(
        *("--moe-golden", "--moe-target", f"vllm@{path}", "--moe-models", "minimax-m2"),
        *("--moe-schemes", "nvfp4,fp8_block", "-m", "not gpu"),
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    text = result.stdout.str()
    assert text.count("its process ended with 3; its last words:") == 1
    result.stdout.fnmatch_lines(["  cause    target:no-answers"])
    assert re.search(r"1 failed, .*\d+ repeated", text)
    assert len(text.splitlines()) < 40
