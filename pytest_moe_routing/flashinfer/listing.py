"""Lists what code can import from a flashinfer-python package: read from its files, not imported.

`python -m pytest_moe_routing.flashinfer.listing WHEEL...` rewrites `names.yaml`: it reads these
packages, and keeps what is listed of other releases.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from packaging.version import Version

from pytest_moe_routing.flashinfer.names import (
    ENUMS,
    FUNCTIONS,
    MODULES,
    NAMES,
    Listing,
    Names,
    listed_releases,
)
from pytest_moe_routing.flashinfer.package import Package, parameters_of

_WIDTH = 100


class Reader:
    """The Python modules of one package, each read once."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._files = {_module_of(file): file for file in package.python_files()}
        self._names: dict[str, dict[str, str]] = {}

    def listing(self, keys: Mapping[str, Iterable[str]]) -> Listing:
        """Return what the package has under the keys of each section."""
        return {
            MODULES: {folder: self._modules(folder) for folder in keys[MODULES]},
            NAMES: {module: tuple(sorted(self.names(module))) for module in keys[NAMES]},
            ENUMS: {name: self._enum(name, keys[NAMES]) for name in keys[ENUMS]},
            FUNCTIONS: {name: self._function(name, keys[NAMES]) for name in keys[FUNCTIONS]},
        }

    def names(self, module: str) -> Mapping[str, str]:
        """Return the names of a module, each with the place that it is imported from."""
        if module not in self._names:
            # For modules that import each other.
            self._names[module] = {}
            if module in self._files:
                self._names[module] = dict(self._read(module))
        return self._names[module]

    def definition(self, module: str, name: str) -> ast.stmt | None:
        """Return the function or class that a name stands for; None if it is neither."""
        origin, _, original = self.names(module).get(name, "").rpartition(":")
        if (origin, original) != (module, name):
            return self.definition(origin, original) if origin in self._files else None
        for node in _statements(self._tree(module).body):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return node
        return None

    def _modules(self, folder: str) -> tuple[str, ...]:
        """Return the modules and packages right in a package."""
        prefix = f"{folder}."
        below = (name.removeprefix(prefix) for name in self._files if name.startswith(prefix))
        return tuple(sorted({name.partition(".")[0] for name in below}))

    def _function(self, name: str, modules: Iterable[str]) -> tuple[str, ...]:
        """Return the parameters of a function in one word, defaults as 0."""
        for module in modules:
            node = self.definition(module, name)
            if isinstance(node, ast.FunctionDef):
                listed = (p.partition("=")[0] + "=0" * ("=" in p) for p in parameters_of(node.args))
                return (f"({','.join(listed)})",)
        return ()

    def _enum(self, name: str, modules: Iterable[str]) -> tuple[str, ...]:
        """Return the members of an enum and its methods."""
        for module in modules:
            node = self.definition(module, name)
            if isinstance(node, ast.ClassDef):
                return tuple(sorted({n for part in node.body for n in _defined(part)}))
        return ()

    def _tree(self, module: str) -> ast.Module:
        return self._package.tree(self._files[module]) or ast.Module([], [])

    def _read(self, module: str) -> Iterator[tuple[str, str]]:
        tree = self._tree(module)
        is_lazy = any(isinstance(n, ast.FunctionDef) and n.name == "__getattr__" for n in tree.body)
        if is_lazy:
            # What `__getattr__` compares a name with, or looks up in a table.
            yield from ((name, "") for node in tree.body for name in _strings(node))
        for node in _statements(tree.body):
            if isinstance(node, ast.ImportFrom):
                yield from self._imported(module, node)
                continue
            # Another name for a function is no definition.
            of = _alias(node)
            yield from ((name, f"{module}:{of or name}") for name in _defined(node))

    def _imported(self, module: str, node: ast.ImportFrom) -> Iterator[tuple[str, str]]:
        origin = node.module or ""
        if node.level:
            is_package = self._files[module].endswith("__init__.py")
            parts = module.split(".")
            parts = parts[: len(parts) - node.level + is_package]
            origin = ".".join(filter(None, [*parts, node.module]))
        if origin.partition(".")[0] != "flashinfer":
            return
        for alias in node.names:
            if alias.name == "*":
                yield from ((n, f"{origin}:{n}") for n in self.names(origin) if n[0] != "_")
            elif f"{origin}.{alias.name}" in self._files and alias.name not in self.names(origin):
                # Modules are listed apart.
                continue
            else:
                yield alias.asname or alias.name, f"{origin}:{alias.name}"


