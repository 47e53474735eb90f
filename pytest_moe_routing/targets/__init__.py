"""Adapters of the systems under test, and the registry that finds them."""

from pytest_moe_routing.targets.registry import (
    Located,
    TargetId,
    load_target,
    locate,
    target_names,
)

__all__ = ["Located", "TargetId", "load_target", "locate", "target_names"]
