"""What a rank has of experts that are split, each over several ranks.

A rank has a part of each expert's intermediate size: rows of the gate and of the up weights, and
columns of the down weights. Each rank adds its part of the output, so the first one alone adds the
biases of the down weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import marked_weights
from pytest_moe_routing.targets.marked_checkpoint import MarkedCheckpoint
from pytest_moe_routing.targets.scales import FIRST


def rank_of(count: int) -> int:
    """Return the rank whose layer is looked at, of so many that have a part of each expert.

    Not the first two, for which code is right that is wrong for all others; nor any but the next
    one, as the last ranks may have nothing.
    """
    return min(count - 1, 2)


#: Ranks that share out experts unevenly: the first of these numbers that leaves a remainder. Over
#: odd ones, few models can split attention heads.
_UNEVEN = (4, 8, 3, 5, 7)


def uneven_count(experts: int) -> int | None:
    """Return a number of ranks that cannot have equally many of so many experts; None if all can.

    The last rank has fewer experts than the first one, but each different scale that there is.
    """
    counts = (count for count in _UNEVEN if experts % count)
    return next((count for count in counts if experts // count >= len(FIRST)), None)


@dataclass(frozen=True)
class Share:
    """How experts are split.

    Attributes:
        count: Over how many ranks.
        whole: The intermediate size of the experts.
    """

    count: int
    whole: int

    def parts(self, inner: int, block: int = 1) -> Iterator[tuple[int, int]]:
        """Yield what may be the rank's of the intermediate size, from and up to.

        Either all ranks have as much, or each one but the last ones has as many whole blocks of
        scales, or fills the size at its kernel.

        Args:
            inner: The intermediate size at the kernel, which may be padded.
            block: How much of it has one scale.
        """
        local, rank = Fraction(self.whole, self.count), rank_of(self.count)
        yield int(rank * local), int((rank + 1) * local)
        blocks = block * ceil(local / block)
        for size in {blocks, inner} - {local}:
            if rank * size < self.whole:
                yield rank * size, min((rank + 1) * size, self.whole)

    def checkpoint_of(
        self, checkpoint: MarkedCheckpoint, start: int, end: int
    ) -> MarkedCheckpoint | None:
        """Return the rank's part of a checkpoint; None if it would split a block of scales."""
        found = replace(checkpoint, parts={})
        for name, parts in checkpoint.parts.items():
            dim = 0 if name.startswith("w13") else 1
            for part, tensors in parts.items():
                if dim >= tensors[0].ndim:
                    # The first rank alone adds the biases.
                    own = tensors if rank_of(self.count) == 0 else map(torch.zeros_like, tensors)
                    found.parts.setdefault(name, {})[part] = [*own]
                    continue
                bounds = [Fraction(at * tensors[0].shape[dim], self.whole) for at in (start, end)]
                if any(bound.denominator != 1 for bound in bounds):
                    return None
                first, last = map(int, bounds)
                narrowed = [tensor.narrow(dim, first, last - first) for tensor in tensors]
                found.parts.setdefault(name, {})[part] = narrowed
        return found


def _block(checkpoint: MarkedCheckpoint, share: Share) -> int:
    """Return how many columns of the down weights have one scale; 1 if there are none."""
    name = checkpoint.named("gemm2", "scale")
    columns = None if name is None else checkpoint.parts[name]["w2"][0].shape[-1]
    return share.whole // columns if columns else 1


def whole_blocks(size: Fraction) -> int:
    """Return how many rows or columns a tensor of a checkpoint has.

    Raises:
        Unsupported: The last block of scales is not whole.
    """
    if size.denominator != 1:
        raise Unsupported("not judged: checkpoints whose last block of scales is not whole")
    return int(size)


def split_orders(
    scheme: str,
    arguments: Mapping[str, Any],
    checkpoint: MarkedCheckpoint,
    share: Share,
    *,
    gated: bool,
) -> dict[str, Any]:
    """Return what a kernel of TRT-LLM's is given of split experts.

    Returns:
        See `targets.layouts.SplitAnswer`.

    Raises:
        Unsupported: An argument cannot be compared with the checkpoint.
    """
    weights = arguments["gemm1_weights"]
    if not isinstance(weights, Tensor) or weights.ndim < 3:
        raise Unsupported("the rows of gemm1_weights are not known")
    rows = weights.shape[-2]
    inner = rows // (2 if gated else 1)
    checkpoint = checkpoint.as_given(arguments)
    found: list[list[dict[str, Any]]] = []
    is_torn = share.checkpoint_of(checkpoint, *next(share.parts(inner))) is None
    for start, end in share.parts(inner, _block(checkpoint, share)):
        own = share.checkpoint_of(checkpoint, start, end)
        if own is None:
            continue
        # Of torn blocks, a call has other scales than the checkpoint.
        with suppress(Unsupported) if is_torn else nullcontext():
            found.append(marked_weights.orders(scheme, arguments, own, gated=gated))
            if not found[-1]:
                break
    orders = min(found, key=len, default=[])
    return {
        "orders": orders,
        "is_torn": is_torn and (bool(orders) or not found),
        "rows": rows,
        "inner": inner,
        "told": arguments["intermediate_size"],
    }