def _module_of(file: str) -> str:
    return ".".join(["flashinfer", *file.removesuffix(".py").split("/")]).removesuffix(".__init__")


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Return the statements of a module, with those that depend on what is installed."""
    for node in body:
        if isinstance(node, (ast.If, ast.Try, ast.With)):
            for part in ("body", "orelse", "finalbody"):
                yield from _statements(getattr(node, part, []))
            for handler in getattr(node, "handlers", []):
                yield from _statements(handler.body)
        else:
            yield node


def _defined(node: ast.stmt) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    for target in targets:
        for name in ast.walk(target) if target else ():
            if isinstance(name, ast.Name):
                yield name.id


def _alias(node: ast.stmt) -> str:
    """Return the name whose value an assignment gives to another; "" for any other statement."""
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
        return node.value.id
    return ""


def _strings(node: ast.stmt) -> Iterator[str]:
    for part in ast.walk(node):
        value = part.value if isinstance(part, ast.Constant) else None
        if isinstance(value, str) and value.isidentifier():
            yield value


def timeline(listings: Mapping[str, Listing]) -> dict[str, dict[str, dict[str, list[str]]]]:
    """Return words by section, key and range of releases, given what each release has.

    A range is `SINCE..UNTIL`, both inclusive, and open at the first and at the newest release.
    """
    releases = sorted(listings, key=Version)
    newest = listings[releases[-1]]
    return {
        section: {
            key: _by_span([listings[r][section][key] for r in releases], releases) for key in rows
        }
        for section, rows in newest.items()
    }


def _by_span(having: Sequence[Iterable[str]], releases: Sequence[str]) -> dict[str, list[str]]:
    """Return words by the range of releases that have them, oldest range first."""
    found: dict[tuple[int, int], list[str]] = {}
    for word in sorted(set().union(*having)):
        for span in _spans([word in words for words in having]):
            found.setdefault(span, []).append(word)
    last = len(releases) - 1
    return {
        f"{releases[start] if start else ''}..{releases[end] if end < last else ''}": words
        for (start, end), words in sorted(found.items())
    }


def _spans(has: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """Yield the first and last place of each run of truth."""
    start = 0
    for value, run in groupby(has):
        end = start + len(list(run))
        if value:
            yield start, end - 1
        start = end


def _printed(listings: Mapping[str, Listing], header: str) -> Iterator[str]:
    """Yield the lines of `names.yaml`."""
    yield f"{header}\n"
    yield from _wrapped("releases: >-", " ".join(sorted(listings, key=Version)), 2)
    for section, rows in timeline(listings).items():
        yield f"\n{section}:"
        for key, spans in rows.items():
            yield f"  {key}:" + " {}" * (not spans)
            for span, words in spans.items():
                yield from _wrapped(f'    "{span}": >-', " ".join(words), 6)


def _wrapped(head: str, text: str, indent: int) -> Iterator[str]:
    yield head
    pad = " " * indent
    yield from textwrap.wrap(
        text,
        _WIDTH,
        initial_indent=pad,
        subsequent_indent=pad,
        break_long_words=False,
        break_on_hyphens=False,
    )


def main(wheels: Sequence[str]) -> None:
    """Rewrite `names.yaml` with these packages, besides the releases that it has."""
    file = Path(__file__).with_name("names.yaml")
    header, _, _ = file.read_text("utf-8").partition("\nreleases:")
    listings = {release: Names(release).listing() for release in listed_releases()}
    keys = {section: sorted(rows) for section, rows in Names("").listing().items()}
    for package in map(Package.of, map(Path, wheels)):
        listings[package.release] = Reader(package).listing(keys)
    file.write_text("\n".join(_printed(listings, header.rstrip())) + "\n", "utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
