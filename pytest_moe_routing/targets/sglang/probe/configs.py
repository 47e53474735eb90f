"""The config objects that SGLang's code makes a layer from: a model's, and its quantization's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pytest_moe_routing.targets import layers
from pytest_moe_routing.targets.contract import Names


class ModelConfig(layers.Config):
    """The config object of a model of SGLang."""

    reads = "SGLang's code reads {!r} of the model's config"


def quant_config(names: Names, row: Mapping[str, Any] | None) -> Any:
    """Return the quantization config of a checkpoint in this scheme; None if it needs none."""
    if row is None:
        return None
    make = names.get(row["name"])
    return make(row["in_checkpoint"]) if "in_checkpoint" in row else make(True, **row["arguments"])
