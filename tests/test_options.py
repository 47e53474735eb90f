"""The table of options: what pytest's help says of it, and who reads it."""

from __future__ import annotations

import re
from pathlib import Path

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
