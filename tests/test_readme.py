"""What the README shows is what is printed."""

from __future__ import annotations

import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from known_bugs import options

README = Path(__file__).parents[1] / "README.md"


def test_the_failure_is_what_vllm_0_22_1_gets(tmp_path):
    chosen = options("vllm 0.22.1")
    if chosen is None:
        pytest.skip("MOE_WHEELS has no vllm 0.22.1")
    shown = re.search(r"```text\n(step-3.7-flash on .*?)```", README.read_text(), re.DOTALL)[1]
    command = ["--moe-golden", *chosen, "--moe-models", "step-3.7-flash"]
    command += ["--moe-schemes", "fp8_block", "-p", "no:cacheprovider"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    printed = [
        line.strip("_ ") if line.startswith("_") else line for line in result.stdout.splitlines()
    ]
    start = next(i for i, line in enumerate(printed) if line.startswith("step-3.7-flash on"))
    patterns = [line.replace("...", "*") for line in shown.splitlines()]
    for line, pattern in zip(printed[start : start + len(patterns)], patterns, strict=True):
        assert fnmatchcase(line, pattern)
