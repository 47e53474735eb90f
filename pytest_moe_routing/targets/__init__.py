"""Adapters of the systems under test, and the registry that finds them."""

from pytest_moe_routing.targets.registry import (
    check_target,
    load_target,
    pinned_flashinfer,
    target_names,
)

__all__ = ["check_target", "load_target", "pinned_flashinfer", "target_names"]
