"""Records what the probes read of a framework's modules, classes and objects.

In a child process the probes' own source is compiled with every attribute that it reads, and every
`getattr` and `hasattr`, turned into a call of a recorder, so that nothing read goes unseen.

`python tests/recording.py PACKAGE ROOT FLASHINFER VERSION` prints what was read, as JSON.
"""

from __future__ import annotations

import ast
import builtins
import importlib
import json
import subprocess
import sys
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder, SourceFileLoader
from pathlib import Path

#: Models of different routers, activations and widths.
MODELS = (
    "deepseek-r1",
    "minimax-m2",
    "gpt-oss-120b",
    "llama-4-scout",
    "nemotron-3-super",
    "kimi-k2.5",
)
_read = set()


def recorded(package, source, flashinfer):
    """What a child read: for each attribute, the names that it may have in a contract."""
    arguments = (package, str(source.root), flashinfer, source.version)
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [tuple(names) for names in json.loads(done.stdout.splitlines()[-1])]


def unlisted(read, contract):
    """What was read and is in no row of the contract.

    The MoE blocks of models are found by reading the models' code, so they need no rows.
    """
    spellings = [spelling for row in contract.rows.values() for spelling in row.spellings]
    known = {name for spelling in spellings for name in (str(spelling), spelling.module)}
    found = (
        tuple(f"{s.module}." for s in contract.rows["models"].spellings)
        if "models" in contract.rows
        else ()
    )
    return [names for names in read if not (known & set(names) or names[0].startswith(found))]


def imported(path, package):
    """Every `from PACKAGE... import NAME` of one of our files, as a contract has it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            for alias in node.names:
                yield (f"{node.module}:{alias.name}", f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            yield from (
                (alias.name,) for alias in node.names if alias.name.split(".")[0] == package
            )


def _names(owner, name, package):
    """The names under which a contract may have an attribute of something of the framework."""
    if isinstance(owner, type(sys)):
        module = owner.__name__
        return (f"{module}:{name}", f"{module}.{name}") if _is_real(owner, package) else ()
    cls = owner if isinstance(owner, type) else type(owner)
    theirs = [c for c in cls.__mro__ if c.__module__.split(".")[0] == package]
    defined = next((c for c in cls.__mro__ if name in vars(c)), None)
    # What torch declares, and sets on each module.
    others = [c for c in cls.__mro__ if c not in theirs]
    # The annotations of built-in classes are descriptors.
    annotations = (vars(c).get("__annotations__") for c in others)
    declared = any(name in each for each in annotations if isinstance(each, dict))
    if not theirs or declared or (defined is not None and defined not in theirs):
        return ()
    return tuple(f"{c.__module__}:{c.__qualname__}.{name}" for c in theirs)


def _is_real(module, package):
    return module.__name__.split(".")[0] == package and "Stub" not in type(module).__name__


class _Instrument(ast.NodeTransformer):
    def visit_Attribute(self, node):
        self.generic_visit(node)
        if not isinstance(node.ctx, ast.Load):
            return node
        arguments = [node.value, ast.Constant(node.attr)]
        return ast.Call(ast.Name("__moe_read__", ast.Load()), arguments, [])

    def visit_match_case(self, node):
        # A pattern can hold names, but no calls.
        node.guard = node.guard and self.visit(node.guard)
        node.body = [self.visit(statement) for statement in node.body]
        return node

    def visit_Name(self, node):
        if node.id in ("getattr", "hasattr") and isinstance(node.ctx, ast.Load):
            return ast.Name(f"__moe_{node.id}__", ast.Load())
        return node


class _Loader(SourceFileLoader):
    def source_to_code(self, data, path, *, _optimize=-1):
        tree = ast.fix_missing_locations(_Instrument().visit(ast.parse(data)))
        return compile(tree, path, "exec")

    def get_code(self, fullname):
        path = self.get_filename(fullname)
        return self.source_to_code(self.get_data(path), path)


class _Finder(MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        spec = PathFinder.find_spec(fullname, path)
        if ".probe." in fullname and fullname.startswith("pytest_moe_routing.targets."):
            spec.loader = _Loader(fullname, spec.origin)
            return spec
        return None


def _install(package):
    def note(owner, name):
        dunder = name.startswith("__") and name.endswith("__")
        names = () if dunder else _names(owner, name, package)
        if names:
            _read.add(names)

    def read(owner, name):
        note(owner, name)
        return getattr(owner, name)

    def read_or(owner, name, *default):
        note(owner, name)
        return getattr(owner, name, *default)

    def has(owner, name):
        note(owner, name)
        return hasattr(owner, name)

    builtins.__moe_read__, builtins.__moe_getattr__, builtins.__moe_hasattr__ = read, read_or, has
    sys.meta_path.insert(0, _Finder())


def main(package, root, flashinfer, version):
    _install(package)
    from pytest_moe_routing.goldens import packaged_directory
    from pytest_moe_routing.models import load_models
    from pytest_moe_routing.schemes import SERVED_SCHEMES

    child = importlib.import_module(f"pytest_moe_routing.targets.{package}.probe.main")
    handlers = child.handlers(root, flashinfer, version)
    known = load_models(packaged_directory())
    for model in (known[name] for name in MODELS):
        for scheme in SERVED_SCHEMES:
            with suppress(Exception):  # The suite asks less: only what passes the gates.
                _ask(package, handlers, model, scheme)
    print(json.dumps(sorted(_read)))


def _ask(package, handlers, model, scheme):
    from pytest_moe_routing.targets.sglang.model_configs import config_of, configs

    if package == "sglang":
        handlers["method_numbers"]()
        handlers["accepted_quantizations"]()
        row = configs()["schemes"][scheme]["config"]
        handlers["capture"](model.architecture, config_of(model), scheme, row, "flashinfer_trtllm")
        return
    handlers["numbers"]()
    said = model.as_dict()
    method = handlers["classify"](said)[0]
    handlers["gates"](said, scheme, method)
    handlers["capture"](said, scheme, method)
    handlers["choose"](said, scheme, method)
    handlers["around"](said, scheme, method)
    handlers["gates"](said, scheme, method, modular=True)
    handlers["choose"](said, scheme, method, modular=True)
    handlers["capture_modular"](said, scheme)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    main(*sys.argv[1:])
