"""Asks the MoE block of a model how it splits its shared experts under sequence parallelism.

Ranks that otherwise have the same tokens have a part of them each then. The routed experts of other
ranks get theirs by an all-to-all; a shared expert whose weights are split over the ranks gives each
token a part of its output, which nobody sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from unittest.mock import patch

from torch import nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.probe import blocks
from pytest_moe_routing.targets.vllm.probe.apart import Apart, SplitLinear
from pytest_moe_routing.targets.vllm.probe.world import world

#: A server with `--enable-expert-parallel` and two ranks of each kind.
_PARALLEL = {
    "use_sequence_parallel_moe": True,
    "enable_expert_parallel": True,
    "tensor_parallel_size": 2,
    "data_parallel_size": 2,
}


def split_shared_experts(row: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the linear layers of shared experts whose weights are split over the ranks.

    They are `layers` of the `block`; none if its MoE layer is not told of sequence parallelism.

    Args:
        row, values: See `blocks.layer_request`.

    Raises:
        Unsupported: The release does not have the block, or it cannot be built here.
    """
    surroundings = world()
    if not isinstance(surroundings, Apart):
        raise Unsupported(
            "not judged: sequence parallelism needs a vLLM apart from its dependencies, such as a "
            "wheel"
        )
    surroundings.names.require("model_code")
    with patch.dict(vars(surroundings.vllm_config.parallel_config), _PARALLEL):
        block = blocks.build(row, values, lambda built: built)
    split: list[str] = []
    for layer in block.layers:
        asked = {**layer.arguments, **layer.arguments.get("kwargs", {})}
        shared = asked.get("shared_experts")
        if not asked.get("is_sequence_parallel") or shared is None:
            continue
        if not isinstance(shared, nn.Module):
            raise Unsupported(f"not judged: {block.name} builds its shared experts of a stub")
        # A runner of later releases gathers the tokens of the ranks for such experts.
        if not getattr(shared, "shard_sequence_parallel", False):
            modules = shared.named_modules()
            split += [n for n, m in modules if isinstance(m, SplitLinear) and m.is_split]
    return {"block": block.name, "layers": split}
