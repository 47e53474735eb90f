"""Imports some modules of a framework for real, and replaces everything else they import.

A framework's routing code is plain Python on torch, but importing it the usual way pulls in its
whole runtime: compiled extensions, GPU libraries, a hundred dependencies. Here the modules named
`real` come from a source tree or a wheel, and every other module of the framework, as well as the
named third-party ones, is a `Stub`. For use in a process of its own.
"""

from __future__ import annotations

import pkgutil
import sys
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial
from importlib import import_module, metadata
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from inspect import isclass, isroutine
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar
from zipimport import ZipImportError, zipimporter

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Contract
from pytest_moe_routing.targets.definitions import Definitions
from pytest_moe_routing.targets.limits import is_missing, limits_of


class Stub:
    """Stands for anything: it is falsy, has every attribute, and returns what it decorates.

    Attributes:
        asked: Names of the stubs whose truth or items have been asked for, so that what code then
            did may be their doing.
    """

    asked: ClassVar[list[str]] = []

    def __init__(self, name: str) -> None:
        self.__name__ = self.__qualname__ = name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        value = Stub(f"{self.__name__}.{name}")
        setattr(self, name, value)
        return value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # A function or class, not any callable: a module may be asked about as well.
        decorates = len(args) == 1 and not kwargs and (isroutine(args[0]) or isclass(args[0]))
        return args[0] if decorates else Stub(f"{self}()")

    def __instancecheck__(self, instance: object) -> bool:
        return False

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        # One of its own, as a class may have several.
        return (type(self.__name__.rpartition(".")[2], (StubBase,), {}),)

    def __or__(self, other: Any) -> Any:
        return Any

    __ror__ = __or__

    def __getitem__(self, key: Any) -> Any:
        return Stub(f"{self}[]")

    def __setitem__(self, key: Any, value: Any) -> None:
        """Nothing to keep."""

    def __iter__(self) -> Any:
        self.asked.append(self.__name__)
        return iter(())

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __bool__(self) -> bool:
        self.asked.append(self.__name__)
        return False

    def __repr__(self) -> str:
        return self.__name__


class StubBase:
    """Stands for a stub among the bases of a class; registers and configures nothing."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @classmethod
    def register(cls, *args: Any, **kwargs: Any) -> Any:
        return lambda decorated: decorated

    register_oot = register


#: What stub modules have under a name, whichever module it is: such things move between releases.
_stand_ins: dict[str, Any] = {}


class _StubModule(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name.endswith("__"):
            raise AttributeError(name)
        full = f"{self.__name__}.{name}"
        if any(isinstance(finder, _Finder) and finder.is_real(full) for finder in sys.meta_path):
            # A submodule becomes an attribute of its package only when its import is over.
            return import_module(full)
        value = _stand_ins[name] if name in _stand_ins else Stub(full)
        if (limits := limits_of(self.__name__)) is not None:
            value = limits.attribute(self.__name__, name, value)
        setattr(self, name, value)
        return value


#: Modules whose frames are between a finder and the code that imports.
_OF_IMPORTS = (__name__, "importlib", "importlib._bootstrap", "importlib.util")


class _Finder(MetaPathFinder, Loader):
    def __init__(self, contract: Contract, root: str) -> None:
        self.contract, self.root = contract, root
        self.package, self.real = contract.package, contract.run
        self.absent = set(contract.third_party)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = fullname.partition(".")[0]
        if top == self.package:
            if self.is_real(fullname):
                # An enclosing package that is a stub may have no path: its folder is one.
                folder = "/".join([self.root, *fullname.split(".")[:-1]])
                spec = PathFinder.find_spec(fullname, path or [folder])
                if spec is None and module_exists(self.root, fullname):
                    return self._stub(fullname, is_on_the_way=True)
                return spec
            if fullname in self.contract.unbuilt or module_exists(self.root, fullname):
                return self._stub(fullname, is_on_the_way=self._leads_to_real(fullname))
            return None
        limits = limits_of(fullname)
        if top not in self.absent or (limits is not None and not limits.has_module(fullname)):
            return None
        if fullname.rpartition(".")[2].startswith("_") and _importer() == "torch":
            # torch imports it to see whether the package has it, and would use the stub's values.
            return None
        return self._stub(fullname)

    def is_real(self, name: str) -> bool:
        return any(name == real or name.startswith(f"{real}.") for real in self.real)

    def _leads_to_real(self, name: str) -> bool:
        return any(real.startswith(f"{name}.") for real in self.real)

    def _stub(self, name: str, *, is_on_the_way: bool = False) -> ModuleSpec:
        spec = ModuleSpec(name, self, is_package=True)
        folder = "/".join([self.root, *name.split(".")])
        spec.submodule_search_locations = [folder] if is_on_the_way else []
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StubModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def _importer() -> str:
    """Return the package whose code imports what is being imported."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"] in _OF_IMPORTS:
        frame = frame.f_back
    return str(frame.f_globals["__name__"]).partition(".")[0]


def known(name: str, **values: Any) -> Stub:
    """Return a stub of which some attributes are known."""
    stub = Stub(name)
    for key, value in values.items():
        setattr(stub, key, value)
    return stub


def stand_in(values: Mapping[str, Any]) -> None:
    """From now on stub modules have these values under their names, in place of stubs."""
    _stand_ins.update(values)


