"""Tie-aware comparison with the reference, and the table of error bounds."""

from pytest_moe_routing.compare.routing import Comparison, assert_routing, compare_routing
from pytest_moe_routing.compare.tolerances import PRECISIONS, Precision

__all__ = ["PRECISIONS", "Comparison", "Precision", "assert_routing", "compare_routing"]
