"""What the sources of an SGLang say of its server's arguments."""

from __future__ import annotations

import pytest

from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.sglang.probe.sources import Sources

ARGUMENTS = """
import os
RUNNERS = ["auto", "triton"]
PORT = 30000
retries: int = 3
class ServerArgs:
    runner: str = "auto"
    host: str = os.name
    port: int
    kinds = ["a"]
    def check(self):
        checked: bool = True
def main():
    status: int = 7
    names = ["b"]
"""
GROUP = """
class MoE:
    experts: int = 1
"""


@pytest.mark.parametrize(
    ("modules", "more"),
    [
        ({"server_args.py": ARGUMENTS}, {}),
        ({"server_args.py": ARGUMENTS, "arg_groups/moe.py": GROUP}, {"experts": 1}),
    ],
    ids=["one module", "groups"],
)
def test_constants_of_fields_and_lists_of_choices(tmp_path, modules, more):
    """What functions have in them is none of it."""
    for name, text in modules.items():
        file = tmp_path / "sglang/srt" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    definitions = stubs.definitions("sglang", str(tmp_path))
    names = Names(Contract.of("sglang"), "0.5.6", definitions)
    assert Sources(names, str(tmp_path)).server_defaults() == {
        "RUNNERS": ["auto", "triton"],
        "retries": 3,
        "runner": "auto",
        "kinds": ["a"],
        **more,
    }
