"""The options of a server, as SGLang's code asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pytest_moe_routing.targets.stubs import Stub


class Options:
    """Options of a server, each as given here or else not set."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class Defaults:
    """A group of a server's options of which none is given; one without a default is a stub."""

    def __init__(self, defaults: Callable[[], Mapping[str, Any]]) -> None:
        self._defaults = defaults

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        values = self._defaults()
        return values[name] if name in values else Stub(name)


class Groups(Defaults):
    """The options of a server, by group; each group that is not set has only defaults."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Defaults(self._defaults)
