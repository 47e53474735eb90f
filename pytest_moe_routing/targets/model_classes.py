"""The classes of models in a framework: which runs an architecture, and what it reads of configs.

All of it is found in the sources, of which nothing is run.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import cache

from pytest_moe_routing.models.huggingface import keys_of
from pytest_moe_routing.targets.definitions import Definitions

#: A module, and the dotted name of a class or function in it.
Place = tuple[str, str]


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
        self._keys = cache(self._find_keys)

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
        read = self._keys(architecture)
        return bool(read & keys_of("top_k")) and not read & keys_of(value)

    def _find_keys(self, architecture: str) -> frozenset[str]:
        """Return every attribute that the code asks of other objects, and every text in it."""
        start = self._registered().get(architecture)
        queue = list(self._definitions.places(*start)) if start else []
        seen, found = set(queue), set[str]()
        while queue:
            module, path = queue.pop()
            node = self._definitions.node(module, path)
            if node is None:
                continue
            found.update(_named(node))
            for place in self._led_to(module, node):
                if place not in seen:
                    seen.add(place)
                    queue.append(place)
        return frozenset(found)

    def _led_to(self, module: str, node: ast.AST) -> Iterator[Place]:
        """Yield the definitions of models that a definition names, be it by an architecture."""
        for part in ast.walk(node):
            places: list[Place] = []
            if isinstance(part, ast.Name | ast.Attribute):
                dotted = ast.unparse(part)
                if self._is_of_models(module, dotted.partition(".")[0]):
                    places = self._definitions.places(module, dotted)
            elif isinstance(part, ast.ImportFrom):
                source = self._definitions.source(module, part)
                if f"{source}.".startswith(self._packages):
                    names = (alias.name for alias in part.names)
                    places = [p for name in names for p in self._definitions.places(source, name)]
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                start = self._registered().get(part.value)
                places = self._definitions.places(*start) if start else []
            for place in places:
                if place[1] and place[0].startswith(self._packages):
                    yield place

    def _is_of_models(self, module: str, name: str) -> bool:
        """Return whether a name in a module may be one of models, before it is looked up."""
        node = self._definitions.node(module, name)
        if isinstance(node, ast.ImportFrom):
            return f"{self._definitions.source(module, node)}.".startswith(self._packages)
        return node is not None


def _does_nothing(statement: ast.stmt) -> bool:
    is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return is_text or isinstance(statement, ast.Pass)


def _named(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute):
            # What an object keeps of its arguments is not read from a config there.
            if not (isinstance(part.value, ast.Name) and part.value.id == "self"):
                yield part.attr
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
