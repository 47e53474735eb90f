"""The failures of `test_placements`: experts that are lost, or that run where nobody asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pytest_moe_routing.failure import Failure, Rank, cause_id, few
from pytest_moe_routing.oracle.judgement import reach_of
from pytest_moe_routing.oracle.record import Reach
from pytest_moe_routing.report import text

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.moved import Moved
    from pytest_moe_routing.oracle.target import Target


#: Kinds of experts whose names do not say what they are.
_NAMES = {"replaced": "modular experts in place of monolithic ones"}


def of_lost_others(
    target: Target, scheme: str, reason: str, models: Sequence[ModelSpec]
) -> Failure:
    """Return the failure of models that no longer reach CUTLASS's kernels.

    Args:
        reason: Why a call of the kernels cannot be judged.
    """
    reached = reach_of(models[0], scheme, ())
    lines = (
        f"{target}, {scheme}: experts no longer call CUTLASS's kernels where they did",
        f"  reach    {text.reached(reached, (), by_default=False)}",
        f"  models   asked about: {few([model.id for model in models])}",
        f"  expected a call on each GPU that {target.name} is known to run them on",
        f"  now      {reason}",
    )
    rarity = text.rarity(reached, by_default=False)
    return Failure(cause_id("lost-experts", "cutlass"), Rank.LOST, scheme, lines, rarity=rarity)


def of_moved(target: Target, scheme: str, moved: Moved) -> Failure:
    """Return the failure of experts that run elsewhere than their release is known to run them."""
    first, rule, switches = moved.places[0], moved.rule, moved.switches
    names = (place.name for place in moved.places if place.name)
    name = next(names, _NAMES.get(first.experts, f"{first.experts} experts"))
    how = " by default" if first.by_default else ""
    reached = reach_of(moved.models[0], scheme, switches)
    reach = text.reached(reached, switches, by_default=not switches)
    devices = ", ".join(sorted({place.device for place in moved.places}, key=float))
    placements = few([*dict.fromkeys(place.placement for place in moved.places)])
    lines = [
        f"  reach    {reach}",
        f"  where    on compute capability {devices}, with {placements}",
        f"  models   asked about: {few([model.id for model in moved.models])}",
    ]
    known = f"as {target.name} {moved.since} is known to"
    if rule is not None:
        what = f"{target}, {scheme}: {name} no longer run{how} where they did"
        lines += [f"  expected the experts of FlashInfer, {known}", f"  now      {rule.instead}"]
        lines += [f"  at       {', '.join(filter(None, (rule.name, rule.source)))}"]
        # Of several functions, it is not known which one decides.
        by = rule.name if " or " not in rule.name else "by-one-of-several"
        cause, rank = cause_id("lost-place", first.experts, by), Rank.LOST
    elif moved.refused is not None:
        what = f"{target}, {scheme}: {name} run{how} where FlashInfer does not run their kernel"
        lines += [f"  because  {line}" for line in text.sentences([moved.refused])]
        kind = "other" if first.by_default else "requested"
        cause, rank = cause_id(f"{kind}-experts", moved.refused.id, name), Rank.LOUD
    else:
        what = f"{target}, {scheme}: {name} run{how} where {target.name} {moved.since} does not"
        lines.append("  because  nobody has asked what arrives at their kernel there")
        asked = "by default" if first.by_default else "if requested"
        cause, rank = cause_id("new-place", name, asked), Rank.LOST
    source = "" if rule is None else rule.source
    rarity = text.rarity(reached, by_default=not switches)
    is_opt_in = reached is Reach.OPT_IN
    return Failure(cause, rank, scheme, (what, *lines), source, rarity=rarity, is_opt_in=is_opt_in)
