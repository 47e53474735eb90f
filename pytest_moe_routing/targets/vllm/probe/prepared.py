"""The steps before and after experts, as vLLM makes them, and what a kernel gets of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.targets import marked
from pytest_moe_routing.targets.bits import have_same_bits
from pytest_moe_routing.targets.marked import UnusableArgumentError
from pytest_moe_routing.targets.vllm.probe.experts import ServedScheme
from pytest_moe_routing.targets.vllm.probe.release import names

#: By how a scheme has activations, and by how many tokens, the last ones that were right: what the
#: layer had, and what the kernel was given. To read them takes six times as long as to find that
#: they are the same. One layer is asked about with several numbers of tokens in turn.
_RIGHT: dict[Any, tuple[Tensor | None, ...]] = {}
_NOTHING = (None, None, None)


def prepare_finalize(config: Any, fused: Any, *, is_monolithic: bool = False) -> Any:
    """Make the steps before and after the experts as vLLM makes them for the parallel config.

    Args:
        config: vLLM's config of the layer.
        fused: The experts.
    """
    arguments = {
        "moe": config,
        "quant_config": fused.quant_config,
        "allow_new_interface": True,
        "use_monolithic": is_monolithic,
    }
    return names().get("prepare-factory")(**names().accepted("prepare-factory", arguments))


def misread(arguments: Mapping[str, Any], row: ServedScheme, hidden: Tensor) -> tuple[str, ...]:
    """Return what is wrong with the activations that a kernel is given; nothing if they are right.

    Args:
        arguments: Those of the kernel.
        row: How its scheme has activations.
        hidden: What the layer was given, of marked tokens: bfloat16, [tokens, columns].

    Returns:
        Nothing; or an argument, what is right, and what is there instead.
    """
    got, scale = arguments["hidden_states"], arguments.get("hidden_states_scale")
    dtype, _, per_scale, _ = row.quantized
    found = str(got.dtype).removeprefix("torch.")
    if found != dtype:
        return "hidden_states", dtype, found
    seen, kind = (hidden, got, scale), (row.quantized, len(hidden))
    if all(map(_are_same, seen, _RIGHT.get(kind, _NOTHING))):
        return ()
    try:
        # Scales of whole tensors, which are 1 here, are among the experts' own.
        read = marked.activations(got, scale) if per_scale else got.float()
    except UnusableArgumentError as error:
        return error.name, error.wanted, error.got
    is_same = read.shape == hidden.shape and torch.equal(read, hidden.float())
    if not is_same:
        return "hidden_states", "the layer's values", "other values"
    _RIGHT[kind] = tuple(None if each is None else each.clone() for each in seen)
    return ()


def _are_same(x: Tensor | None, y: Tensor | None) -> bool:
    """Return whether tensors have the same dtype, shape and bits."""
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and have_same_bits(x, y)
