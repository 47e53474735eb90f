"""Names of dtypes, ordered by their precision; without torch."""

from __future__ import annotations

from collections.abc import Iterable

#: The least precise first.
_BY_PRECISION = ("float8_e5m2", "float8_e4m3fn", "bfloat16", "float16", "float32", "float64")


def narrowest(names: Iterable[str], *, default: str) -> str:
    """Return the least precise of several dtypes; the default if there are none."""
    return min(names, key=_BY_PRECISION.index, default=default)
