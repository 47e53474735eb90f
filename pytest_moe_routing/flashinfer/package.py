"""What a flashinfer-python package says of itself: read from its files, never imported.

A package is a wheel, a folder that holds `flashinfer` (an unpacked wheel, a site-packages, a source
checkout), or the `flashinfer` folder itself. No torch, no GPU and no other dependency is needed.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pytest_moe_routing.errors import ReleaseError
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.flashinfer.signatures import each_parameter
from pytest_moe_routing.inputs import Archive, read_text
from pytest_moe_routing.syntax import parse

#: The largest files that are read: the Python entry points, and the kernels' sources.
MAX_PYTHON = 1_000_000
MAX_BYTES = 8_000_000

#: Where Python enums and entry points have been, newest place first.
_ENUM_FILES = ("tllm_enums.py", "fused_moe/core.py")
_FUNCTION_FILES = (
    *("fused_moe/core.py", "fused_moe/trtllm_gen_routing.py"),
    "fused_moe/cute_dsl/fused_moe.py",
)
#: An entry point that routes or is given what a router chose (and not `trtllm_moe_*`, its helpers).
_ENTRY_POINT = re.compile(
    r"trtllm_(?!moe_)\w+_moe|trtllm_gen_routing|cutlass_fused_moe|cute_dsl_fused_moe_nvfp4"
    r"|CuteDslMoEWrapper"
)


@dataclass(frozen=True)
class Package:
    """The files of one flashinfer-python.

    Attributes:
        path: What was given.
        root: The folder above `flashinfer`; inside the wheel, if it is one.
    """

    path: Path
    root: Path | Archive

    @classmethod
    def of(cls, path: Path) -> Package:
        """Find the package.

        Raises:
            ReleaseError: There is nothing at the path, or no flashinfer-python.
        """
        if not path.exists():
            raise ReleaseError(f"{path}: no such file")
        roots: list[Path | Archive] = [path, path.parent]
        if not path.is_dir():
            roots = [Archive(path, ReleaseError)]
        for root in roots:
            package = cls(path, root)
            if package.read("fused_moe/core.py") is not None:
                return package
        raise ReleaseError(
            f"{path}: found no flashinfer/fused_moe/core.py, expected a flashinfer-python package"
        )

    @classmethod
    def installed(cls) -> Package:
        """Return the flashinfer of this environment: found, not imported.

        Raises:
            ReleaseError: There is none.
        """
        spec = importlib.util.find_spec("flashinfer")
        places = [] if spec is None else spec.submodule_search_locations or []
        for place in places:
            return cls.of(Path(place))
        raise ReleaseError("flashinfer-python is not installed; install it, or name a wheel of it")

    def read(self, name: str) -> str | None:
        """Return a file of the package, by its path below `flashinfer`; None if it has none."""
        return self._text(f"flashinfer/{name}")

    def source(self, name: str) -> str | None:
        """Return a file of the kernels' sources, by its path below the wheel's `data`."""
        # A checkout has them next to the package.
        return self._text(f"flashinfer/data/{name}") or self._text(name)

    def _text(self, name: str) -> str | None:
        limit = MAX_PYTHON if name.endswith(".py") else MAX_BYTES
        if isinstance(self.root, Archive):
            return self.root.read_text(name, limit) if name in self.root.names else None
        file = self.root / name
        return read_text(file, limit, ReleaseError) if file.exists() else None

    def python_files(self, folder: str = "") -> list[str]:
        """Return the Python files below the package or one of its folders, by their paths in it."""
        below = f"flashinfer/{folder}/" if folder else "flashinfer/"
        if isinstance(self.root, Archive):
            names = [n for n in self.root.names if n.startswith(below)]
        else:
            base = self.root / below
            names = [f.relative_to(self.root).as_posix() for f in base.rglob("*.py")]
        return sorted(n.removeprefix("flashinfer/") for n in names if n.endswith(".py"))

    @cached_property
    def release(self) -> str:
        """The release that the package says it is."""
        stated = re.search(r'__version__ = "([^"\n]{1,1000})"', self.read("_build_meta.py") or "")
        if stated:
            return stated[1]
        checkout = self._text("version.txt")
        if checkout is None:
            raise ReleaseError(f"{self.path}: does not state its release")
        return checkout.strip()

    def tree(self, name: str) -> ast.Module | None:
        """Return a Python file of the package, parsed; None when it has none.

        Raises:
            ReleaseError: The file is no Python.
        """
        return None if self.read(name) is None else self._tree(name)

    def _tree(self, name: str) -> ast.Module:
        text = self.read(name)
        try:
            return parse(text or "")
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            found = shorten(str(error), 200) or type(error).__name__
            raise ReleaseError(f"{self.path}: flashinfer/{name}: not Python: {found}") from None

    @cached_property
    def enums(self) -> Mapping[str, Mapping[str, int]]:
        """The members of every plain enum next to the entry points, with their numbers."""
        found: dict[str, dict[str, int]] = {}
        for name in _ENUM_FILES:
            for node in self._tree(name).body:
                if isinstance(node, ast.ClassDef) and node.name not in found:
                    members = dict(_members(node))
                    if members:
                        found[node.name] = members
        return found

    @cached_property
    def signatures(self) -> Mapping[str, tuple[str, ...]]:
        """The parameters of every entry point, each as `name` or `name=default`, `*` included.

        A class is one with those of its constructor, and its method `run` is another.
        """
        return {
            name: tuple(p for p in parameters_of(function.args) if p != "self")
            for file in _FUNCTION_FILES
            for node in self._tree(file).body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and _ENTRY_POINT.fullmatch(node.name)
            for name, function in _functions(node)
        }


def _functions(node: ast.FunctionDef | ast.ClassDef) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Yield what is called of an entry point, by name."""
    if isinstance(node, ast.FunctionDef):
        yield node.name, node
        return
    names = {"__init__": node.name, "run": f"{node.name}.run"}
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and method.name in names:
            yield names[method.name], method


def _members(node: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """Members of an enum whose values are written as numbers (or as tuples of one)."""
    if not any(ast.unparse(base).endswith("Enum") for base in node.bases):
        return
    for statement in node.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name):
            value: ast.expr = statement.value
            if isinstance(value, ast.Tuple) and len(value.elts) == 1:
                value = value.elts[0]
            number = value.value if isinstance(value, ast.Constant) else None
            # Python does not print integers of thousands of digits.
            if type(number) is int and number.bit_length() < 64:
                yield statement.targets[0].id, number


def parameters_of(arguments: ast.arguments) -> Iterator[str]:
    """Return the parameters without their annotations, written as in `signatures.yaml`."""
    starred = arguments.vararg is not None
    for name, default, by_name in each_parameter(arguments):
        if by_name and not starred:
            starred = True
            yield "*"
        yield name if default is None else f"{name}={ast.unparse(default)}"
    if arguments.vararg:
        yield f"*{arguments.vararg.arg}"
    if arguments.kwarg:
        yield f"**{arguments.kwarg.arg}"
