"""The failures of `test_quantization_keys`: what experts newly accept, or no longer accept."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_moe_routing.failure import Failure, Rank, cause_id, few

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.changed_keys import ChangedKeys
    from pytest_moe_routing.oracle.target import Target


def of_changed_keys(target: Target, changed: ChangedKeys) -> Failure:
    """Return the failure of experts that accept other checkpoints than they are known to."""
    owner = changed.function.rpartition(".")[0] or changed.function
    first, *others = changed.pairs
    which = "several" if others else "-".join(first)
    pairs = "weights {} with activations {}".format(*first)
    if others:
        pairs = f"{len(changed.pairs)} pairs of keys, such as {pairs}"
    experts = few(changed.experts)
    lines = [f"  where    on compute capability {', '.join(changed.devices)}"]
    known = f"as in the release {target.name} {changed.since}"
    if changed.accepted:
        what = f"{target}: the gate of {experts} accepts more than it is known to accept"
        lines += [
            f"  accepted {pairs}",
            f"  expected to be rejected, {known}",
            "  because  nobody has asked what arrives at the kernel of such a checkpoint",
        ]
    else:
        what = f"{target}: the gate of {experts} rejects what it is known to accept"
        lines += [f"  rejected {pairs}", f"  expected to be accepted, {known}"]
    lines.append(f"  at       {changed.function}, {changed.source}")
    kind, rank = ("accepts", Rank.SILENT) if changed.accepted else ("rejects", Rank.LOST)
    cause = cause_id(f"{kind}-scheme", owner, which)
    return Failure(cause, rank, owner, (what, *lines), changed.source)
