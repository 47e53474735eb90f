"""On which GPUs, and for which placements of experts and tokens, a target takes experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: A kind of experts, the compute capability of a GPU, and a placement.
Key = tuple[str, str, str]
#: Kinds of experts that other kernels than TRT-LLM's run, some of them on some GPUs alone.
OTHERS = ("cutlass", "mxfp4")


@dataclass(frozen=True)
class Placed:
    """Where a target takes experts of FlashInfer; see `oracle.moved`.

    Attributes:
        experts: Their kind; the header of each target's `placements.yaml` says which there are.
        device: The compute capability of the GPU.
        placement: How experts and tokens are shared out to GPUs.
        by_default: Whether they are taken without a switch that names them.
        name: Their name in the target.
        switches: What a user has to switch on.
    """

    experts: str
    device: str
    placement: str
    by_default: bool
    name: str = ""
    switches: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"on compute capability {self.device}, with {self.placement}"


@dataclass(frozen=True)
class Placements:
    """All places where a target takes experts of FlashInfer.

    Attributes:
        flags: What a user switches on, by placement.
        requests: What names experts, by their kind.
        compared: GPUs on which other questions compare gates with those on the first Blackwell.
    """

    taken: Mapping[Key, Placed]
    flags: Mapping[str, tuple[str, ...]]
    requests: Mapping[str, str]
    compared: tuple[str, ...] = ()

    def switches(self, key: Key, by_default: bool) -> tuple[str, ...]:
        """Return what a user has to switch on in a place."""
        experts, _, placement = key
        named = () if by_default else (self.requests[experts],)
        return (*self.flags.get(placement, ()), *named)


@dataclass(frozen=True)
class KnownPlacements:
    """Where a target is known to take experts of FlashInfer.

    Attributes:
        release: The target's own release, or the newest one before it of which that is known.
        is_own: Whether it is the target's own.
        by_default: By place, whether the experts are taken without a switch that names them.
    """

    release: str
    is_own: bool
    by_default: Mapping[Key, bool]
