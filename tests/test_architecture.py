"""Imports follow one total order, and what must start quickly imports no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pytest_moe_routing

PACKAGE = Path(pytest_moe_routing.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))

#: A module imports only what stands before its own package, and its own package.
ORDER = [
    "escape",
    "progress",
    "data",
    "errors",
    "failure",
    "syntax",
    "inputs",
    "schemes",
    "models",
    "routing",
    "logits",
    "reference",
    "compare",
    "flashinfer",
    "oracle",
    "targets",
    "simulator",
    "kernels",
    "goldens",
    "ledger",
    "session",
    "snapshot",
    "starter",
    "report",
    "suite",
    "options",
    "plugin",
    "cli",
]
TARGETS = sorted(path.name for path in (PACKAGE / "targets").iterdir() if path.is_dir())
#: Modules that a collection or a classification loads.
WITHOUT_TORCH = [
    "plugin",
    "ledger",
    "session",
    "cli",
    "schemes",
    "models",
    "routing",
    "flashinfer",
    "flashinfer.drift",
    "oracle",
    "oracle.exact",
    "oracle.model_code",
    "targets",
    "targets.builtin.target",
    "targets.flashinfer.target",
    "targets.vllm.target",
    "targets.sglang.target",
    "targets.transformers.target",
    "kernels.gpu",
    "kernels.build",
    "report.collect",
    "report.diff",
    "report.explain",
    "report.folders",
    "report.gpu",
]


def name_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path) for path in MODULES}


def imports(path):
    """Every module of this package that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if not name.startswith("pytest_moe_routing."):
                continue
            name = name.removeprefix("pytest_moe_routing.")
            yield name if name in NAMES else name.rpartition(".")[0]


def imported_by(name):
    path = PACKAGE.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return set(imports(path)) - {""}


def is_package(name):
    return PACKAGE.joinpath(*name.split("."), "__init__.py").is_file()


def test_every_module_has_a_place_in_the_order():
    assert {name.split(".")[0] for name in NAMES} - {""} == set(ORDER)


@pytest.mark.parametrize("name", sorted(NAMES - {""}))
def test_imports_follow_the_order(name):
    place = ORDER.index(name.split(".")[0])
    for other in imported_by(name):
        assert ORDER.index(other.split(".")[0]) <= place, f"{name} imports {other}"


def test_no_module_imports_itself_through_others():
    """No cycle between modules; a package's `__init__` counts as a module."""
    graph = {name: imported_by(name) for name in NAMES if name}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in sorted(graph.get(name, ())):
            # Importing a submodule of one's own package does not read the package's names.
            if not (is_package(other) and name.startswith(f"{other}.")):
                visit(other)
        path.pop()
        done.add(name)

    for name in sorted(graph):
        visit(name)


def test_targets_do_not_import_each_other():
    assert set(TARGETS) >= {"builtin", "flashinfer", "sglang", "vllm"}
    for name in NAMES:
        _, _, rest = name.partition("targets.")
        owner = rest.split(".")[0]
        for other in imported_by(name) if name and owner in TARGETS else ():
            parts = other.split(".")
            if parts[0] == "targets" and len(parts) > 1 and parts[1] in TARGETS:
                assert parts[1] == owner, f"{name} imports {other}"
        if name.startswith("targets.") and owner not in TARGETS:
            assert not any(
                other.startswith(f"targets.{t}") for other in imported_by(name) for t in TARGETS
            ), name


def test_the_order_is_checked_by_something():
    """The reader of imports sees the imports that the order is about."""
    assert "flashinfer.grammar" in imported_by("flashinfer.rules")
    assert "reference.routing" in imported_by("compare.equivalence")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_module_is_longer_than_400_lines(path):
    assert len(path.read_text("utf-8").splitlines()) <= 400


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


def test_a_type_checker_sees_the_names_that_python_loads():
    tree = ast.parse((PACKAGE / "__init__.py").read_text("utf-8"))
    [checked] = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test)[:3] != "not"]
    seen = {
        (node.module, alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    loaded = pytest_moe_routing._WHERE.items()
    assert seen == {(f"pytest_moe_routing.{m}", name) for m, names in loaded for name in names}
    assert {name for _, name in seen} | {"__version__"} == set(pytest_moe_routing.__all__)
    assert (PACKAGE / "py.typed").exists()


PAGE = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text("utf-8")


def test_the_page_of_the_architecture_has_the_order_of_the_test():
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    assert [name for row in rows for name in re.findall(r"`(\w+)`", row)] == ORDER


@pytest.mark.parametrize(
    "path", sorted(set(re.findall(r"`([\w/]+/(?:[\w.]+)?|[\w/]+\.(?:py|yaml|md))`", PAGE)))
)
def test_every_path_on_the_page_exists(path):
    if path.startswith(("golden/ID", "config.json")):
        return
    roots = (PACKAGE, PACKAGE.parent)
    assert any((root / path).exists() for root in roots), path
