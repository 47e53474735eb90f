"""The table of options: what pytest's help says of it, and who reads it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from pytest_moe_routing import options
from pytest_moe_routing.options import OPTIONS


def test_help_names_every_option_with_its_values(host):
    """The options are the code's own: one that is added is in the help, and says what it takes."""
    text = " ".join(host.runpytest_subprocess("--help").stdout.str().split())
    found = re.findall(r"(--moe-[a-z-]+)((?: |=)[A-Z|\[\]@a-z]+)? ", text)
    assert {name for name, _ in found} >= {f"--moe-{name}" for name, *_ in OPTIONS}
    for name, kind, metavar, words in OPTIONS:
        assert (metavar == "") == (kind == "bool")
        assert f"--moe-{name}{'=' if metavar else ' '}{metavar}" in text
        assert words in text
        assert f"moe_{name.replace('-', '_')} ({kind}):" in text
    assert "--moe-target=NAME[@PATH] the system to judge: builtin (default), vllm, sglang" in text


def test_options_are_what_the_plugin_reads(host):
    """Every option that code asks for is one of the table."""
    sources = Path(options.__file__).parent.rglob("*.py")
    asked = {
        name.replace("_", "-")
        for source in sources
        for name in re.findall(r"option\([a-z.]+, \"([a-z_]+)\"\)", source.read_text("utf-8"))
    }
    assert asked
    assert asked <= {name for name, *_ in OPTIONS}


@pytest.mark.parametrize(
    ("given", "is_told"),
    [
        (("--moe-known-failures", "../other/known.yaml"), True),
        (("--moe-known-failures=../other/known.yaml",), False),
        # The configuration is the same.
        (("--moe-known-failures", "known.yaml"), False),
        (("--moe-known-failures", "within/known.yaml"), True),
        # Where the paths of tests say where the configuration is, it is not another one.
        (("within", "--moe-known-failures", "within/known.yaml"), False),
        (("-c", "pytest.ini", "--moe-known-failures", "../other/known.yaml"), False),
    ],
)
def test_a_path_that_makes_pytest_look_for_its_configuration_elsewhere(
    pytester, monkeypatch, given, is_told
):
    """It would lose, among others, `moe_target` of the ini file, and judge the builtin target."""
    for folder in ("here", "here/within", "other"):
        place = pytester.mkdir(folder)
        place.joinpath("known.yaml").write_text("[]")
    pytester.path.joinpath("here/pytest.ini").write_text("[pytest]\nmoe_models = minimax-m2\n")
    pytester.path.joinpath("here/within/pytest.ini").write_text("[pytest]\n")
    monkeypatch.chdir(pytester.path / "here")
    command = sys.executable, "-m", "pytest", "--moe-golden", "--collect-only", "-q", *given
    result = pytester.run(*command)
    assert result.ret == (pytest.ExitCode.USAGE_ERROR if is_told else pytest.ExitCode.OK)
    told = [line for line in result.errlines if line.startswith("ERROR: --moe-known-failures ")]
    assert bool(told) == is_told
    if is_told:
        assert f"write --moe-known-failures={given[1]}; " in told[0]
