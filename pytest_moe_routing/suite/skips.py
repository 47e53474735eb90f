"""What the suite's tests do when a question has no answer here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import pytest

from pytest_moe_routing.errors import Unsupported


class Found(Protocol):
    """What was found in a scheme.

    Attributes:
        answered: How many models were asked.
        unanswered: Why how many models could not be asked.
    """

    @property
    def answered(self) -> int: ...

    @property
    def unanswered(self) -> Counter[str]: ...


@contextmanager
def unsupported_is_skipped() -> Iterator[None]:
    """Turn `Unsupported` into a skip with its reason: never a pass."""
    try:
        yield
    except Unsupported as reason:
        pytest.skip(str(reason))


def skip_without(found: Found, nothing: str) -> None:
    """Skip a test if no model was asked: as not judged, with the most common reason.

    Args:
        nothing: The reason if there was no model to ask, which leaves nothing to judge.
    """
    if found.answered:
        return
    with unsupported_is_skipped():
        if found.unanswered:
            raise Unsupported(found.unanswered.most_common(1)[0][0])
    pytest.skip(nothing)
