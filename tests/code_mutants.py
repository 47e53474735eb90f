"""Every single change of a Python module or of a YAML file, as text."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial

import yaml
from mutants import replacements
from packaging.version import Version

_OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}

_FUNCTIONS = {"any": "all", "min": "max", "amin": "amax", "minimum": "maximum"}
_FUNCTIONS |= {new: old for old, new in _FUNCTIONS.items()}


def of_code(text: str) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Yield place, change and maker of the changed text; a place is a function or class by name."""
    tree = ast.parse(text)
    seen: Counter[tuple[str, str]] = Counter()
    for place, node, parent, field, index in _places(tree):
        for how, new in _changes(node):
            if ast.dump(new) == ast.dump(node):
                continue
            seen[place, how] += 1
            yield (
                place,
                f"{how} ({seen[place, how]})",
                partial(_with, tree, (parent, field, index), new, node),
            )


def _with(tree: ast.AST, at: tuple, new: ast.AST, old: ast.AST) -> str:
    """The tree as text, with one node replaced."""
    _put(*at, new)
    try:
        return ast.unparse(ast.fix_missing_locations(tree))
    finally:
        _put(*at, old)


def _put(parent: ast.AST, field: str, index: int | None, new: ast.AST) -> None:
    if index is None:
        setattr(parent, field, new)
    else:
        getattr(parent, field)[index] = new


#: What no test is about: types, and what comes before a function.
_SKIPPED = {"annotation", "returns", "decorator_list", "type_params"}


def _places(node: ast.AST, place: str = "module") -> Iterator[tuple]:
    """Yield every node that may change, its place, and where it stands in its parent."""
    for field, value in ast.iter_fields(node):
        if field in _SKIPPED or isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom)):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or _is_text(child) or _is_typing(child):
                continue
            inner = place
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                inner = child.name if place == "module" else f"{place}.{child.name}"
            yield inner, child, node, field, index
            yield from _places(child, inner)


def _is_text(node: ast.AST) -> bool:
    """A docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _is_typing(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _changes(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    yield from replacements(node)
    if isinstance(node, ast.Constant):
        for new in _other_values(node.value):
            yield f"{node.value!r} to {new!r}", ast.Constant(new)
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        other = deepcopy(node)
        other.op = _OPERATORS[type(node.op)]()
        if not any(isinstance(x, (ast.JoinedStr, ast.List)) for x in (node.left, node.right)):
            yield f"{type(node.op).__name__} to {type(other.op).__name__}", other
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield "USub dropped", node.operand
    elif isinstance(node, ast.Call):
        yield from _calls(node)
    elif isinstance(node, ast.Raise) or _is_call(node):
        value = node.exc if isinstance(node, ast.Raise) else node.value
        called = ast.unparse(value) if value else ""
        name = called.partition("(")[0]
        yield f"{'raise ' * isinstance(node, ast.Raise)}{name} dropped", ast.Pass()
    elif isinstance(node, ast.comprehension):
        for i in range(len(node.ifs)):
            other = deepcopy(node)
            del other.ifs[i]
            yield f"condition {i + 1} of a comprehension dropped", other


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _other_values(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [2 * value or 1.0]
    return []


def _calls(node: ast.Call) -> Iterator[tuple[str, ast.AST]]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in _FUNCTIONS:
        other = deepcopy(node)
        setattr(
            other.func, "attr" if isinstance(node.func, ast.Attribute) else "id", _FUNCTIONS[name]
        )
        yield f"{name} to {_FUNCTIONS[name]}", other
    for i, keyword in enumerate(node.keywords):
        if keyword.arg not in (None, "device"):
            other = deepcopy(node)
            del other.keywords[i]
            yield f"{name} without {keyword.arg}", other


#: A release, and one or more conditions such as `>=1 <=4`.
_RELEASE = re.compile(r"\d+(\.\d+)+((\.post|rc)\d+)?")
_CONDITIONS = re.compile(r"([<>=!%]+\w+ ?)+")


def of_data(text: str) -> Iterator[tuple[str, str, Callable[[], str]]]:
    """Yield place, change and maker of the changed text of a YAML file: a number, switch or release."""
    # What an alias stands for is met again: one place of the file is one change.
    scalars = list(
        {
            node.start_mark.index: (place, node)
            for place, node in reversed(list(_scalars(yaml.compose(text))))
        }.values()
    )[::-1]
    releases = {node.value for _, node in scalars if _RELEASE.fullmatch(node.value)}
    ordered = sorted(releases, key=Version)
    for place, node in scalars:
        start, end = node.start_mark.index, node.end_mark.index
        for new in _other_scalars(node, ordered):
            changed = f"{text[:start]}{new}{text[end:]}"
            yield place, f"{text[start:end]} to {new}", partial(str, changed)


def _scalars(node: yaml.Node | None, place: str = "") -> Iterator[tuple[str, yaml.ScalarNode]]:
    if node is None:  # The file holds comments alone.
        return
    if isinstance(node, yaml.ScalarNode):
        yield place, node
    elif isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield from _scalars(item, f"{place}[{i}]")
    else:
        for key, value in node.value:
            name = f"{place}.{getattr(key, 'value', '?')}".lstrip(".")
            yield from _scalars(key, f"key {name}")
            yield from _scalars(value, name)


def _other_scalars(node: yaml.ScalarNode, releases: list[str]) -> Iterator[str]:
    value = node.value
    if _CONDITIONS.fullmatch(value):
        for found in re.finditer(r"(?<=[<>=!%])\d+", value):
            more = int(found[0]) + 1
            yield f'"{value[: found.start()]}{more}{value[found.end() :]}"'
    elif node.style is not None:
        return
    elif re.fullmatch(r"-?\d+", value):
        yield str(int(value) + 1)
    elif value in releases and len(releases) > 1:
        # Another that the file has: an unknown one would be noticed as such.
        place = releases.index(value)
        yield releases[place + 1 if place + 1 < len(releases) else place - 1]
    elif value in ("true", "false"):
        yield "false" if value == "true" else "true"
