"""What is shipped: a wheel and an sdist with every golden, and a wheel that works elsewhere."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist, built without a network; the wheel from the sdist, as an index would."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT],
        check=True,
        capture_output=True,
    )
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def in_checkout():
    names = subprocess.run(
        ["git", "ls-files", "golden", "pytest_moe_routing"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    return {name for name in names if (ROOT / name).exists()}


def test_the_wheel_holds_every_module_and_every_golden(built):
    names = set(zipfile.ZipFile(built[0]).namelist())
    wanted = {
        n.replace("golden/", "pytest_moe_routing/_golden/") if n.startswith("golden/") else n
        for n in in_checkout()
    }
    assert wanted <= names
    assert not {n for n in names if n.startswith(("tests/", "golden/", "benchmarks/", "conftest"))}


def test_the_sdist_holds_what_is_needed_to_test_and_build(built):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert (
        in_checkout() | {"README.md", "LICENSE", "pyproject.toml", "tests/test_build.py", "tox.ini"}
        <= names
    )


def test_the_wheel_works_in_an_unrelated_repository(built, tmp_path):
    """Installed into a folder of its own, found by its entry point, goldens and all."""
    site = tmp_path / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            site,
            built[0],
        ],
        check=True,
    )
    host = tmp_path / "host"
    host.mkdir()
    (host / "test_host.py").write_text("def test_host(): assert False, 'not to be run'\n")
    (host / "conftest.py").write_text(
        "import pytest_moe_routing as p; assert 'site' in p.__file__\n"
    )
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--moe-golden",
            "--moe-models",
            "minimax-m2",
            "-m",
            "not gpu",
            "-q",
        ],
        cwd=host,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "14 passed" in result.stdout
    assert str(site / "pytest_moe_routing" / "_golden") in run_header(host, site)


def run_header(host, site):
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "--moe-golden", "--collect-only"],
        cwd=host,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return result.stdout.replace("\n", "")


def test_the_lowest_versions_are_those_that_are_asked_for():
    """`tox -e min` installs what pyproject.toml promises, and nothing above it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *extras["torch"], *extras["update"]]
    lowest = {}
    for text in (*needed, *extras["test"]):
        requirement = Requirement(text)
        bounds = [s.version for s in requirement.specifier if s.operator == ">="]
        # Not ours, which is there for its extras.
        if requirement.name != project["name"]:
            lowest[canonicalize_name(requirement.name)] = Version(bounds[0])
    lines = (ROOT / "constraints-min.txt").read_text("utf-8").splitlines()
    pinned = {
        name: Version(version) for name, _, version in (x.partition("==") for x in lines) if version
    }
    assert {canonicalize_name(Requirement(text).name) for text in needed} - {
        project["name"]
    } <= set(pinned)
    assert pinned == {name: lowest[name] for name in pinned}
