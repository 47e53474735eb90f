"""Calls of compiled operators, and of the Python functions around them, in one file of a package.

FlashInfer builds a module of operators in a cached function (`get_..._module`), wraps some of them
in functions of its own, and hands both out in a `SimpleNamespace`. Names are resolved through these
steps, with `ast`; a call whose target cannot be told is listed, never left out.
"""

from __future__ import annotations

import ast
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product

Function = ast.FunctionDef | ast.AsyncFunctionDef
#: Tests of conditional expressions, as written, and how each of them turned out.
Choice = dict[str, bool]


@dataclass(frozen=True)
class Native:
    """An object that holds compiled operators."""


@dataclass(frozen=True)
class Compiled:
    """A compiled operator, by the name that C++ exports; `*` for a word of it that is computed."""

    name: str


@dataclass(frozen=True)
class Wrapper:
    """A Python function that a namespace of operators holds, by its name there."""

    name: str
    function: Function


@dataclass(frozen=True)
class Namespace:
    """What a `SimpleNamespace` of operators holds."""

    entries: dict[str, Meaning]


Meaning = Native | Compiled | Wrapper | Namespace | None
#: What a name is bound to; None if that is not written (a parameter, a loop).
_Binding = ast.expr | Function | None


@dataclass(frozen=True)
class Call:
    """One call of an operator, under one choice of its conditional expressions."""

    target: Compiled | Wrapper
    arguments: tuple[ast.expr, ...]
    keywords: dict[str, ast.expr]
    line: int
    inside: tuple[Function, ...]


@dataclass
class Calls:
    """What one file calls.

    Attributes:
        calls: Calls that were read.
        unread: Calls that were not, each with its line and the reason.
        wrappers: Python functions that a namespace of operators holds.
    """

    calls: list[Call] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    wrappers: list[Wrapper] = field(default_factory=list)


@dataclass(frozen=True)
class _Scope:
    """A function (or the file) with the functions around it, innermost last."""

    functions: tuple[ast.Module | Function, ...]


class _Unreadable(Exception):
    pass


def read_calls(tree: ast.Module, native: Sequence[str], exported: Container[str]) -> Calls:
    """Return the calls of operators in a file.

    Args:
        tree: The file.
        native: Names of objects that hold compiled operators.
        exported: Names of operators, whose calls are unread if their target cannot be told.
    """
    return _Reader(tree, native, exported).read()


