"""The failures of `test_checkpoints`: checkpoints that are served as another scheme."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_moe_routing.failure import Failure, Rank, cause_id

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.served import ServedOtherwise
    from pytest_moe_routing.oracle.target import Target


def of_served(target: Target, found: ServedOtherwise) -> Failure:
    """Return the failure of experts that are served as another scheme than their checkpoint's."""
    served, checkpoint = found.served, found.checkpoint
    scheme = checkpoint.experts[found.experts]
    title = f"{target}: experts that a checkpoint has in {scheme} are not served as {scheme}"
    if not scheme:
        title = f"{target}: experts with unquantized activations are not served as such"
    if served.rejection:
        cause, rank = cause_id("checkpoint-rejected", served.rejected_in), Rank.LOUD
        why = f"the checkpoint is rejected: {served.rejection}"
    else:
        others = ", ".join(served.schemes)
        cause = cause_id(
            "checkpoint", scheme or "weights-only", f"as-{others or 'none'}", served.method
        )
        rank = Rank.SILENT
        keys = f" ({', '.join(served.keys)})" if served.keys else ""
        why = (
            f"{target.name} reads it as {served.name}, and {served.method} serves the experts as "
            f"{others or 'no scheme that is known'}{keys}"
        )
    lines = (
        title,
        "  reach    a published checkpoint, by default",
        f"  format   {checkpoint.format} (experts {found.experts})",
        f"  because  {why}",
        f"  at       {served.source}",
    )
    return Failure(cause, rank, checkpoint.format, lines, served.source)
