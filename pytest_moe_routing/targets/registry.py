"""Finds a target by name. Others add theirs through the entry point group `moe_routing.targets`."""

from __future__ import annotations

from importlib import import_module, metadata

from pytest_moe_routing.backends import FlashInfer
from pytest_moe_routing.errors import TargetImportError, TargetNotInstalled, UnknownTarget
from pytest_moe_routing.targets.protocol import Target

GROUP = "moe_routing.targets"


def target_names() -> list[str]:
    """Names of all registered targets."""
    return sorted({entry.name for entry in metadata.entry_points(group=GROUP)})


def check_target(name: str) -> None:
    """Find out at start what can be found out cheaply.

    Raises:
        UnknownTarget: `name` is neither registered nor of the form `module:Class`.
        TargetNotInstalled: It is registered, and its package is not in this environment.
    """
    if ":" in name:
        return
    if name not in target_names():
        raise UnknownTarget(
            f"unknown target {name!r}; targets: {', '.join(target_names())}, or module:Class"
        )
    _registered(name).check_installed()


def load_target(name: str, flashinfer: FlashInfer) -> Target:
    """Make a target, given its registered name or, as an author would, `module:Class`.

    Raises:
        UnknownTarget: No such name, or what it names is not a target.
        TargetNotInstalled: Its package is not in this environment.
        TargetImportError: Its package, or the module that adapts it, fails to import.
    """
    check_target(name)
    module, _, attribute = name.partition(":")
    try:
        cls = getattr(import_module(module), attribute) if attribute else _registered(name)
        return _checked(name, cls)(flashinfer)
    except (UnknownTarget, TargetNotInstalled, TargetImportError):
        raise
    except Exception as error:
        # Whatever a foreign package raises while it is imported is its own failure, not ours.
        raise TargetImportError(
            f"target {name!r} fails to import: {type(error).__name__}: {error}"
        ) from error


def _registered(name: str) -> type[Target]:
    entry = next(e for e in metadata.entry_points(group=GROUP) if e.name == name)
    return _checked(name, entry.load())


def _checked(name: str, cls: object) -> type[Target]:
    if not (isinstance(cls, type) and issubclass(cls, Target)):
        raise UnknownTarget(f"target {name!r} is {cls!r}, not a class derived from Target")
    return cls
