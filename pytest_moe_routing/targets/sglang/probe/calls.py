"""Calls of FlashInfer's entry points, as SGLang's code makes them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, Self

from pytest_moe_routing.targets.sglang.probe.raised import place_of


class Call(tuple[str, dict[str, Any]]):
    """An entry point, and the arguments that it was called with.

    Attributes:
        at: File and line of SGLang's code that makes the call; empty if there is none.
    """

    at: str

    @classmethod
    def of(cls, function: str, arguments: Mapping[str, Any]) -> Self:
        """Return the call that is being made."""
        call, frame = cls((function, dict(arguments))), sys._getframe(1)
        while frame.f_back is not None and not _is_of_sglang(frame.f_globals):
            frame = frame.f_back
        call.at = place_of(frame)["source"] if _is_of_sglang(frame.f_globals) else ""
        return call


def _is_of_sglang(names: Mapping[str, Any]) -> bool:
    return str(names.get("__name__", "")).startswith("sglang.")
