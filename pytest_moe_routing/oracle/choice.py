"""What a target chooses for a layer, what is known of it, and what keeps it from its kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """What makes a target take its fused experts for a layer.

    Attributes:
        selector: The code that decides.
        switches: What a user has to switch on; empty if it is the default, and None if nothing
            makes the target take the experts.
        instead: What the target takes otherwise, or why it takes none.
        device: What has to be switched on for the experts to run on the device at all.
    """

    selector: str
    switches: tuple[str, ...] | None
    instead: str = ""
    device: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expected:
    """What a target is known to do with a case: its fused kernel runs and is exact.

    Attributes:
        release: The target's own release, or the newest one before it of which that is known.
        by_default: Whether the kernel runs without a switch.
    """

    release: str
    by_default: bool


@dataclass(frozen=True)
class Rule:
    """The code of a target that keeps its fused kernel from a model.

    Attributes:
        name: Its function.
        source: File and line.
        instead: What the target takes by default, where the kernel runs with a switch only.
    """

    name: str = ""
    source: str = ""
    instead: str = ""
