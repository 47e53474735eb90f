"""What the suite's tests do when a question has no answer here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pytest_moe_routing.errors import Unsupported


@contextmanager
def unsupported_is_skipped() -> Iterator[None]:
    """Turn `Unsupported` into a skip with its reason: never a pass."""
    try:
        yield
    except Unsupported as reason:
        pytest.skip(str(reason))
