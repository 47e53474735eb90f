"""The formats of published checkpoints that a framework is asked about."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.oracle.checkpoints import Checkpoint

#: The experts of a layer, as models of most families name them.
_EXPERTS = "model.layers.3.mlp.experts"


def checkpoints_of(package: str, scheme: str, release: Version | None) -> Iterator[Checkpoint]:
    """Yield the checkpoints of a scheme that `checkpoints.yaml` of a framework lists.

    Args:
        release: Of the framework, whose later formats are left out; None for one newer than all.
    """
    data = read_data(__package__, package, "checkpoints.yaml") or {"formats": {}}
    formats: Mapping[str, Any] = data["formats"].get(scheme, {})
    for name, row in formats.items():
        if release is not None and release < Version(row.get("since", "0")):
            continue
        experts = {_EXPERTS: "" if row.get("weights_only") else scheme}
        if unquantized := row.get("unquantized"):
            experts[unquantized] = "bf16"
        yield Checkpoint(name, row["config"], row.get("hf_config", {}), experts)
