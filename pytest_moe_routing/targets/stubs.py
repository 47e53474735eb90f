"""Imports some modules of a framework for real, and stands in for everything else they import.

A framework's routing code is plain Python on torch, but importing it the usual way pulls in its
whole runtime: compiled extensions, GPU libraries, a hundred dependencies. Here the modules named
`real` come from a source tree or a wheel, and every other module of the framework, as well as the
named third-party ones, is a `Stub`. For use in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from inspect import isclass, isroutine
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, ClassVar, cast


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
        return (StubBase,)

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
        setattr(self, name, value)
        return value


class _Finder(MetaPathFinder, Loader):
    def __init__(self, package: str, root: str, real: Sequence[str], absent: Iterable[str]) -> None:
        self.package, self.root, self.real = package, root, tuple(real)
        self.absent = set(absent)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        top = fullname.partition(".")[0]
        if top == self.package:
            if self.is_real(fullname):
                spec = PathFinder.find_spec(fullname, path if path is not None else [self.root])
                # zipimport does not see a package without __init__.py.
                folder = "/".join([self.root, *fullname.split(".")])
                if spec is None and next(iter_modules([folder]), None) is not None:
                    return self._stub(fullname, is_on_the_way=True)
                return spec
            return self._stub(fullname, is_on_the_way=self._leads_to_real(fullname))
        return self._stub(fullname) if top in self.absent else None

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


def install(
    package: str,
    root: str,
    *,
    real: Sequence[str],
    absent: Iterable[str] = (),
    stand_ins: Mapping[str, Any] | None = None,
) -> None:
    """From now on import `real` modules of `package` from `root`, and stubs for all others.

    Args:
        package: Name of the framework's top-level package.
        root: The directory, or the wheel file, that holds it.
        real: Modules and packages (with all in them) that are run for real.
        absent: Third-party packages that are stubs too, installed or not.
        stand_ins: What a stub module has under a name, in place of a stub.
    """
    _stand_ins.update(stand_ins or {})
    sys.meta_path.insert(0, _Finder(package, root, real, absent))


def extend(*, real: Sequence[str] = (), absent: Iterable[str] = ()) -> None:
    """Import further modules of the installed framework for real, and further packages as stubs."""
    finder = next(f for f in sys.meta_path if isinstance(f, _Finder))
    finder.real += tuple(real)
    finder.absent.update(absent)


def real_module(name: str) -> ModuleType:
    """Import a real module of the framework; a third-party package that it lacks becomes a stub.

    Raises:
        ModuleNotFoundError: The framework has no such module.
    """
    finder = next(f for f in sys.meta_path if isinstance(f, _Finder))
    while True:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            top = (error.name or "").partition(".")[0]
            if not top or top == finder.package or top in finder.absent:
                raise
            finder.absent.add(top)
            # What was imported half may hold classes of modules that are run again.
            for module in [m for m in sys.modules if finder.is_real(m)]:
                del sys.modules[module]


def source_of(root: str, module: str) -> str:
    """Source text of a module in a tree or a wheel, which is not run; "" when there is none."""
    folder = "/".join([root, *module.split(".")[:-1]])
    spec = PathFinder.find_spec(module, [folder])
    return "" if spec is None else cast("InspectLoader", spec.loader).get_source(module) or ""
