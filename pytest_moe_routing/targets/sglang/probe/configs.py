"""The config objects that SGLang's code makes a layer from: a model's, and its quantization's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import layers
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.requests import module_apart


class ModelConfig(layers.Config):
    """The config object of a model of SGLang."""

    reads = "SGLang's code reads {!r} of the model's config"

    def __init__(self, values: Mapping[str, Any]) -> None:
        parts = {name: ModelConfig(v) for name, v in values.items() if isinstance(v, Mapping)}
        super().__init__({**values, **parts})


def quant_config(names: Names, row: Mapping[str, Any] | None) -> Any:
    """Return the quantization config of a checkpoint in this scheme; None if it needs none."""
    if row is None:
        return None
    make = names.get(row["name"])
    return make(row["in_checkpoint"]) if "in_checkpoint" in row else make(True, **row["arguments"])


def rewritten(
    enter: Callable[[], None], function: str, experts: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the config that SGLang makes of a params.json with these `experts`.

    Args:
        enter: Enters the world in which SGLang's code runs.

    Raises:
        Unsupported: The release does not have the function.
    """
    enter()
    place, _, name = function.rpartition(".")
    module = module_apart(place)
    if not hasattr(module, name):
        raise Unsupported(f"this release has no {function}")
    made: Mapping[str, Any] = getattr(module, name)({"moe": dict(experts)})
    return {key: value for key, value in made.items() if key != "moe"}