class _Reader:
    def __init__(self, tree: ast.Module, native: Sequence[str], exported: Container[str]) -> None:
        self.tree, self.native, self.exported = tree, native, exported
        self.found = Calls()
        self.mentioned: dict[str, int] = {}
        self._unread_names: set[str] = set()
        self._in_progress: set[int] = set()
        #: Of functions and expressions by identity: the tree keeps them alive.
        self._bound: dict[int, dict[str, list[_Binding]]] = {}
        self._meanings: dict[tuple[int, tuple[tuple[str, bool], ...]], Meaning] = {}

    def read(self) -> Calls:
        for scope, node in _walk(self.tree, _Scope((self.tree,))):
            if isinstance(node, ast.Call):
                self._read_call(node, scope)
            if isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
                match self.meaning(node, scope, {}):
                    case Compiled(name):
                        self.mentioned.setdefault(name, node.lineno)
                    case Namespace(entries):
                        held = [e for e in entries.values() if isinstance(e, Wrapper)]
                        self.found.wrappers += [w for w in held if w not in self.found.wrappers]
        called = {c.target.name for c in self.found.calls} | self._unread_names
        self.found.unread += [
            f"{line}: {name} is named, and no call of it is in this file"
            for name, line in self.mentioned.items()
            if name not in called
        ]
        return self.found

    def _read_call(self, call: ast.Call, scope: _Scope) -> None:
        functions = tuple(f for f in scope.functions if not isinstance(f, ast.Module))
        problem = self._problem(call.func, scope)
        if problem:
            self.found.unread.append(f"{call.lineno}: {problem}")
            return
        starred = [a.value for a in call.args if isinstance(a, ast.Starred)]
        tests = sorted({t for e in (call.func, *starred) for t in self._tests(e, scope)})
        seen: list[tuple[object, ...]] = []
        for outcome in product((True, False), repeat=len(tests)):
            choice = dict(zip(tests, outcome, strict=True))
            target = self.meaning(call.func, scope, choice)
            if not isinstance(target, Compiled | Wrapper):
                continue
            try:
                arguments = tuple(self._arguments(call, scope, choice))
                keywords = _keywords(call)
            except _Unreadable as error:
                self.found.unread.append(f"{call.lineno}: {target.name} is called {error}")
                self._unread_names.add(target.name)
                return
            if (target, arguments) in seen:
                continue
            seen.append((target, arguments))
            self.found.calls.append(Call(target, arguments, keywords, call.lineno, functions))

    def _problem(self, function: ast.expr, scope: _Scope) -> str:
        """Return why the target of a call cannot be told, empty if it can or is no operator."""
        match function:
            case ast.Attribute(attr=name) if name in self.exported:
                if self.meaning(function, scope, {}) is None:
                    return f"{ast.unparse(function)} is called, and who holds it cannot be told"
            case ast.Name(id=name):
                bound, where = self._bindings(name, scope)
                options = [self.meaning(b, where, {}) for b in bound if isinstance(b, ast.expr)]
                names = sorted({o.name for o in options if isinstance(o, Compiled)})
                if len(names) > 1:
                    self._unread_names.update(names)
                    return f"{name} is called, which is one of {', '.join(names)}"
        return ""

    def _arguments(self, call: ast.Call, scope: _Scope, choice: Choice) -> Iterator[ast.expr]:
        for argument in call.args:
            if not isinstance(argument, ast.Starred):
                yield argument
                continue
            value = self._chosen(argument.value, scope, choice)
            if not isinstance(value, ast.Tuple | ast.List):
                raise _Unreadable(f"with {ast.unparse(argument)}, whose length is not written")
            if any(isinstance(element, ast.Starred) for element in value.elts):
                raise _Unreadable(f"with {ast.unparse(argument)}, which holds a * of its own")
            yield from value.elts

    def _chosen(self, expression: ast.expr, scope: _Scope, choice: Choice) -> ast.expr:
        """Return what a name is bound to once, and the chosen branch of a condition."""
        if isinstance(expression, ast.Name):
            bound, _ = self._bindings(expression.id, scope)
            if len(bound) == 1 and isinstance(bound[0], ast.expr):
                return self._chosen(bound[0], scope, choice)
        if isinstance(expression, ast.IfExp) and ast.unparse(expression.test) in choice:
            kept = choice[ast.unparse(expression.test)]
            return self._chosen(expression.body if kept else expression.orelse, scope, choice)
        return expression

    def _tests(self, expression: ast.expr, scope: _Scope) -> Iterator[str]:
        """Yield the tests that an operator or a starred argument depends on."""
        if isinstance(expression, ast.Name):
            for bound in self._bindings(expression.id, scope)[0]:
                if isinstance(bound, ast.IfExp):
                    yield from self._tests(bound, scope)
        elif isinstance(expression, ast.IfExp):
            yield ast.unparse(expression.test)

    def _bindings(self, name: str, scope: _Scope) -> tuple[list[_Binding], _Scope]:
        """Return all that a name is bound to in the innermost scope that binds it."""
        for depth in range(len(scope.functions), 0, -1):
            inner = scope.functions[depth - 1]
            if id(inner) not in self._bound:
                self._bound[id(inner)] = _bound(inner)
            found = self._bound[id(inner)].get(name)
            if found:
                return found, _Scope(scope.functions[:depth])
        return [], scope

    def meaning(self, expression: ast.expr, scope: _Scope, choice: Choice) -> Meaning:
        """Return what an expression stands for, None if it is no operator or holder of some."""
        key = id(expression), tuple(sorted(choice.items()))
        if key not in self._meanings:
            if id(expression) in self._in_progress:
                return None
            self._in_progress.add(id(expression))
            self._meanings[key] = self._meaning(expression, scope, choice)
            self._in_progress.discard(id(expression))
        return self._meanings[key]

    def _meaning(self, expression: ast.expr, scope: _Scope, choice: Choice) -> Meaning:
        match expression:
            case ast.Name(id=name) | ast.Attribute(attr=name) if name in self.native:
                return Native()
            case ast.Call(func=ast.Attribute(attr="build_and_load")):
                return Native()
            case ast.Call(func=ast.Name(id="SimpleNamespace"), keywords=keywords):
                return Namespace(
                    {k.arg: self._entry(k.arg, k.value, scope) for k in keywords if k.arg}
                )
            case ast.Call(func=ast.Name(id="getattr"), args=[held, ast.Constant(value=str(name))]):
                return self._member(self.meaning(held, scope, choice), name)
            case ast.Call(
                func=ast.Name(id="getattr"), args=[held, ast.Constant(value=str(name)), _]
            ):
                return self._member(self.meaning(held, scope, choice), name)
            case ast.Call(func=ast.Name(id=name)):
                handed = Native() if name in self.native else None
                return self._returned(name, scope) or handed
            case ast.Subscript(value=held, slice=key):
                if isinstance(self.meaning(held, scope, choice), Native):
                    return Compiled(self._written(key, scope) or ast.unparse(key))
            case ast.Attribute(value=held, attr=name):
                return self._member(self.meaning(held, scope, choice), name)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                kept = choice.get(ast.unparse(test))
                branches = [body, orelse] if kept is None else [body if kept else orelse]
                return self._first(branches, scope, choice)
            case ast.Name(id=name):
                bound, where = self._bindings(name, scope)
                return self._first([b for b in bound if isinstance(b, ast.expr)], where, choice)
        return None

    def _written(self, key: ast.expr, scope: _Scope) -> str | None:
        """Return a name that an operator is looked up by, `*` for each part that is computed."""
        match self._chosen(key, scope, {}):
            case ast.Constant(value=str(name)):
                return name
            case ast.JoinedStr(values=parts):
                return "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "*" for part in parts
                )
        return None

    def _first(self, options: Sequence[ast.expr], scope: _Scope, choice: Choice) -> Meaning:
        meanings = (self.meaning(option, scope, choice) for option in options)
        return next((meaning for meaning in meanings if meaning is not None), None)

    def _member(self, holder: Meaning, name: str) -> Meaning:
        if isinstance(holder, Native):
            return Compiled(name)
        return holder.entries.get(name) if isinstance(holder, Namespace) else None

    def _entry(self, name: str, value: ast.expr, scope: _Scope) -> Meaning:
        if isinstance(value, ast.Name):
            bound, _ = self._bindings(value.id, scope)
            if bound and isinstance(bound[0], Function):
                return Wrapper(name, bound[0])
        return self.meaning(value, scope, {})

    def _returned(self, name: str, scope: _Scope) -> Meaning:
        """Return what a function of this file hands out, if it hands out operators."""
        bound, where = self._bindings(name, scope)
        for function in bound:
            if isinstance(function, Function):
                inner = _Scope((*where.functions, function))
                returned = [n.value for n in _own(function) if isinstance(n, ast.Return)]
                found = self._first([value for value in returned if value], inner, {})
                if found is not None:
                    return found
        return None


