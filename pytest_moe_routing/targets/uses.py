"""What a framework's code needs of FlashInfer and a release lacks: read from sources, never run.

The probes find such a name where they run the code that needs it. Most of it prepares weights, or
serves other experts, and is not run. Code may be prepared for a release without a name: in a `try`
with a handler, below an `if` that asks what there is, or as two strings, to be looked up. There,
only a name that no release has is wrong.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.flashinfer.names import Names, is_in_any_release
from pytest_moe_routing.inputs import Archive, read_text
from pytest_moe_routing.oracle.lacking import Lacking
from pytest_moe_routing.syntax import parse

_PACKAGE = "flashinfer"
#: The largest Python file that is read.
_MAX_BYTES = 20_000_000
#: A condition that asks what a FlashInfer has.
_ASKS = re.compile(r"hasattr|getattr|version|find_spec|signature|parameters", re.IGNORECASE)
#: A function that imports a name when it is called.
_IMPORTS = re.compile(r"import", re.IGNORECASE)

#: Of the names that a scope binds, the dotted names of FlashInfer that they stand for.
_Scope = dict[str, str]


def lacking(
    root: Path, modules: Sequence[str], flashinfer: FlashInfer, names: Names
) -> list[Lacking]:
    """Return what the code of modules, and of those below them, needs and the release lacks.

    Raises:
        Unsupported: No file of the modules mentions FlashInfer, or one that does cannot be parsed.
    """
    trees = dict(_trees(root, modules))
    if not trees:
        raise Unsupported("not judged: the MoE layers' files do not mention FlashInfer, or moved")
    lazy = {name: full for tree in trees.values() for name, full in _lazily_imported(tree)}
    found: dict[tuple[str, str], list[str]] = {}
    for file, tree in trees.items():
        reader = _Reader(flashinfer, names, lazy)
        reader.visit(tree)
        for needed, why, line in reader.found:
            found.setdefault((needed, why), []).append(f"{file}:{line}")
    return [Lacking(needed, why, tuple(places)) for (needed, why), places in found.items()]


def _trees(root: Path, modules: Sequence[str]) -> Iterator[tuple[str, ast.Module]]:
    """Yield path and syntax tree of each file that mentions FlashInfer."""
    for file, text in sorted(texts(root, modules)):
        if _PACKAGE in text:
            yield file, tree_of(file, text)


def tree_of(file: str, text: str) -> ast.Module:
    """Return the syntax tree of a file.

    Raises:
        Unsupported: It cannot be parsed.
    """
    try:
        return parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        what = type(error).__name__
        raise Unsupported(f"not judged: {file} cannot be parsed ({what})") from None


def calls(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.Call]]:
    """Yield each call below a node, with the function around it."""
    for child in ast.iter_child_nodes(node):
        around = owner
        if isinstance(child, (ast.ClassDef, ast.FunctionDef)):
            around = f"{owner}.{child.name}".lstrip(".")
        elif isinstance(child, ast.Call):
            yield owner, child
        yield from calls(child, around)


def texts(root: Path, modules: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield path and text of each file of modules, and of those below them."""
    paths = tuple(module.replace(".", "/") for module in modules)
    if root.is_file():
        with Archive(root, TargetError) as wheel:
            for name in wheel.names:
                if (
                    name.endswith(".py") and name.startswith(tuple(f"{p}/" for p in paths))
                ) or name in {f"{path}.py" for path in paths}:
                    yield name, wheel.read_text(name, _MAX_BYTES)
        return
    for path in paths:
        single = root / f"{path}.py"
        for file in [single] if single.is_file() else (root / path).rglob("*.py"):
            yield file.relative_to(root).as_posix(), read_text(file, _MAX_BYTES, TargetError)


def _lazily_imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield each name that a module binds to a function of FlashInfer, imported when called."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            full = _named_by_strings(node.value)
            if full:
                yield node.targets[0].id, full


def _named_by_strings(node: ast.AST) -> str:
    """Return the name of FlashInfer that two strings are, of a tuple or of a call that imports."""
    parts: Sequence[ast.expr] = ()
    if isinstance(node, ast.Tuple):
        parts = node.elts
    elif isinstance(node, ast.Call) and _IMPORTS.search(ast.unparse(node.func)):
        parts = node.args
    values = [part.value for part in parts[:2] if isinstance(part, ast.Constant)]
    if len(values) == 2 and all(isinstance(value, str) for value in values):
        module, name = map(str, values)
        is_name = name.isidentifier() and not name.startswith(_PACKAGE)
        if module.partition(".")[0] == _PACKAGE and is_name:
            return f"{module}.{name}"
    return ""


