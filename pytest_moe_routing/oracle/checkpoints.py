"""The quantization of a checkpoint, and what a target makes of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Checkpoint:
    """The quantization of a published checkpoint.

    Attributes:
        format: What wrote the checkpoint's config, in words.
        config: The quantization config.
        hf_config: What else config.json has.
        experts: The scheme of a layer's experts, by the name of the experts; empty if it is none
            that is judged.
    """

    format: str
    config: Mapping[str, Any]
    hf_config: Mapping[str, Any]
    experts: Mapping[str, str]


@dataclass(frozen=True)
class Served:
    """What a target makes of the experts of a checkpoint.

    Attributes:
        name: The target's name for the checkpoint's quantization.
        method: The class that prepares and runs the experts; empty if the target rejects them.
        schemes: The schemes whose experts it asks for.
        keys: What it asks for them with.
        source: File and line of the class, or of the code that rejects the checkpoint.
        rejection: Why the target rejects the checkpoint; empty if it does not.
        rejected_in: The function that does.
    """

    name: str
    method: str
    schemes: Collection[str]
    keys: Collection[str]
    source: str
    rejection: str = ""
    rejected_in: str = ""
