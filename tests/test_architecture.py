"""Imports go one way, and what must be cheap imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_moe_routing

PACKAGE = Path(pytest_moe_routing.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

#: Each layer may import those before it, and of its own layer what is listed.
LAYERS = [
    {"errors"},
    {"models", "goldens"},
    {"routing"},
    {"reference", "compare", "logits"},
    {"backends"},
    {"targets", "kernels"},
    {"ledger"},
    {"suite", "session", "snapshot"},
    {"report"},
    {"plugin", "cli"},
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
#: The one module of `routing` that must run recipes.
RUNS_RECIPES = {"routing.equivalence"}
#: Modules that a collection or a classification loads.
WITHOUT_TORCH = [
    "plugin",
    "ledger",
    "session",
    "cli",
    "models",
    "routing",
    "backends",
    "backends.drift",
    "targets",
    "targets.builtin",
    "targets.flashinfer",
    "targets.vllm",
    "targets.sglang",
    "kernels.gpu",
    "kernels.build",
    "report.collect",
    "report.gpu",
]


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path):
    """(imported module of this package, whether at module level) of one file."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
        for name in names:
            if name.startswith("pytest_moe_routing."):
                yield name.removeprefix("pytest_moe_routing."), id(node) in top


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_one_way(path):
    name = name_of(path)
    if not name or name in RUNS_RECIPES:
        return
    layer = name.split(".")[0]
    for imported, _ in imports(path):
        other = imported.split(".")[0]
        if other == layer or other not in RANK:
            continue
        if imported.startswith(tuple(RUNS_RECIPES)):
            assert RANK[layer] >= RANK["backends"], f"{name} imports {imported}"
            continue
        assert RANK[other] < RANK[layer] or {other, layer} <= {"reference", "compare", "logits"}, (
            f"{name} imports {imported}"
        )


def test_every_module_has_a_layer():
    assert {name_of(path).split(".")[0] for path in MODULES} - {""} <= set(RANK)


def test_targets_do_not_import_each_other():
    adapters = {"builtin", "flashinfer", "vllm"}
    for path in (PACKAGE / "targets").glob("*.py"):
        others = adapters - {path.stem}
        for imported, _ in imports(path):
            assert imported not in {f"targets.{other}" for other in others}, path


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_no_torch(module):
    code = f"import sys, pytest_moe_routing.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names_exist_and_are_loaded_lazily():
    for name in pytest_moe_routing.__all__:
        assert getattr(pytest_moe_routing, name) is not None
    assert set(pytest_moe_routing.__all__) <= set(dir(pytest_moe_routing))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = pytest_moe_routing.nothing
