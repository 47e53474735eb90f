"""Stand-ins of modules that a framework imports: what they are for whoever else imports them."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest

from pytest_moe_routing.targets.stubs import source_of

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


HALF = """
import sys
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract

stubs.install(Contract.of("vllm"), sys.argv[1])
stubs.extend(real=["vllm", "vllm.whole", "vllm.half", "vllm.last"])
whole = stubs.real_module("vllm.whole")
whole.VALUE = "stand-in"
last = stubs.real_module("vllm.last")
print(last.half.whole is whole, last.half.whole.VALUE, sys.modules["vllm.whole"] is whole)
"""


def test_an_import_that_lacks_a_package_leaves_whole_modules_as_they_are(tmp_path):
    """Only what was imported half is imported again."""
    package = tmp_path / "vllm"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "whole.py").write_text("VALUE = 1\n")
    (package / "half.py").write_text("from vllm import whole\n")
    (package / "last.py").write_text("from vllm import half\nimport is_lacking\n")
    about = tmp_path / "vllm-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: vllm\nVersion: 1.0\nRequires-Dist: is-lacking\n")
    command = [sys.executable, "-c", HALF, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True", "stand-in", "True"], done.stderr


@pytest.mark.parametrize("is_wheel", [True, False])
def test_sources_are_read_without_finders_of_wheels_that_stay(tmp_path, is_wheel):
    """`importlib.invalidate_caches` reads a wheel's directory again for each that does."""
    files = {
        "vllm/__init__.py": "",
        "vllm/part/__init__.py": "A = 1\n",
        "vllm/part/b.py": "B = 2\n",
    }
    root = tmp_path / ("vllm-1.0-py3-none-any.whl" if is_wheel else "tree")
    if is_wheel:
        with zipfile.ZipFile(root, "w") as wheel:
            for name, text in files.items():
                wheel.writestr(name, text)
    else:
        (root / "vllm/part").mkdir(parents=True)
        for name, text in files.items():
            (root / name).write_text(text)
    asked = ("vllm.part.__init__", "vllm.part.b", "vllm.part.c", "vllm.none.d")
    assert [source_of(str(root), name) for name in asked] == ["A = 1\n", "B = 2\n", "", ""]
    kept = [path for path in sys.path_importer_cache if path.startswith(str(root))]
    assert not is_wheel or not kept
