"""What packages that are stubs have, where that is known, and how code fails without it."""

from __future__ import annotations

from typing import Any, Protocol


class Limits(Protocol):
    """What one package has."""

    def has_module(self, name: str) -> bool: ...

    def attribute(self, module: str, name: str, value: Any) -> Any:
        """Return the attribute of a stub module, given its stand-in.

        Raises:
            NotInRelease: The module has none of this name.
        """


class NotInRelease(AttributeError):
    """A name that the package does not have."""


class DoesNotBind(TypeError):
    """A call that the package's function does not take."""


#: By name of the package.
_limits: dict[str, Limits] = {}


def limit(package: str, limits: Limits) -> None:
    """From now on a package that is a stub has only what it is known to have."""
    _limits[package] = limits


def limits_of(module: str) -> Limits | None:
    """Return what the package of a module has; None if it is not limited."""
    return _limits.get(module.partition(".")[0])


def is_missing(error: BaseException) -> bool:
    """Return whether code failed as a package lacks what the code imports, names or passes."""
    if isinstance(error, ImportError):
        # Python makes it of what a module raises for a name.
        return limits_of(error.name or "") is not None
    return isinstance(error, (DoesNotBind, NotInRelease))
