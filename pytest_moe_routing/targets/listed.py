"""Limits the stand-ins for FlashInfer to the names, and the parameters, that a release has."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from importlib import import_module
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.names import Names
from pytest_moe_routing.targets.limits import DoesNotBind, NotInRelease
from pytest_moe_routing.targets.stubs import Stub


class Listed:
    """The names of one release; see `limits.Limits`.

    A submodule that exists counts as imported.
    """

    def __init__(self, names: Names) -> None:
        self._names = names

    def has_module(self, name: str) -> bool:
        """Return whether the release has a module.

        Raises:
            Unsupported: The modules of its package are not listed.
        """
        return self._known(self._names.has_module(name), name)

    def attribute(self, module: str, name: str, value: Any) -> Any:
        full = f"{module}.{name}"
        if not self._names.has(module, name):
            if self._names.has_module(full):
                return import_module(full)
            self._known(self._names.has(module, name), full)
            raise NotInRelease(
                f"module {module!r} of FlashInfer {self._names.release} has no attribute {name!r}"
            )
        members = self._names.members(name)
        return self.checked(name, value) if members is None else _Enum(full, members)

    def checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function that takes only the arguments that the release's takes, if known."""
        signature = self._names.signature(name)
        if signature is None:
            return function
        return _Checked(f"{name} of FlashInfer {self._names.release}", signature, function)

    def _known(self, answer: bool | None, name: str) -> bool:
        if answer is None:
            raise Unsupported(
                f"not judged: whether FlashInfer {self._names.release} has {name} is not listed"
            )
        return answer


class _Enum(Stub):
    """An enum of which the members are known, not their values."""

    def __init__(self, name: str, members: Collection[str]) -> None:
        super().__init__(name)
        self._members_ = members

    def __getattr__(self, name: str) -> Any:
        if name in self._members_:
            return super().__getattr__(name)
        raise NotInRelease(f"{self.__name__} has no member {name!r}")


class _Checked(Stub):
    """A function whose parameters are known."""

    def __init__(
        self, name: str, signature: inspect.Signature, function: Callable[..., Any]
    ) -> None:
        super().__init__(name)
        self.__signature__ = signature
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        try:
            self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise DoesNotBind(f"{self.__name__}: {error}") from None
        return self._function(*args, **kwargs)

    def __bool__(self) -> bool:
        return True
