"""Stand-ins of modules that a framework imports: what they are for whoever else imports them."""

from __future__ import annotations

import subprocess
import sys

CHILD = """
import sys
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract

stubs.install(Contract.of("vllm"), "/nowhere")
for importer, module in (pair.split(":") for pair in sys.argv[1:]):
    try:
        exec(f"from triton.{module} import VALUE", {"__name__": importer})
    except ImportError:
        print("absent")
    else:
        print("stub")
"""


def test_torch_finds_no_private_module_of_a_stub():
    """torch 2.15's Inductor reads `triton._torchtlx_default.DEFAULT_MODE`, if there is one."""
    asked = (
        "torch._inductor.config:_torchtlx_default",
        "torch._inductor.config:backends",
        "vllm.triton_utils:_torchtlx_default",
    )
    command = [sys.executable, "-c", CHILD, *asked]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # Torch does without the first; the second it needs where it has found Triton.
    assert done.stdout.split() == ["absent", "stub", "stub"]
