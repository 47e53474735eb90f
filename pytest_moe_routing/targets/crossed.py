"""Calls of a framework's code that hand two values over under each other's names.

Read from sources, never run: most of these calls reach kernels that no GPU is here for, such as
Marlin's, and a value that has the name of another argument says enough. `w1_scale=layer.w2_scale`
alone is no mistake, as layers reuse names; next to `w2_scale=layer.w1_scale`, it is one. Sizes are
left out: the matrices of both products of an expert have the same ones in turns.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.crossed import Crossed
from pytest_moe_routing.targets.uses import calls, texts, tree_of

#: An argument and its value, as text: what a file is read for before it is parsed.
_GIVEN = re.compile(r"\b(\w+)\s*=\s*([A-Za-z_][\w.\[\]]*)")
#: Other names of the first and the second product of an expert.
_FIRST, _SECOND = re.compile(r"w13|fc1|gemm1"), re.compile(r"fc2|gemm2")
_SIZE = re.compile(r"size|stride|dim|(^|_)[a-z]$")


class _Name(NamedTuple):
    """A name, and what is left of it without its numbers.

    Attributes:
        whole: The name.
        shape: The name with `#` for each of its numbers.
        numbers: These numbers.
    """

    whole: str
    shape: str
    numbers: tuple[str, ...]

    @classmethod
    def of(cls, name: str) -> _Name:
        whole = name.lower().strip("_").removesuffix("s")
        whole = _SECOND.sub("w2", _FIRST.sub("w1", whole))
        return cls(whole, re.sub(r"\d+", "#", whole), tuple(re.findall(r"\d+", whole)))

    @property
    def words(self) -> set[str]:
        return set(re.split("[_#]+", self.shape)) - {""}


#: The name of an argument, and that of its value.
_Pair = tuple[_Name, _Name]


def crossed(root: Path, modules: Sequence[str]) -> list[Crossed]:
    """Return the calls in modules, and in those below them, with two values in each other's place.

    Raises:
        Unsupported: There is no such module, or a file cannot be parsed.
    """
    found, is_read = list[Crossed](), False
    for file, text in sorted(texts(root, modules)):
        is_read = True
        given = {(n, v) for n, value in _GIVEN.findall(text) for v in re.findall(r"\w+", value)}
        if not _has_crossing({(_Name.of(name), _Name.of(value)) for name, value in given}):
            continue
        for owner, call in calls(tree_of(file, text)):
            found += (
                Crossed(ast.unparse(call.func), pair, owner, f"{file}:{call.lineno}")
                for pair in _crossings([(k.arg, _value(k.value)) for k in call.keywords if k.arg])
            )
    if not is_read:
        raise Unsupported("not judged: the MoE layers' files moved")
    return found


def _value(node: ast.expr) -> str:
    """Return the last name of a value, whatever its methods and indices make of it."""
    while True:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            node = node.func.value
        elif isinstance(node, ast.Subscript):
            node = node.value
        else:
            break
    name: str = getattr(node, "attr", "") or getattr(node, "id", "")
    return name


def _has_crossing(pairs: Iterable[_Pair]) -> bool:
    """Return whether two of many pairs may be in each other's place."""
    swapped = {each for pair in pairs for each in _crossed_with(*pair)}
    return any(not swapped.isdisjoint(_keys(*pair)) for pair in pairs)


def _crossings(
    given: Sequence[tuple[str, str]],
) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    pairs = [(_Name.of(name), _Name.of(value)) for name, value in given]
    for place, pair in enumerate(pairs):
        wanted = {*_crossed_with(*pair)}
        for other in range(place + 1, len(pairs)):
            if not wanted.isdisjoint(_keys(*pairs[other])):
                yield given[place], given[other]


def _keys(name: _Name, value: _Name) -> Iterator[tuple[object, ...]]:
    """Yield what a pair is known by, to one in whose place it is."""
    yield name.whole, value.whole
    yield name.shape, value.shape, name.numbers, value.numbers


def _crossed_with(name: _Name, value: _Name) -> Iterator[tuple[object, ...]]:
    """Yield what another pair is known by, if both are in each other's place."""
    if name.whole == value.whole or _SIZE.search(name.whole):
        return
    yield value.whole, name.whole
    if name.numbers and name.numbers != value.numbers and name.words & value.words:
        yield name.shape, value.shape, value.numbers, name.numbers
