"""Two arguments of a call in a target's code that have each other's place, by their names."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Crossed:
    """A call that hands two values over under each other's names.

    Attributes:
        called: The function that is called.
        given: Both arguments, each with the name of its value.
        owner: The function or class around the call.
        place: File and line.
    """

    called: str
    given: tuple[tuple[str, str], tuple[str, str]]
    owner: str
    place: str
