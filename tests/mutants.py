"""Changes of one place of a function or of a rule, made systematically."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

from pytest_moe_routing.flashinfer.grammar import Rule


@dataclass(frozen=True)
class Mutant:
    """A changed function or rule, and the change in words."""

    name: str
    value: Any

    def __str__(self) -> str:
        return self.name


_SWAPPED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
}


def replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """What is done to a node, in words that hold whatever names the code has, and the new node."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            other = deepcopy(node)
            other.ops[i] = _SWAPPED[type(op)]()
            yield f"{type(op).__name__} to {_SWAPPED[type(op)].__name__}", other
    elif isinstance(node, ast.BoolOp):
        name = type(node.op).__name__
        for i in range(len(node.values)):
            rest = node.values[:i] + node.values[i + 1 :]
            new = rest[0] if len(rest) == 1 else ast.BoolOp(node.op, rest)
            yield f"{name} of {len(node.values)} without operand {i + 1}", new
        swapped = ast.And() if isinstance(node.op, ast.Or) else ast.Or()
        yield f"{name} to {type(swapped).__name__}", ast.BoolOp(swapped, node.values)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "Not dropped", node.operand
    elif isinstance(node, (ast.If, ast.IfExp)):
        for value in (True, False):
            other = deepcopy(node)
            other.test = ast.Constant(value)
            yield f"{type(node).__name__} always {value}", other


def _replacements(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """The same, and what is done to the builtin target's own words."""
    yield from replacements(node)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id == "T":
            name = "Unspecified" if node.attr != "Unspecified" else "RenormalizeNaive"
            yield f"T.{node.attr} to {name}", ast.Attribute(node.value, name, node.ctx)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        if node.func.id == "Gate":
            for value in (True, False):
                arguments = [node.args[0], ast.Constant(value), *node.args[2:]]
                called = f"Gate {ast.literal_eval(node.args[0])!r}"
                yield f"{called} always {value}", ast.Call(node.func, arguments, [])
        elif node.func.id == "classify":
            for i, keyword in enumerate(node.keywords):
                others = [k for j, k in enumerate(node.keywords) if j != i]
                changed = ast.keyword(keyword.arg, ast.Constant(None))
                new = ast.Call(node.func, node.args, [*others, changed])
                yield f"classify with {keyword.arg} None", new


class _Swap(ast.NodeTransformer):
    def __init__(self, index: int, new: ast.AST) -> None:
        self.index, self.new, self.seen = index, new, -1

    def generic_visit(self, node: ast.AST) -> ast.AST:
        self.seen += 1
        if self.seen == self.index:
            return self.new
        return super().generic_visit(node)


def of_function(function: Callable[..., Any]) -> Iterator[Mutant]:
    """The function as it is, then with one condition, comparison, gate, leaf or argument changed.

    A mutant's name says what is done, and to the how manieth such place of the function.
    """
    definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    yield Mutant("unchanged", _compiled(function, definition))
    visit, seen = _Visit(), Counter[str]()
    visit.visit(definition)
    for index, node in enumerate(visit.nodes):
        for how, new in _replacements(node):
            if ast.dump(new) == ast.dump(node):
                continue
            seen[how] += 1
            changed = _Swap(index, new).visit(deepcopy(definition))
            yield Mutant(f"{how} ({seen[how]})", _compiled(function, changed))


def _compiled(function: Callable[..., Any], definition: ast.stmt) -> Any:
    """The function that a changed definition makes, in the module of the original."""
    module = ast.fix_missing_locations(ast.Module([_FUTURE, definition], []))
    name, namespace = function.__name__, dict(function.__globals__)
    exec(compile(module, "mutant", "exec"), namespace)
    mutant = namespace[name]
    if name in function.__globals__:
        # A method may call a function of its own name.
        namespace[name] = function.__globals__[name]
    return mutant


class _Visit(ast.NodeVisitor):
    """All nodes, in the order in which `_Swap` counts them."""

    def __init__(self) -> None:
        self.nodes: list[ast.AST] = []

    def generic_visit(self, node: ast.AST) -> None:
        self.nodes.append(node)
        super().generic_visit(node)


_FUTURE = ast.parse("from __future__ import annotations").body[0]


def of_rule(rule: Rule) -> Iterator[Mutant]:
    """The rule dropped (None), its effect flipped, one of its conditions or changes dropped."""
    name = f"{rule.fact} [{rule.since}-{rule.until} {' '.join(rule.schemes)}]"
    yield Mutant(f"{name}: dropped", None)
    if rule.effect:
        flipped = "error" if rule.effect == "garbage" else "garbage"
        yield Mutant(f"{name}: {flipped}", replace(rule, effect=flipped))
    for part in ("when", "require", "recipe"):
        said = getattr(rule, part)
        for key in said if len(said) > 1 or part == "when" else ():
            rest = {k: v for k, v in said.items() if k != key}
            yield Mutant(f"{name}: {part} without {key}", replace(rule, **{part: rest}))
