"""Which quantization keys a target's experts accept, of weights and of activations."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

#: The keys of weights and of activations, by name.
Pair = tuple[str, str]
#: Instead of the key of activations: all of them.
ANY = "any"


@dataclass(frozen=True)
class AcceptedKeys:
    """What one class of experts accepts.

    Attributes:
        name: The class.
        keys: The names of all keys that the release defines.
        pairs: By compute capability of a GPU.
        function: The function that decides.
        source: Its file and line.
    """

    name: str
    keys: Collection[str]
    pairs: Mapping[str, Collection[Pair]]
    function: str
    source: str


@dataclass(frozen=True)
class KnownKeys:
    """What the experts of a target are known to accept.

    Attributes:
        release: The target's own release, or the newest one before it of which that is known.
        is_own: Whether it is the target's own.
        pairs: By experts, and by compute capability of a GPU.
    """

    release: str
    is_own: bool
    pairs: Mapping[str, Mapping[str, Collection[Pair]]]
