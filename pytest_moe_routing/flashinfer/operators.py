"""Whether a package's Python calls its compiled operators as C++ declares them.

Three things are compared, for every file that `operators.yaml` names: the number of arguments of
each call, the name of each argument with the name of the parameter that it lands on, and the
parameters of each wrapper with their use. What cannot be read is listed as unread.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from pytest_moe_routing.data import read_data
from pytest_moe_routing.flashinfer import cpp
from pytest_moe_routing.flashinfer.calls import Call, Calls, Compiled, Function, Wrapper, read_calls
from pytest_moe_routing.flashinfer.package import Package
from pytest_moe_routing.flashinfer.signatures import each_parameter

_SOURCES = "csrc/"
#: A file that loads operators: it builds them, or imports what does from FlashInfer's `jit`.
_LOADS = re.compile(
    r"\.build_and_load\("
    r"|^\s*from\s+[.\w]*\bjit(?:\.\w+)*\s+import\s+(?:\([^)]*?|[^(\n]*?)\b(?:gen|get|load)_\w*module",
    re.MULTILINE,
)
#: Calls that hand their argument on: `list(x)`, `float(x)`, `x.get("name")` is handled apart.
_CONVERSIONS = ("bool", "float", "int", "list", "tuple")


@dataclass(frozen=True)
class Comparison:
    """What comparing a package's calls with its operators gave.

    Attributes:
        calls: How many calls were compared.
        differences: Calls and parameters that do not fit, each a sentence.
        unread: What could not be compared, and why.
    """

    calls: int
    differences: tuple[str, ...]
    unread: tuple[str, ...]


@cache
def _data() -> Mapping[str, Any]:
    data: Mapping[str, Any] = read_data(__package__, "operators.yaml")
    return data


def compare_operators(package: Package) -> Comparison:
    """Compare the calls of a package's Python with the operators that its C++ exports.

    Raises:
        ReleaseError: A file of the package cannot be read, or is no Python.
    """
    compared = 0
    differences: list[str] = []
    unread: list[str] = []
    exports: dict[str, Mapping[str, cpp.Operator] | None] = {}
    for file, sources in _data()["files"].items():
        tree = package.tree(file)
        if tree is None:
            continue
        for source in sources:
            if source not in exports:
                text = package.source(_SOURCES + source)
                exports[source] = None if text is None else cpp.operators(source, text)
        side = _Side(file, {s: exports[s] for s in sources})
        try:
            calls = read_calls(tree, _data()["native"], side.operators)
        except RecursionError:
            unread.append(f"{file}: its expressions are nested too deeply")
            continue
        differences += side.differences(calls, tree.body)
        unread += [*side.unread, *(f"{file}:{why}" for why in calls.unread)]
        compared += side.compared
    unread += [
        f"{file}: it loads compiled operators, and operators.yaml does not name it"
        for file in package.python_files("fused_moe")
        if file not in _data()["files"] and _LOADS.search(package.read(file) or "")
    ]
    return Comparison(compared, tuple(differences), tuple(unread))


class _Side:
    """One Python file and the C++ sources of its operators."""

    def __init__(self, file: str, sources: Mapping[str, Mapping[str, cpp.Operator] | None]) -> None:
        self.file, self.compared = file, 0
        self.operators: dict[str, cpp.Operator] = {}
        for exported in sources.values():
            self.operators.update(exported or {})
        self.absent = [source for source, exported in sources.items() if exported is None]
        self.unread: list[str] = []

    def differences(self, calls: Calls, top: Sequence[ast.stmt]) -> list[str]:
        found = [difference for call in calls.calls for difference in self._compare(call)]
        callers = [call.inside[0] for call in calls.calls if call.inside]
        # A method's self need not be read; `get_` builds the operators.
        public = [f for f in callers if f in top and not f.name.startswith(("_", "get_"))]
        wrappers = [wrapper.function for wrapper in calls.wrappers]
        for function in dict.fromkeys([*wrappers, *public]):
            found += [
                f"{self.file}:{function.lineno}: {function.name} accepts {name} and ignores it"
                for name in _unused(function)
            ]
        return found

    def _compare(self, call: Call) -> Iterator[str]:
        match call.target:
            case Wrapper(name, function):
                self.compared += 1
                where = f"{self.file}:{function.lineno}"
                yield from self._wrapper(f"{self.file}:{call.line}: {name}", call, function, where)
            case Compiled(name):
                yield from self._compiled(f"{self.file}:{call.line}: {name}", call, name)

    def _compiled(self, what: str, call: Call, name: str) -> Iterator[str]:
        words = re.compile(re.escape(name).replace(r"\*", "[^_]+"))
        operators = [o for o in self.operators.values() if words.fullmatch(o.name)]
        if not operators and self.absent:
            self.unread.append(f"{what}: the package has no {', '.join(self.absent)}")
        elif not operators:
            yield f"{what}: no C++ source of this file exports such an operator"
        if call.keywords:
            yield f"{what}: given by name, which C++ does not accept: {', '.join(call.keywords)}"
        for operator in operators:
            exact = what.replace(name, operator.name)
            if operator.parameters is None:
                self.unread.append(f"{exact}: {operator.where}: {operator.why}")
                continue
            self.compared += 1
            yield from _places(
                exact, call.arguments, operator.parameters, f"C++ ({operator.where})"
            )

    def _wrapper(self, what: str, call: Call, function: Function, where: str) -> Iterator[str]:
        parameters = list(each_parameter(function.args))
        if function.args.vararg or function.args.kwarg:
            self.unread.append(f"{what}: the function at {where} takes * or **")
            return
        places = [name for name, _, by_name in parameters if not by_name]
        taken = {*places[: len(call.arguments)], *call.keywords}
        missing = [n for n, default, _ in parameters if default is None and n not in taken]
        unknown = [name for name in call.keywords if name not in [p[0] for p in parameters]]
        twice = [name for name in call.keywords if name in places[: len(call.arguments)]]
        for names, verb in ((missing, "missing"), (unknown, "unknown"), (twice, "given twice")):
            if names:
                yield f"{what}: {verb}, by the function at {where}: {', '.join(names)}"
        if len(call.arguments) > len(places):
            yield (
                f"{what}: {len(call.arguments)} arguments by place, "
                f"the function at {where} takes {len(places)}"
            )
        else:
            given = places[: len(call.arguments)]
            yield from _misnamed(what, call.arguments, given, f"the function at {where}")
        named = [name for name in call.keywords if name not in unknown]
        values = [call.keywords[name] for name in named]
        yield from _misnamed(what, values, named, f"the function at {where}")


def _places(
    what: str, arguments: Sequence[ast.expr], parameters: Sequence[str], who: str
) -> Iterator[str]:
    """Yield where the arguments of a call by place and the parameters of C++ differ."""
    if len(arguments) == len(parameters):
        yield from _misnamed(what, arguments, parameters, who)
        return
    names = {_plain(name) for argument in arguments for name in _names(argument)}
    absent = [p for p in parameters if p and not any(_same(p, name) for name in names)]
    only = f", no argument is named after {', '.join(absent)}" if absent else ""
    yield f"{what}: {len(arguments)} arguments, {who} has {len(parameters)} parameters{only}"


def _misnamed(
    what: str, arguments: Sequence[ast.expr], parameters: Sequence[str], who: str
) -> Iterator[str]:
    for place, (argument, parameter) in enumerate(zip(arguments, parameters, strict=True), 1):
        names = list(_names(argument))
        if parameter and names and not any(_same(parameter, name) for name in names):
            yield f"{what}: argument {place} is {' or '.join(names)}, {who} calls it {parameter}"


def _names(argument: ast.expr) -> Iterator[str]:
    """Yield what an argument's expression calls it; nothing for a literal or a computed value."""
    match argument:
        case ast.Attribute(value=ast.Name(id=name)) if name[:1].isupper():
            # A member of an enum: the enum is named after the argument.
            yield name
        case ast.Attribute(value=held, attr="value"):
            yield from _names(held)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            yield name
        case ast.Subscript(slice=ast.Constant(value=str(name))):
            yield name
        case ast.Call(func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(name)), *_]):
            yield name
        case ast.Call(func=ast.Name(id=function), args=[only]) if function in _CONVERSIONS:
            yield from _names(only)
        case ast.IfExp(body=body, orelse=orelse):
            yield from _names(body)
            yield from _names(orelse)


def _same(parameter: str, name: str) -> bool:
    pair = {_plain(parameter), _plain(name)}
    return len(pair) == 1 or any(
        pair <= {_plain(n) for n in row["same"]} for row in _data()["names"]
    )


def _plain(name: str) -> str:
    """Return a name without case, underscores and a plural s of each word."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_")
    return "".join(word.removesuffix("s") for word in words)


def _unused(function: Function) -> list[str]:
    """Return the parameters that a function's body never reads."""
    read = {
        node.id
        for statement in function.body
        if not _is_discard(statement)
        for node in ast.walk(statement)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    return [name for name, _, _ in each_parameter(function.args) if name not in read]


def _is_discard(statement: ast.stmt) -> bool:
    """Return whether a statement only says that a value is not needed: `_ = value`."""
    match statement:
        case ast.Assign(targets=[ast.Name(id="_")], value=ast.Name() | ast.Tuple()):
            return True
    return False