class _Reader(ast.NodeVisitor):
    """Reads one file.

    Attributes:
        found: A name that the release lacks, or a function; what is wrong with it; and the line.
    """

    def __init__(self, flashinfer: FlashInfer, names: Names, lazy: Mapping[str, str]) -> None:
        self.found: list[tuple[str, str, int]] = []
        self._flashinfer, self._names, self._lazy = flashinfer, names, lazy
        self._scopes: list[_Scope] = [{}]
        self._is_prepared = False

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] == _PACKAGE:
                self._check(alias.name, node.lineno)
                self._scopes[-1][alias.asname or _PACKAGE] = (
                    alias.name if alias.asname else _PACKAGE
                )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        for alias in node.names:
            if module.partition(".")[0] == _PACKAGE and not node.level:
                full = f"{module}.{alias.name}"
                self._check(full, node.lineno)
            else:
                full = self._lazy.get(alias.name, "")
            self._scopes[-1][alias.asname or alias.name] = full

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self._scopes[-1][node.name] = ""
        arguments = node.args
        every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
        self._scopes.append({argument.arg: "" for argument in every})
        self.generic_visit(node)
        self._scopes.pop()

    visit_AsyncFunctionDef = visit_FunctionDef  # noqa: N815

    def visit_Try(self, node: ast.Try) -> None:
        with self._prepared(bool(node.handlers)):
            self._visit_all(node.body)
        self._visit_all([*node.handlers, *node.orelse, *node.finalbody])

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        with self._prepared(_ASKS.search(ast.unparse(node.test)) is not None):
            self._visit_all([*node.body, *node.orelse])

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            for name in ast.walk(target):
                if isinstance(name, ast.Name) and isinstance(name.ctx, ast.Store):
                    self._scopes[-1][name.id] = _named_by_strings(node.value)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if full := self._stands_for(node):
            self._check(full, node.lineno)
        else:
            self.generic_visit(node)

    def visit_Tuple(self, node: ast.Tuple) -> None:
        self._check_strings(node)

    def visit_Call(self, node: ast.Call) -> None:
        self._check_strings(node)
        full = self._stands_for(node.func)
        if not full or self._is_prepared or self._names.missing(full):
            return
        name = full.rpartition(".")[2]
        signature = self._names.signature(name) or self._flashinfer.signature(name)
        why = "" if signature is None else _does_not_bind(signature, node)
        if why:
            self.found.append((f"{full}()", why, node.lineno))

    def _check_strings(self, node: ast.Tuple | ast.Call) -> None:
        self.generic_visit(node)
        full = _named_by_strings(node)
        if full:
            with self._prepared(True):
                self._check(full, node.lineno)

    def _visit_all(self, nodes: Iterable[ast.AST]) -> None:
        for node in nodes:
            self.visit(node)

    @contextmanager
    def _prepared(self, is_prepared: bool) -> Iterator[None]:
        before = self._is_prepared
        self._is_prepared |= is_prepared
        yield
        self._is_prepared = before

    def _stands_for(self, node: ast.expr) -> str:
        """Return the dotted name of FlashInfer that an expression stands for; "" if none."""
        if isinstance(node, ast.Attribute):
            base = self._stands_for(node.value)
            return f"{base}.{node.attr}" if base else ""
        if not isinstance(node, ast.Name):
            return ""
        return next((scope[node.id] for scope in self._scopes[::-1] if node.id in scope), "")

    def _check(self, full: str, line: int) -> None:
        missing = self._names.missing(full)
        if missing and not (self._is_prepared and is_in_any_release(full)):
            self.found.append((missing, "", line))


def _does_not_bind(signature: inspect.Signature, node: ast.Call) -> str:
    """Return why a function does not take a call; "" if it may."""
    given = {keyword.arg: None for keyword in node.keywords if keyword.arg is not None}
    is_open = len(given) < len(node.keywords) or any(isinstance(a, ast.Starred) for a in node.args)
    bind = signature.bind_partial if is_open else signature.bind
    places = [] if is_open else node.args
    try:
        bind(*places, **given)
    except TypeError as error:
        return str(error)
    return ""
