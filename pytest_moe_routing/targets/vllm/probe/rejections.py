"""Tells what vLLM rejects on purpose from what merely fails.

A server that rejects a request says so before it serves: its checks of configs, gates and the
factory of layers raise by a statement of their own. Any other exception proves nothing.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.unwritten import is_unwritten
from pytest_moe_routing.targets.vllm.probe.capture import refusal
from pytest_moe_routing.targets.vllm.probe.release import is_of_vllm

#: What checks raise.
_TYPES = (AssertionError, NotImplementedError, ValueError)
_STATEMENTS = ("raise ", "assert ")


class Rejected(Exception):
    """vLLM's code rejects a request: the exception and its line, as text."""


def rejection(error: BaseException) -> str | None:
    """Return an exception as text if a check of vLLM raised it; None for any other one."""
    stack = traceback.extract_tb(error.__traceback__)
    line = stack[-1].line if stack and is_of_vllm(stack[-1].filename) else None
    is_check = isinstance(error, _TYPES) and f"{line} ".startswith(_STATEMENTS)
    return refusal(error) if is_check and not is_unwritten(error, is_of_vllm) else None


@contextmanager
def rejections() -> Iterator[None]:
    """Run what a server does before it serves.

    Raises:
        Rejected: A check of vLLM raised.
        Unsupported: It failed otherwise, so what a server does is not known.
    """
    try:
        yield
    except Exception as error:
        # The factory's exceptions are the cause of the probe's own.
        origin = (error.__cause__ or error) if isinstance(error, Unsupported) else error
        told = rejection(origin)
        if told is not None:
            raise Rejected(told) from origin
        if isinstance(error, Unsupported):
            raise
        raise Unsupported(
            f"not judged: {refusal(error)}, which is no check of a request"
        ) from error
