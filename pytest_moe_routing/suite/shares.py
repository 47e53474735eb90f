"""The failures of experts that are split, each over several ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_moe_routing.failure import Failure, Rank, cause_id, few
from pytest_moe_routing.oracle.finding import Kind, source_of
from pytest_moe_routing.oracle.judgement import reach_of
from pytest_moe_routing.oracle.record import Reach
from pytest_moe_routing.oracle.shares import told_of
from pytest_moe_routing.report import text

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.shares import WrongSplit
    from pytest_moe_routing.oracle.target import Target

#: What a kernel of FlashInfer or the target's code rejects, rather than compute it wrongly.
_LOUD = (Kind.RAISED, Kind.LIMIT)


def of_split(target: Target, scheme: str, wrong: WrongSplit) -> Failure:
    """Return the failure of a rank whose part of each expert does not get to its kernel."""
    call, switches = wrong.at, wrong.at.switches
    first = wrong.splits[0]
    model, whole = first.model, first.model.experts.intermediate_size
    reach, is_default = reach_of(model, scheme, switches or ()), switches == ()
    reached = "whether by default cannot be asked of this release"
    if switches is not None:
        reached = text.reached(reach, switches, by_default=is_default)
    title = f"experts are split wrongly over {first.count} ranks"
    if first.count == 1:
        title = f"experts with {whole} rows do not get to their kernel"
    lines = (
        f"{model} on {scheme}, {target}: {title}",
        f"  reach    {reached}",
        *(f"  because  {line}" for line in text.sentences(call.findings)),
        f"  ranks    each has {first.inner} of {whole} rows of the gate and up weights",
        f"  at       {'; '.join(wrong.methods)}",
        f"  models   {few(told_of(wrong.splits))}",
    )
    brief = tuple(line for line in lines if not line.startswith("  ranks "))
    sources, names = zip(*(method.split(" ", 1) for method in wrong.methods), strict=True)
    name = "+".join(names)
    what = "+".join(dict.fromkeys(finding.id for finding in call.findings))
    kinds = {finding.kind for finding in call.findings}
    rank = Rank.LOUD if kinds.issubset(_LOUD) else Rank.SILENT
    if reach in (Reach.OPT_IN, Reach.NO_MODEL):
        rank, lines = (
            Rank.LATENT,
            (f"{lines[0]}: {'; '.join(text.sentences(call.findings))}", reached),
        )
    return Failure(
        cause_id("split", what, name),
        rank,
        f"{model.id} {scheme}",
        lines,
        source_of(call.findings) or sources[0],
        name,
        reached,
        text.rarity(reach, by_default=is_default),
        brief=brief if rank is not Rank.LATENT else (),
    )
