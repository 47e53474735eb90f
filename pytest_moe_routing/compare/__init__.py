"""Tie-aware comparison with the reference, and the table of error bounds."""

from pytest_moe_routing.compare.budget import Arithmetic
from pytest_moe_routing.compare.choices import admissible_routings
from pytest_moe_routing.compare.moe import MoEComparison, assert_moe, compare_moe
from pytest_moe_routing.compare.routing import RoutingComparison, assert_routing, compare_routing
from pytest_moe_routing.compare.tolerances import PRECISIONS, Precision

__all__ = [
    "PRECISIONS",
    "Arithmetic",
    "MoEComparison",
    "Precision",
    "RoutingComparison",
    "admissible_routings",
    "assert_moe",
    "assert_routing",
    "compare_moe",
    "compare_routing",
]