def _keywords(call: ast.Call) -> dict[str, ast.expr]:
    named = {k.arg: k.value for k in call.keywords if k.arg is not None}
    if len(named) != len(call.keywords):
        raise _Unreadable("with ** of keywords")
    return named


def _own(function: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of a function without those of the functions and classes in it."""
    for node in ast.iter_child_nodes(function):
        yield node
        if not isinstance(node, Function | ast.ClassDef | ast.Lambda):
            yield from _own(node)


def _bound(function: ast.Module | Function) -> dict[str, list[_Binding]]:
    """Return what the names of a function are bound to; None for what is not written."""
    found: dict[str, list[_Binding]] = {}
    plain: set[ast.expr] = set()
    for node in _own(function):
        match node:
            case ast.arguments():
                for parameter in ast.walk(node):
                    if isinstance(parameter, ast.arg):
                        found.setdefault(parameter.arg, []).append(None)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                found.setdefault(name, []).append(node)
            case ast.Assign(targets=[ast.Name(id=name) as target], value=value):
                plain.add(target)
                found.setdefault(name, []).append(value)
            case ast.AnnAssign(target=ast.Name(id=name) as target, value=ast.expr() as value):
                plain.add(target)
                found.setdefault(name, []).append(value)
            case ast.Name(id=name, ctx=ast.Store()) if node not in plain:
                # Any other way to bind it: a loop, a tuple, an augmented assignment.
                found.setdefault(name, []).append(None)
    return found


def _walk(node: ast.AST, scope: _Scope) -> Iterator[tuple[_Scope, ast.AST]]:
    """Yield every node with the functions around it."""
    for child in ast.iter_child_nodes(node):
        yield scope, child
        inner = scope
        if isinstance(child, Function):
            inner = _Scope((*scope.functions, child))
        yield from _walk(child, inner)
