"""Looks up names in a framework's sources, which are parsed and never run."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.syntax import parse

#: How many imports, aliases and base classes are followed from one name to its definition.
_DEPTH = 12

#: An import: dots, module and names of `from`, or the module of a plain one.
_IMPORTS = re.compile(
    r"^\s*(?:from\s+(\.*)([\w.]*)\s+import\s*(\([^)]*\)|[^\n]*)|import\s+([\w.]+))", re.MULTILINE
)

_Function = (ast.FunctionDef, ast.AsyncFunctionDef)
_Import = (ast.Import, ast.ImportFrom)

#: Decorators that make a class's annotations its fields; `config` is vLLM's.
_DATACLASS = ("dataclass", "config")


class Definitions:
    """The definitions in one release of a framework.

    Args:
        package: The framework's top-level package; a name imported from elsewhere counts as there.
        read: Source text of a module, by its full name; "" when there is none.
        exists: Whether there is a module of this name, be it a package without `__init__.py`.
    """

    def __init__(
        self, package: str, read: Callable[[str], str], exists: Callable[[str], bool]
    ) -> None:
        self._package = package
        self._read = cache(read)
        self._exists = cache(exists)
        self._symbols = cache(self._parse)

    def has(self, module: str, path: str = "", *, own: bool = False) -> bool:
        """Return whether a release has a name.

        Args:
            module: Full name of a module.
            path: Dotted name in the module, with a parameter of it in parentheses at the end, as
                in `Config.make(num_experts)`; the module itself when empty.
            own: The last part must be in the body of its class, not inherited.
        """
        if not self._exists(module):
            return False
        if not path:
            return True
        dotted, parenthesis, parameter = path.partition("(")
        *owners, last = dotted.split(".")
        places = [(module, "")]
        for name in owners:
            places = [p for place in places for p in self._members(*place, name)]
        found = [p for place in places for p in self._members(*place, last, inherited=not own)]
        if not parenthesis:
            return bool(found)
        return any(parameter.rstrip(")") in self._parameters(*place) for place in found)

    def node(self, module: str, path: str) -> ast.AST | None:
        """Return the syntax tree of a definition in a module; None if there is none."""
        return self._symbols(module).get(path)

    def literals(self, module: str, path: str) -> tuple[Any, ...]:
        """Return the values that a definition in a module lists as a `Literal`.

        Raises:
            Unsupported: It lists none.
        """
        node = self.node(module, path)
        for part in () if node is None else ast.walk(node):
            if isinstance(part, ast.Subscript) and ast.unparse(part.value).endswith("Literal"):
                with suppress(ValueError):
                    found = ast.literal_eval(part.slice)
                    return found if isinstance(found, tuple) else (found,)
        raise Unsupported(f"not judged: {module}:{path} is no list of literals")

    def places(self, module: str, dotted: str) -> list[tuple[str, str]]:
        """Return where an expression such as `mk.Base` in a module leads to, as (module, name)."""
        return self._resolve(module, dotted, _DEPTH)

    def _parse(self, module: str) -> Mapping[str, ast.AST]:
        """Return what a module binds, by dotted name; see `_bindings`."""
        source = self._read(module)
        try:
            body = parse(source or "").body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            found = shorten(str(error), 200) or type(error).__name__
            raise Unsupported(f"not judged: {module} is not Python: {found}") from None
        bindings = list(_bindings(body, ""))
        # What a class's body says comes before what its methods assign.
        return dict(sorted(bindings, key=lambda item: not isinstance(item[1], ast.Attribute)))

    def _members(
        self, module: str, owner: str, name: str, *, inherited: bool = True, depth: int = _DEPTH
    ) -> list[tuple[str, str]]:
        """Return where `owner.name` of a module is defined, as (module, dotted name)."""
        symbols = self._symbols(module)
        full = f"{owner}.{name}" if owner else name
        node = symbols.get(full)
        if node is not None and (inherited or not isinstance(node, ast.Attribute)):
            if owner and not isinstance(node, ast.AnnAssign | ast.Assign | ast.ClassDef):
                return [(module, full)]
            return self._followed(module, full, node, depth)
        if not owner:
            for star in symbols.get("*", ast.Module([], [])).body:  # type: ignore[attr-defined]
                found = self._members(self.source(module, star), "", name, depth=depth - 1)
                if found:
                    return found
            below = f"{module}.{name}"
            return [(below, "")] if self._exists(below) else []
        definition = symbols.get(owner)
        if not inherited or not isinstance(definition, ast.ClassDef) or not depth:
            return []
        for base in definition.bases:
            for place in self._resolve(module, ast.unparse(base), depth - 1):
                found = self._members(*place, name, depth=depth - 1)
                if found:
                    return found
        return []

    def _resolve(self, module: str, dotted: str, depth: int) -> list[tuple[str, str]]:
        """Return where an expression such as `mk.Base` leads to."""
        places = [(module, "")]
        for name in dotted.split("[")[0].split("."):
            places = [p for place in places for p in self._members(*place, name, depth=depth)]
        return places

    def _followed(self, module: str, full: str, node: ast.AST, depth: int) -> list[tuple[str, str]]:
        """Return where an import or an alias leads to; the place itself for anything else."""
        name = full.rpartition(".")[2]
        if not depth:
            return []
        if isinstance(node, ast.ImportFrom):
            source = self.source(module, node)
            if source.partition(".")[0] != self._package:
                return [(module, full)]
            original = next(a.name for a in node.names if (a.asname or a.name) == name)
            return self._members(source, "", original, depth=depth - 1)
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if (a.asname or a.name.partition(".")[0]) == name)
            there = alias.name if alias.asname else name
            if there.partition(".")[0] != self._package:
                return [(module, full)]
            return [(there, "")] if self._exists(there) else []
        aliased = node.value if isinstance(node, ast.Assign) and "." not in full else None
        if isinstance(aliased, ast.Name) and aliased.id != name:
            return self._members(module, "", aliased.id, depth=depth - 1) or [(module, full)]
        return [(module, full)]

    def source(self, module: str, node: ast.ImportFrom) -> str:
        """Return the full name of the module that an import takes names from."""
        return self._absolute(module, node.level, node.module or "")

    def imported(self, module: str) -> frozenset[str]:
        """Return the modules of the package that a module imports, anywhere in it.

        It is not parsed, which would take many times as long.
        """
        found = set[str]()
        for dots, source, names, plain in _IMPORTS.findall(self._read(module)):
            full = plain or self._absolute(module, len(dots), source)
            if full.partition(".")[0] == self._package:
                below = (f"{full}.{name}" for name in re.findall(r"\w+", names))
                found |= {full, *filter(self._exists, below)}
        return frozenset(found)

    def contains(self, module: str, pattern: re.Pattern[str]) -> bool:
        """Return whether a module's text has a match of a pattern in it."""
        return pattern.search(self._read(module)) is not None

    def _absolute(self, module: str, level: int, name: str) -> str:
        """Return the full name of what a module imports from, with `level` dots before its name."""
        if not level:
            return name
        parts = module.split(".")
        if not self._read(f"{module}.__init__"):
            parts = parts[:-1]
        above = parts[: len(parts) - (level - 1)]
        return ".".join([*above, *filter(None, [name])])

    def _parameters(self, module: str, full: str) -> set[str]:
        """Return the parameters of a function, or of a class's constructor, or its fields."""
        node = self._symbols(module).get(full)
        if isinstance(node, _Function):
            given = node.args
            return {a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)}
        if not isinstance(node, ast.ClassDef):
            return set()
        for place in self._members(module, full, "__init__"):
            return self._parameters(*place)
        fields = {
            part.target.id
            for part in node.body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        }
        for base in node.bases:
            for place in self._resolve(module, ast.unparse(base), _DEPTH):
                fields |= self._parameters(*place)
        return fields


