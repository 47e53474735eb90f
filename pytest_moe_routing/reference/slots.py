"""The slots of a routing, by expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_moe_routing.errors import LayerError
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard

#: Slots for which the launches on a GPU take longer than their work.
FEW = 1 << 11


@dataclass(frozen=True)
class SortedSlots:
    """The slots of a routing, `(token, choice)`, in ascending order of their experts.

    Attributes:
        order: int64 `[num_tokens * top_k]`: the place of each in the routing, row by row.
        tokens: int64, the token of each.
        weights: The router weight of each, in the computing dtype.
        bounds: Expert `e` has those from `bounds[e]` to `bounds[e + 1]`.
    """

    order: Tensor
    tokens: Tensor
    weights: Tensor
    bounds: list[int]

    @classmethod
    def of(cls, routing: Routing, num_experts: int, dtype: torch.dtype) -> SortedSlots:
        """Sort the slots of a routing.

        Raises:
            LayerError: An id is not one of the experts.
        """
        device = routing.topk_ids.device
        ids = routing.topk_ids.flatten()
        # Few slots are sorted on the CPU: a GPU needs longer to launch a sort.
        ids, order = (ids.cpu() if len(ids) <= FEW else ids).sort(stable=True)
        edges = torch.arange(num_experts + 1, device=ids.device)
        bounds = torch.searchsorted(ids, edges).tolist()
        if bounds[0] or bounds[-1] < len(ids):
            raise LayerError(f"topk_ids: found ids outside 0..{num_experts - 1}")
        order, tokens = torch.stack((order, order // routing.topk_ids.shape[1])).to(device)
        weights = routing.topk_weights.flatten().index_select(0, order).to(dtype)
        return cls(order, tokens, weights, bounds)

    def counts(self, shard: Shard) -> Iterator[tuple[int, int]]:
        """Yield each expert of a shard that has slots, and how many."""
        for expert in shard.experts:
            if count := self.bounds[expert + 1] - self.bounds[expert]:
                yield expert, count


def slots_by_expert(
    routing: Routing, num_experts: int, shard: Shard, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield each expert of a shard that has tokens, its tokens `[n]`, and their weights `[n]`.

    Raises:
        LayerError: An id is not one of the experts.
    """
    slots = SortedSlots.of(routing, num_experts, dtype)
    for expert, count in slots.counts(shard):
        start = slots.bounds[expert]
        yield expert, slots.tokens[start : start + count], slots.weights[start : start + count]
