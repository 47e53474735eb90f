"""The classes of models in a framework: which runs an architecture, and what it reads of configs.

All of it is found in the sources, of which nothing is run.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache

from pytest_moe_routing.models.huggingface import keys_of
from pytest_moe_routing.oracle.misnamed import MisnamedWeight
from pytest_moe_routing.targets.definitions import Definitions
from pytest_moe_routing.targets.weight_names import misnamed_weights

#: A module, and the dotted name of a class or function in it.
Place = tuple[str, str]


@dataclass(frozen=True)
class _Code:
    """What one definition has in it.

    Attributes:
        named: Every attribute that it asks of other objects, and every text.
        called: Names that it calls: `name` of `module.name()`.
        led_to: The definitions of models that it names.
    """

    named: frozenset[str] = frozenset()
    called: frozenset[str] = frozenset()
    led_to: frozenset[Place] = frozenset()


class ModelClasses:
    """The classes of one release's models, and the code that they lead to.

    Args:
        definitions: The framework's sources.
        registered: Where the class of each architecture is.
        packages: The packages of models. Only the code in them is followed: layers that models
            share get arguments, and no config.
    """

    def __init__(
        self,
        definitions: Definitions,
        registered: Callable[[], Mapping[str, Place]],
        packages: tuple[str, ...],
    ) -> None:
        self._definitions, self._packages = definitions, packages
        self._registered = cache(registered)
        self._read = cache(self._read_definition)
        self._reached = cache(self._find_reached)
        self._misnamed = cache(self._misnamed_in)
        self._imported = cache(definitions.imported)

    def runs(self, architecture: str) -> Place | None:
        """Return the class that runs an architecture; None if the release has none.

        A class with nothing in its body is the class that it is derived from.
        """
        place = self._registered().get(architecture)
        found = place and self._definitions.places(*place)
        while found:
            place = found[0]
            node = self._definitions.node(*place)
            if not isinstance(node, ast.ClassDef) or len(node.bases) != 1:
                return place
            if not all(map(_does_nothing, node.body)):
                return place
            found = self._definitions.places(place[0], ast.unparse(node.bases[0]))
        return place

    def ignores(self, architecture: str, value: str) -> bool:
        """Return whether the code that makes an architecture's experts reads no key for a value.

        Args:
            value: A field of `RouterConfig` or `ExpertsConfig`.
        """
        read = {name for place in self._reached(architecture) for name in self._read(place).named}
        return bool(read & keys_of("top_k")) and not read & keys_of(value)

    def registered(self) -> Mapping[str, Place]:
        """Return the class of each architecture that the release has code for."""
        return self._registered()

    def calls(self, architecture: str, names: Collection[str]) -> bool:
        """Return whether the code of an architecture calls one of these classes or functions.

        Code that it does not import is not searched, such as that of an inner model that its config
        names.
        """
        return bool(self.callers(architecture, names))

    def callers(self, architecture: str, names: Collection[str]) -> frozenset[Place]:
        """Return the definitions of an architecture's code that call one of these; see `calls`."""
        if not self._may_call(architecture, names):
            return frozenset()
        reached = self._reached(architecture)
        return frozenset(p for p in reached if not self._read(p).called.isdisjoint(names))

    def misnamed(self, architecture: str) -> list[MisnamedWeight]:
        """Return the weights that an architecture's code loads into another matrix's place."""
        places = sorted(self._reached(architecture))
        return [each for place in places for each in self._misnamed(place)]

    def _misnamed_in(self, place: Place) -> tuple[MisnamedWeight, ...]:
        node = self._definitions.node(*place)
        file = f"{place[0].replace('.', '/')}.py"
        found = misnamed_weights(node) if node is not None else ()
        return tuple(replace(each, file=file, function=place[1]) for each in found)

    def modules_with_calls(self, modules: Iterable[str], names: Collection[str]) -> list[str]:
        """Return the modules in whose text one of these classes or functions is called."""
        pattern = _call_of(names)
        return [module for module in modules if self._definitions.contains(module, pattern)]

    def _may_call(self, architecture: str, names: Collection[str]) -> bool:
        """Return whether a module that an architecture's code imports has such a call in it."""
        pattern = _call_of(names)
        queue = [self._registered()[architecture][0]]
        seen = set(queue)
        while queue:
            module = queue.pop()
            if self._definitions.contains(module, pattern):
                return True
            new = {m for m in self._imported(module) if f"{m}.".startswith(self._packages)} - seen
            seen |= new
            queue += new
        return False

    def _find_reached(self, architecture: str) -> frozenset[Place]:
        """Return the definitions of models that make up an architecture's code."""
        start = self._registered().get(architecture)
        queue = list(self._definitions.places(*start)) if start else []
        seen = set(queue)
        while queue:
            new = self._read(queue.pop()).led_to - seen
            seen |= new
            queue += new
        return frozenset(seen)

    def _read_definition(self, place: Place) -> _Code:
        """Return what is in a definition, be it a model's or of what models share."""
        module, path = place
        node = self._definitions.node(module, path)
        named, called, dotted = set[str](), set[str](), set[str]()
        led_to: list[Place] = []
        for part in ast.walk(node) if node is not None else ():
            if isinstance(part, ast.Name):
                dotted.add(part.id)
            elif isinstance(part, ast.Attribute):
                dotted.add(_dotted(part))
                # What an object keeps of its arguments is not read from a config there.
                if not (isinstance(part.value, ast.Name) and part.value.id == "self"):
                    named.add(part.attr)
            elif isinstance(part, ast.Call):
                called.add(_dotted(part.func).rpartition(".")[2])
            elif isinstance(part, ast.ImportFrom):
                source = self._definitions.source(module, part)
                if f"{source}.".startswith(self._packages):
                    for alias in part.names:
                        led_to += self._definitions.places(source, alias.name)
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                named.add(part.value)
                start = self._registered().get(part.value)
                led_to += self._definitions.places(*start) if start else []
        for name in dotted:
            if self._is_of_models(module, name.partition(".")[0]):
                led_to += self._definitions.places(module, name)
        of_models = (p for p in led_to if p[1] and p[0].startswith(self._packages))
        return _Code(frozenset(named), frozenset(called), frozenset(of_models))

    def _is_of_models(self, module: str, name: str) -> bool:
        """Return whether a name in a module may be one of models, before it is looked up."""
        node = self._definitions.node(module, name) if name else None
        if isinstance(node, ast.ImportFrom):
            return f"{self._definitions.source(module, node)}.".startswith(self._packages)
        return node is not None


def _call_of(names: Collection[str]) -> re.Pattern[str]:
    return re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\(")


def _does_nothing(statement: ast.stmt) -> bool:
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_text or isinstance(statement, ast.Pass)


def _dotted(node: ast.expr) -> str:
    """Return a name with its attributes as text; "" for what is neither, such as a call."""
    if isinstance(node, ast.Name):
        return node.id
    if not isinstance(node, ast.Attribute):
        return ""
    owner = _dotted(node.value)
    return f"{owner}.{node.attr}" if owner else ""
