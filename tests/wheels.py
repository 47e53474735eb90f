"""Wheels of real releases that tests may use: those in the folders that MOE_WHEELS names.

Folders are separated as in PATH. What is not there is skipped; `.ci/run` gets a few of each kind.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from packaging.version import Version

from pytest_moe_routing.targets import locate
from pytest_moe_routing.targets.registry import TargetId


def _all():
    folders = filter(None, os.environ.get("MOE_WHEELS", "").split(os.pathsep))
    return (wheel for folder in folders for wheel in Path(folder).glob("*.whl"))


def _release(wheel):
    distribution, version = wheel.name.split("-")[:2]
    return distribution, Version(version)


def find_wheel(release):
    """The wheel of a release (`vllm 0.7.2`), or None."""
    return next((wheel for wheel in _all() if wheel.name.split("-")[:2] == release.split()), None)


def wheels_since(version, *distributions):
    """All wheels of these distributions from a release on, oldest first."""
    found = {_release(wheel): wheel for wheel in _all()}
    return [
        found[name, release]
        for name, release in sorted(found, key=lambda key: key[::-1])
        if name in distributions and release >= Version(version)
    ]


def source_line(wheel, place):
    """Return the line of a wheel's file that FILE:LINE names."""
    file, line = place.rsplit(":", 1)
    return ZipFile(wheel).read(file).decode().splitlines()[int(line) - 1].strip()


def unpack(wheel, root):
    """Write a wheel's Python files and METADATA into a folder, and return it."""
    with ZipFile(wheel) as files:
        wanted = (n for n in files.namelist() if n.endswith((".py", "/METADATA")))
        files.extractall(root, wanted)
    return root


def run_on_vllm(script, wheel):
    """Run a script of this folder on the vLLM of a wheel, and return what it prints last, JSON."""
    return run_on(f"vllm@{wheel}", script)


def run_on(target, script):
    """Run a script of this folder on the framework of a target, `name@wheel`, in the same way."""
    located = locate(TargetId.parse(target))
    done = subprocess.run(
        [
            *(sys.executable, Path(__file__).with_name(script)),
            *(target.partition("@")[2], located.pinned_flashinfer, located.source.version),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])