def install(contract: Contract, root: str, stand_ins: Mapping[str, Any] | None = None) -> None:
    """From now on import a framework's modules from `root`, and stubs for those not run for real.

    A module of the framework that `root` does not have is no stub: its import fails.

    Args:
        contract: Says which modules run for real, and which third-party packages are stubs.
        root: The directory, or the wheel file, that holds the framework.
        stand_ins: What a stub module has under a name, in place of a stub.
    """
    stand_in(stand_ins or {})
    sys.meta_path.insert(0, _Finder(contract, root))


def extend(*, real: Sequence[str] = (), absent: Iterable[str] = ()) -> None:
    """Import further modules of the installed framework for real, and further packages as stubs."""
    finder = _installed()
    finder.real += tuple(real)
    finder.absent.update(absent)


def real_module(name: str) -> ModuleType:
    """Import a real module of the framework; a missing package that it requires becomes a stub.

    Raises:
        Unsupported: The framework has no such module, or its import fails, or it imports what
            neither the METADATA nor the contract names.
        Exception: The import fails as a package lacks what the framework needs of it.
    """
    # Most are imported already, and are asked for with every question.
    if (imported := sys.modules.get(name)) is not None:
        return imported
    finder = next(f for f in sys.meta_path if isinstance(f, _Finder))
    before = {*sys.modules}
    while True:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if is_missing(error):
                raise
            top = (error.name or "").partition(".")[0]
            if top in finder.absent or not _is_required(top, finder):
                raise Unsupported(
                    f"not judged: {name} imports {error.name}, which neither "
                    f"{finder.contract.title} nor its METADATA nor the contract has"
                ) from error
            finder.absent.add(top)
            # What was imported half may hold classes of modules that are run again. Modules that
            # were imported before are whole, and may have stand-ins in them.
            for module in [m for m in sys.modules.keys() - before if finder.is_real(m)]:
                del sys.modules[module]
        except Exception as error:
            # Whatever the framework's code raises while it is imported.
            if is_missing(error):
                raise
            raise Unsupported(
                f"not judged: {name} does not import: {type(error).__name__}: {error}"
            ) from error


def run_apart(name: str) -> ModuleType:
    """Import a module of the framework for real, of which everybody else has a stub.

    Raises:
        Unsupported: As in `real_module`.
    """
    finder = next(f for f in sys.meta_path if isinstance(f, _Finder))
    kept, real = sys.modules.pop(name, None), finder.real
    finder.real = (*real, name)
    try:
        return real_module(name)
    finally:
        finder.real = real
        sys.modules.pop(name, None)
        if kept is not None:
            sys.modules[name] = kept


def _is_required(top: str, finder: _Finder) -> bool:
    """Return whether the framework's own METADATA requires a package, by its import name."""
    for name in finder.contract.distributions:
        for found in metadata.Distribution.discover(name=name, path=[finder.root]):
            for requirement in found.requires or ():
                if canonicalize_name(Requirement(requirement).name) == canonicalize_name(top):
                    return True
    return False


@cache
def _files(wheel: str) -> frozenset[str]:
    """Return the files of a wheel, without their suffixes, and its folders."""
    with zipfile.ZipFile(wheel) as opened:
        files = [name for name in opened.namelist() if name.endswith((".py", ".so", "/"))]
    folders = {
        "/".join(name.split("/")[:end]) for name in files for end in range(name.count("/") + 1)
    }
    return frozenset({name.partition(".")[0] for name in files} | folders)


def module_exists(root: str, module: str) -> bool:
    """Return whether a tree or a wheel has a module, be it compiled or a package without a file."""
    path = module.replace(".", "/")
    if Path(root).is_file():
        return path in _files(root)
    if Path(root, path).is_dir():
        return True
    folder = "/".join([root, *module.split(".")[:-1]])
    return PathFinder.find_spec(module, [folder]) is not None


def definitions(package: str, root: str) -> Definitions:
    """Return the definitions in a tree or a wheel of a framework."""
    return Definitions(package, partial(source_of, root), partial(module_exists, root))


def source_of(root: str, module: str) -> str:
    """Return the source text of a module in a tree or a wheel; "" when there is none."""
    # `zipimport` leaves the mark at the beginning of the file that Python skips.
    return _source(root, module).removeprefix("\ufeff")


def installed_source_of(module: str) -> str:
    """Return the source text of a module of the framework that `install` has made importable."""
    return source_of(_installed().root, module)


def _installed() -> _Finder:
    return next(finder for finder in sys.meta_path if isinstance(finder, _Finder))


def _source(root: str, module: str) -> str:
    folder = "/".join([root, *module.split(".")[:-1]])
    if Path(root).is_file():
        # Not one that Python keeps: for each of those, `importlib.invalidate_caches` reads the
        # wheel's directory. `find_spec` would compile the module to find out the name of its file.
        try:
            return zipimporter(folder).get_source(module) or ""
        except ZipImportError:
            return ""
    # PathFinder fails at a folder without __init__.py whose parent is not imported.
    finder = pkgutil.get_importer(folder)
    spec = None if finder is None else finder.find_spec(module)
    # A compiled module has a loader without source, and a folder without __init__.py has none.
    loader: Any = None if spec is None else spec.loader
    return "" if loader is None else loader.get_source(module) or ""
