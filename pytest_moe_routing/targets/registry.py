"""Finds a target by name. Others add theirs through the entry point group `moe_routing.targets`."""

from __future__ import annotations

from importlib import import_module, metadata
from pathlib import Path

from pytest_moe_routing.errors import TargetImportError, TargetNotInstalled, UnknownTarget
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.source import Source

GROUP = "moe_routing.targets"


def target_names() -> list[str]:
    """Names of all registered targets."""
    return sorted({entry.name for entry in metadata.entry_points(group=GROUP)})


def check_target(name: str) -> None:
    """Find out at start what can be found out cheaply.

    Raises:
        UnknownTarget: `name` is neither `registered`, `registered@PATH` nor `module:Class`, or
            there is nothing of the kind at PATH.
        TargetNotInstalled: It is registered, and its package is not in this environment.
    """
    if ":" not in name.partition("@")[0]:
        _locate(name)


def pinned_flashinfer(name: str) -> str | None:
    """The FlashInfer release that a target's sources are made for, if they say so."""
    if ":" in name.partition("@")[0]:
        return None
    source = _locate(name)[1]
    return source.flashinfer if source else None


def load_target(name: str, flashinfer: FlashInfer) -> Target:
    """Make a target, given its registered name or, as an author would, `module:Class`.

    `name@PATH` is that target as its sources at PATH have it: a wheel, an unpacked one, a checkout.

    Raises:
        UnknownTarget: No such name, or what it names is not a target.
        TargetNotInstalled: Its package is not in this environment.
        TargetImportError: Its package, or the module that adapts it, fails to import.
    """
    module, colon, attribute = name.partition(":")
    try:
        if colon and "@" not in module:
            return _checked(name, getattr(import_module(module), attribute))(flashinfer)
        cls, source = _locate(name)
        if issubclass(cls, FrameworkTarget):
            assert source is not None
            return cls(flashinfer, source)
        return cls(flashinfer)
    except (UnknownTarget, TargetNotInstalled, TargetImportError):
        raise
    except Exception as error:
        # Whatever a foreign package raises while it is imported is its own failure, not ours.
        raise TargetImportError(
            f"target {name!r} fails to import: {type(error).__name__}: {error}"
        ) from error


def _locate(name: str) -> tuple[type[Target], Source | None]:
    """The class of a registered target, and the sources that it is about."""
    registered, at, path = name.partition("@")
    if registered not in target_names():
        raise UnknownTarget(
            f"unknown target {name!r}; targets: {', '.join(target_names())}, or module:Class"
        )
    cls = _registered(registered)
    if not issubclass(cls, FrameworkTarget):
        if at:
            raise UnknownTarget(f"target {name!r}: {registered} takes no @PATH")
        return cls, None
    if at:
        return cls, Source.at(cls.package, Path(path).expanduser())
    return cls, Source.installed(cls.package, cls.distributions)


def _registered(name: str) -> type[Target]:
    entry = next(e for e in metadata.entry_points(group=GROUP) if e.name == name)
    return _checked(name, entry.load())


def _checked(name: str, cls: object) -> type[Target]:
    if not (isinstance(cls, type) and issubclass(cls, Target)):
        raise UnknownTarget(f"target {name!r} is {cls!r}, not a class derived from Target")
    return cls