def _bindings(body: list[ast.stmt], owner: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield the names that statements bind, in whatever branch, and where.

    `self.x = ...` in a method of C is C.x, unless C is a dataclass, which has the fields that its
    body lists. `layer.x = ...` is C.layer.x.
    """
    stars: list[ast.stmt] = []
    for node in body:
        if isinstance(node, (*_Function, ast.ClassDef)):
            full = f"{owner}{node.name}"
            yield full, node
            if isinstance(node, ast.ClassDef):
                bound = _bindings(node.body, f"{full}.")
                yield from filter(_is_of_body, bound) if _is_dataclass(node) else bound
            elif owner:
                yield from _own_attributes(node, owner)
        elif isinstance(node, _Import):
            for alias in node.names:
                if alias.name == "*":
                    stars.append(node)
                else:
                    name = alias.asname or (
                        alias.name.partition(".")[0] if isinstance(node, ast.Import) else alias.name
                    )
                    yield f"{owner}{name}", node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    if isinstance(part, ast.Name):
                        yield f"{owner}{part.id}", node
        else:
            for field in ("body", "orelse", "finalbody"):
                yield from _bindings(getattr(node, field, []), owner)
            for handler in getattr(node, "handlers", []):
                yield from _bindings(handler.body, owner)
    if stars and not owner:
        yield "*", ast.Module(stars, [])


def _is_dataclass(node: ast.ClassDef) -> bool:
    names = (ast.unparse(decorator).partition("(")[0] for decorator in node.decorator_list)
    return any(name.rpartition(".")[2] in _DATACLASS for name in names)


def _is_of_body(binding: tuple[str, ast.AST]) -> bool:
    node = binding[1]
    return not (isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self")


def _own_attributes(method: ast.AST, owner: str) -> Iterator[tuple[str, ast.AST]]:
    """Yield what a method assigns to attributes: of itself, and of its other variables by name."""
    for node in ast.walk(method):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
        ):
            variable = node.value.id
            if variable == "self":
                yield f"{owner}{node.attr}", node
            else:
                yield f"{owner}{variable}", node
                yield f"{owner}{variable}.{node.attr}", node
