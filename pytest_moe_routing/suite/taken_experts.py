"""The failures of `test_placements` about other experts than FlashInfer's."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_moe_routing.failure import Failure, Rank, cause_id, few
from pytest_moe_routing.oracle.finding import Kind
from pytest_moe_routing.oracle.judgement import reach_of
from pytest_moe_routing.oracle.record import Reach
from pytest_moe_routing.oracle.taken import NONE, SPLITS
from pytest_moe_routing.report import text

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.changed_experts import OtherClass, WrongGate
    from pytest_moe_routing.oracle.target import Target

_COMPUTED = "the experts compute the routing method exactly"


def of_other_class(target: Target, scheme: str, other: OtherClass) -> Failure:
    """Return the failure of models that end with another class of experts."""
    known, now, kept = other.known, other.now, other.kept
    reached, lines, rarity = _reach(scheme, other)
    by_default = "" if other.switches else " by default"
    if known == NONE:
        what = f"{now} run{by_default} where no experts did"
    else:
        what = f"{known} no longer run{by_default} where they did"
    at = f"{kept.name}, {kept.source}" if kept.name else kept.source
    found = "no experts" if now == NONE else now
    expected = "no experts" if known == NONE else known
    lines = [
        f"{target}, {scheme}: {what}",
        *lines,
        f"  expected {expected}, as {target.name} {other.since} is known to",
        f"  now      {found}",
        *([f"  because  {_COMPUTED}"] if other.is_computed else ()),
        f"  at       {at}",
    ]
    if kept.is_gate:
        cause, rank = cause_id("lost-experts", known, kept.name), Rank.LOST
    else:
        why = other.limit or "nobody has asked what these compute there"
        lines.insert(-1, f"  because  {why}")
        cause, rank = cause_id("other-class", known, now), Rank.LOST
    return Failure(
        cause,
        rank,
        scheme,
        tuple(lines),
        kept.source,
        rarity=rarity,
        reach=reached,
        is_opt_in=bool(other.switches),
    )


def of_wrong_gate(target: Target, scheme: str, wrong: WrongGate) -> Failure:
    """Return the failure of a gate that is wrong about a routing method."""
    router, method = wrong.router, wrong.method
    how = "accepts" if wrong.accepted else "rejects"
    what = f"{target}, {scheme}: the gate of {router.name} {how} {method}"
    because = list(text.sentences(wrong.findings)) if wrong.accepted else [_COMPUTED]
    cause = cause_id(f"{how}-method", router.name, method)
    if not wrong.models:
        nobody = str(Reach.NO_MODEL)
        told = f"{what}: {'; '.join(because)}"
        return Failure(cause, Rank.LATENT, scheme, (told, nobody), router.source, reach=nobody)
    reached, about, rarity = _reach(scheme, wrong)
    lines = (
        what,
        *about,
        *(f"  because  {reason}" for reason in because),
        f"  at       {router.gate}, {router.source}",
    )
    rank = Rank.MISSED
    if wrong.accepted:
        kinds = {finding.kind for finding in wrong.findings}
        rank = Rank.DOWNCAST if kinds == {Kind.DOWNCAST} else Rank.SILENT
    return Failure(
        cause,
        rank,
        scheme,
        lines,
        router.source,
        rarity=rarity,
        reach=reached,
        is_opt_in=bool(wrong.switches),
    )


def _reach(scheme: str, found: OtherClass | WrongGate) -> tuple[str, list[str], int]:
    """Return who is affected, the lines about that, and how few they are."""
    switches, (first, *_) = found.switches, found.cases
    ways = (reach_of(model, scheme, switches) for model in found.models)
    reach = min(ways, key=list(Reach).index)
    reached = text.reached(reach, switches, by_default=not switches)
    devices = sorted({device for _, device, way in found.cases if way == first[2]}, key=float)
    split = f", with experts over {SPLITS[first[2]]} ranks" if first[2] in SPLITS else ""
    lines = [
        f"  reach    {reached}",
        f"  where    on compute capability {', '.join(devices)}{split}",
        f"  models   {few([str(model) for model in found.models])}",
    ]
    return reached, lines, text.rarity(reach, by_default=not switches)
