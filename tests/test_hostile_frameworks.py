"""Sources of a framework whose code hangs, ends, floods, forks or stops: one message each."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from textwrap import indent

import pytest
from packaging.version import Version

from pytest_moe_routing.cli import main
from pytest_moe_routing.targets import probe
from pytest_moe_routing.targets.contract import Contract
from pytest_moe_routing.targets.probe import Limits

#: For one question; the first imports torch, on a machine that may be busy.
SECONDS = 20.0
LAYERS = "vllm/model_executor/layers/fused_moe"
#: What the module does when it is imported, and what the message says then.
FRAMEWORKS = {
    "hangs": (
        "while True: pass",
        rf"no answer within 20 s; .*was in: .*{LAYERS}/router/router_factory/__init__.py",
    ),
    "stops": ("os.kill(os.getpid(), 19)", "no answer within 20 s; .*It had stopped itself"),
    "dies": ("os._exit(3)", "its process ended with 3"),
    "leaves": ("sys.exit(4)", "its process ended with 4"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "its process ended with -11"),
    "floods the log": (
        "while True: print('x' * 1_000_000)",
        "router_factory does not import: .*OSError: .*File too large",
    ),
    "floods the message": (
        "raise RuntimeError('x' * 50_000_000)",
        "router_factory does not import: .*x{100}",
    ),
    "takes all memory": ("bytearray(1 << 40)", "router_factory does not import: .*MemoryError"),
    "forks": (
        "os.fork() or time.sleep(1000); os._exit(5)",
        "its process ended with 5",
    ),
    "writes to what it has open": (
        "write_to_pipes(); time.sleep(1000)",
        "its output holds something other than answers",
    ),
    "patches": (
        "import json; json.dumps = json.loads = None; raise RuntimeError('patched')",
        "router_factory does not import: .*RuntimeError: patched",
    ),
    "escapes": (r"raise RuntimeError('\x1b[2J\u202e')", r"\\x1b\[2J\\u202e"),
    "reads": ("input()", "router_factory does not import: .*EOFError"),
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


#: What a server does by default is read from the values of fields.
DEFAULTS = {
    "EngineArgs": """
class EngineArgs:
    moe_backend: str = "auto"
    tensor_parallel_size: int = 1
    data_parallel_size: int = 1
    enable_expert_parallel: bool = False
    enable_eplb: bool = False
    enable_dbo: bool = False
    expert_placement_strategy: str = "linear"
    all2all_backend: str = "allgather_reducescatter"
""",
    "KernelConfig": """
class KernelConfig:
    moe_backend: str = "auto"
""",
}


def definition(name, members):
    """A class, or a function, that has these members and `(parameters)`."""
    if name in DEFAULTS:
        return DEFAULTS[name]
    parameters = "".join(f", {m[1:-1]}=None" for m in members if m.startswith("("))
    inner = {m: members[m] for m in members if not m.startswith("(")}
    if name.lstrip("_")[0].islower() and not inner:
        return f"def {name}(*_{parameters}): pass\n"
    if name == "RoutingMethodType":
        numbers = "".join(f"    {m} = {number}\n" for number, m in enumerate(inner))
        return f"import enum\nclass {name}(enum.IntEnum):\n{numbers}"
    body = "".join(definition(*item) for item in inner.items())
    body += f"def __init__(self{parameters}): pass\n"
    return f"class {name}:\n" + indent(body, "    ")


def tree(path, text):
    """A release with every name that the probe relies on, and a router that does harm."""
    modules = {}
    for row in Contract.of("vllm").rows.values():
        for spelling in row.spellings_in(Version("0.99"))[:1]:
            names = modules.setdefault(spelling.module, {})
            for name in filter(None, spelling.path.replace("(", ".(").split(".")):
                names = names.setdefault(name, {})
    for module, names in modules.items():
        folder = path / module.replace(".", "/")
        folder.mkdir(parents=True, exist_ok=True)
        harm = f"{BEGIN}{text}\n" if module.endswith("router_factory") else ""
        lines = "".join(definition(*item) for item in names.items())
        if module.endswith("models.registry"):
            lines += 'MODELS = {"SomeForCausalLM": ("some", "SomeForCausalLM")}\n'
        (folder / "__init__.py").write_text(harm + lines)
    for folder in path.rglob("*"):
        if folder.is_dir():
            (folder / "__init__.py").touch()
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


def test_explain_shows_where_a_classifier_raises(tmp_path, capsys):
    path = tree(tmp_path / "0.99", "")
    file = path / LAYERS / "layer/__init__.py"
    factory = file.read_text().rstrip().removesuffix("pass")
    raises = "raise ValueError('not\\na method')\ncreate_fused_moe_router = None\n"
    file.write_text(factory + raises)
    name = ["explain", "minimax-m2", "--target", f"vllm@{path}"]
    raised = (
        "target vllm 0.99 failed at classify: "
        f"{LAYERS}/layer/__init__.py:2: ValueError: not a method"
    )
    assert main(name) == 1
    shown = capsys.readouterr().out
    assert f"\n  decided  error: {raised}\n" in shown
    assert f"\n  because  {raised}\n" in shown
    assert re.search(r"^fp8_block +unknown +error +- +a published checkpoint$", shown, re.M)
    assert "Traceback" not in shown
    assert main([*name, "--json"]) == 1
    verdicts = json.loads(capsys.readouterr().out)["verdicts"]
    assert {(v["verdict"], v["reason"]) for v in verdicts} == {("error", raised)}


@pytest.mark.parametrize("in_ci", [True, False])
def test_the_suite_tells_it_once(host, monkeypatch, in_ci):
    """Every test that asks fails, for one cause with one message, in a CI job as well."""
    monkeypatch.delenv("BUILD_NUMBER", raising=False)
    monkeypatch.delenv("CI", raising=False)
    if in_ci:
        monkeypatch.setenv("CI", "true")
    path = tree(host.path / "0.99", "os._exit(3)")
    result = host.runpytest_subprocess(
        *("--moe-golden", "--moe-target", f"vllm@{path}", "--moe-models", "minimax-m2"),
        *("--moe-schemes", "nvfp4,fp8_block", "-m", "not gpu"),
        *("--moe-write-known-failures", "known.yaml"),
    )
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    text = result.stdout.str()
    # Nobody knows what else would have failed.
    assert "known.yaml not written, because the target did not answer all questions" in text
    assert not (host.path / "known.yaml").exists()
    told = re.findall(r"^_* target vllm 0\.99: .*: its process ended with 3 _*$", text, re.M)
    assert len(told) == text.count("its process ended") == 1
    result.stdout.fnmatch_lines(["  cause    target:no-answers"])
    result.stdout.fnmatch_lines(["error       minimax-m2: *", "2 error; *"])
    assert re.search(r"1 failed, .*\d+ repeated", text)
    assert len(text.splitlines()) < 40


def test_sources_that_are_no_python_are_one_message(tmp_path, capsys):
    path = tree(tmp_path / "0.99", "")
    (path / LAYERS / "config/__init__.py").write_text("class FusedMoEConfig(:\n")
    assert main(["drift", "vllm", str(path)]) == 2
    shown = capsys.readouterr().err
    assert re.fullmatch(
        r"moe-routing: .*fused_moe\.config is not Python: invalid syntax.*\n", shown
    )
