"""Where the simulated kernels put tokens: rows grouped by local expert, padded to tiles."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard

#: Fill value of unwritten index buffers; never a valid expert id.
UNWRITTEN = -(2**15)


@dataclass(frozen=True)
class Place:
    """Rows of the permuted buffer that slots go to."""

    expanded: Tensor
    tokens: Tensor
    expert_of_tile: Tensor = field(default_factory=lambda: torch.empty(0))


def permute(ids: Tensor, shard: Shard, tile: int) -> Place:
    """Give every slot of a local expert a row; later tokens first, as the order is no contract."""
    tokens, top_k = ids.shape
    local = (ids - shard.local_expert_offset).flatten()
    mine = (local >= 0) & (local < shard.local_num_experts)
    slots = mine.nonzero().flatten().flip(0)
    slots = slots[local[slots].argsort(stable=True)]
    experts = local[slots]
    counts = torch.bincount(experts, minlength=shard.local_num_experts)
    tiles = -(-counts // tile)
    before = (tiles.cumsum(0) - tiles) * tile
    rank = torch.arange(len(slots)) - (counts.cumsum(0) - counts)[experts]
    expanded = torch.full((tokens * top_k,), -1)
    expanded[slots] = before[experts] + rank
    back = torch.full((int(tiles.sum()) * tile,), -1)
    back[expanded[slots]] = slots // top_k
    owner = torch.arange(shard.local_num_experts).repeat_interleave(tiles)
    return Place(expanded.view(tokens, top_k), back, owner)


def unwritten(tokens: int, top_k: int) -> Routing:
    """Return buffers that no kernel wrote."""
    ids = torch.full((tokens, top_k), UNWRITTEN)
    return Routing(ids, torch.zeros(tokens, top_k, dtype=torch.bfloat16))
