"""What a target's code needs of FlashInfer, and the judged release does not have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Lacking:
    """A name of FlashInfer that the target's code needs, and the judged release does not have.

    Attributes:
        name: The dotted name, or that of a function with `()` if it does not take a call.
        why: Why it does not take the call.
        places: Files and lines of the target's code.
    """

    name: str
    why: str
    places: tuple[str, ...]
