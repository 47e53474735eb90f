"""Finds a target by its id. Packages add targets in the entry point group `moe_routing.targets`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Self

from pytest_moe_routing.errors import (
    TargetError,
    TargetImportError,
    UnknownTarget,
)
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.source import Source

GROUP = "moe_routing.targets"


@dataclass(frozen=True)
class TargetId:
    """Which system is tested: `NAME`, `NAME@PATH` or `module:Class`.

    Attributes:
        name: A registered name, or `module:Class`.
        path: A wheel, an unpacked wheel or a checkout; None for what is installed.
    """

    name: str
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Take an id apart."""
        name, at, path = text.partition("@")
        return cls(name, Path(path).expanduser() if at else None)

    @property
    def is_class(self) -> bool:
        """Whether it names a class and not a registered target."""
        return ":" in self.name

    def __str__(self) -> str:
        return self.name if self.path is None else f"{self.name}@{self.path}"


@dataclass(frozen=True)
class Located:
    """A target that was found, and not made yet.

    Attributes:
        source: The sources that it answers for; None if it needs none.
    """

    id: TargetId
    cls: type[Target]
    source: Source | None

    @property
    def pinned_flashinfer(self) -> str | None:
        """The FlashInfer release that the target's sources are made for, if they say so."""
        return self.source.flashinfer if self.source else None

    def make(self, flashinfer: FlashInfer) -> Target:
        """Make the target.

        Raises:
            TargetImportError: Its package, or the module that adapts it, fails to import.
        """
        try:
            if issubclass(self.cls, FrameworkTarget):
                assert self.source is not None
                return self.cls(flashinfer, self.source)
            return self.cls(flashinfer)
        except TargetError:
            raise
        except Exception as error:
            raise _fails(self.id, error) from error


def target_names() -> list[str]:
    """Names of all registered targets."""
    return sorted({entry.name for entry in metadata.entry_points(group=GROUP)})


def locate(target: TargetId) -> Located:
    """Find a target and its sources; imports the module of its class, and no framework.

    Raises:
        UnknownTarget: There is no target of this name, no such class, or nothing at the path.
        TargetNotInstalled: The target is registered, and its package is not installed.
        TargetImportError: The module of the class fails to import.
    """
    if target.is_class:
        return Located(target, _class(target), None)
    if target.name not in target_names():
        raise UnknownTarget(
            f"unknown target {target.name!r}; targets: {', '.join(target_names())}, or module:Class"
        )
    entry = next(e for e in metadata.entry_points(group=GROUP) if e.name == target.name)
    try:
        cls = _checked(target, entry.load())
    except (ImportError, AttributeError) as error:
        raise _fails(target, error) from error
    if not issubclass(cls, FrameworkTarget):
        if target.path is not None:
            raise UnknownTarget(f"target {str(target)!r}: {target.name} does not accept @PATH")
        return Located(target, cls, None)
    if target.path is not None:
        return Located(target, cls, Source.at(cls.package, target.path, cls.distributions))
    return Located(target, cls, Source.installed(cls.package, cls.distributions))


def load_target(name: str, flashinfer: FlashInfer) -> Target:
    """Make a target from its id, see `TargetId`.

    Raises:
        TargetError: The target cannot be found or made.
    """
    return locate(TargetId.parse(name)).make(flashinfer)


def _class(target: TargetId) -> type[Target]:
    module, _, name = target.name.partition(":")
    valid = all(part.isidentifier() for part in (*module.split("."), name))
    if target.path is not None or not valid:
        raise UnknownTarget(f"unknown target {str(target)!r}: expected module:Class")
    try:
        found = getattr(import_module(module), name, None)
    except ModuleNotFoundError as error:
        raise UnknownTarget(f"unknown target {str(target)!r}: {error}") from error
    except (Exception, SystemExit) as error:
        # Whatever a foreign module raises while it is imported is its own failure, not ours.
        raise _fails(target, error) from error
    if found is None:
        raise UnknownTarget(f"unknown target {str(target)!r}: {module} has no {name}")
    return _checked(target, found)


def _checked(target: TargetId, cls: object) -> type[Target]:
    if not (isinstance(cls, type) and issubclass(cls, Target)):
        raise UnknownTarget(f"target {str(target)!r} is {cls!r}, not a class derived from Target")
    return cls


def _fails(target: TargetId, error: BaseException) -> TargetImportError:
    message = shorten(f"{type(error).__name__}: {error}", 500)
    return TargetImportError(f"target {str(target)!r} fails to import: {message}")
