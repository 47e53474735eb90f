"""The failures of `test_argument_names`: calls with two values in each other's place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_moe_routing.failure import Failure, Rank, cause_id

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.crossed import Crossed
    from pytest_moe_routing.oracle.target import Target


def of_crossed(target: Target, crossed: Crossed) -> Failure:
    """Return the failure of a call that gives two arguments each other's values."""
    first, second = (f"{name}={value}" for name, value in crossed.given)
    lines = (
        f"{target}: {crossed.called} is given two values in each other's place",
        f"  because  by their names: {first}, {second}",
        f"  at       {crossed.place} {crossed.owner}",
    )
    names = "+".join(name for name, _ in crossed.given)
    site = crossed.owner or crossed.called
    cause = cause_id("crossed", names, site)
    return Failure(cause, Rank.SILENT, names, lines, crossed.place, site)
