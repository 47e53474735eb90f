"""What a block that was built and run asks of its TopK and its experts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.dtypes import Dtypes
from pytest_moe_routing.targets.layers import is_loaded, loaded_dtype
from pytest_moe_routing.targets.sglang.probe.choices import choice_problem
from pytest_moe_routing.targets.sglang.probe.router_case import HIDDEN, INNER
from pytest_moe_routing.targets.sglang.probe.watching import Seen


def asked(
    names: Names, question: Mapping[str, Any], seen: Seen, dtypes: Dtypes, factor: float
) -> dict[str, Any]:
    """Return what a block asks of its TopK, and what goes around it; see `model_code.Asked`.

    Args:
        question: See `choice_problem`.
        seen: What happened while the block was built and run.
        factor: By what the block multiplies the experts' output where TopK weighs 1.

    Raises:
        Unsupported: Its experts are not given what its TopK has chosen.
    """
    if not (seen.logits and seen.runners):
        raise Unsupported(f"{seen.place} gives its experts nothing that its TopK has chosen")
    (topk,) = seen.topks
    config, bias = topk.topk_config, topk.topk_config.correction_bias
    function = config.custom_routing_function
    gates = [*dtypes.weights_of(seen.logits[0], seen.block).values()]
    if not gates and "router_logits" not in inspect.signature(seen.block.forward).parameters:
        gates = [each for each in seen.block.parameters() if each is seen.logits[0]]
    scaled = config.apply_routed_scaling_factor_on_output
    fields = ("top_k", "use_grouped_topk", "num_expert_group", "topk_group", "renormalize")
    return {
        "block": seen.place,
        **{name: getattr(config, name) for name in fields},
        "scoring_func": config.scoring_func,
        "routed_scaling_factor": config.routed_scaling_factor if scaled else None,
        "bias_dtype": None if bias is None else _dtype(loaded_dtype(bias, seen.block)),
        "bias_is_loaded": bias is None or is_loaded(bias, seen.block, topk),
        "logits_dtype": _dtype(seen.logits[0].dtype),
        "gate_dtypes": sorted(dtypes.of(seen.logits[0])),
        "router_weight_dtypes": sorted(dtypes.of_weight(seen.logits[0], seen.block)),
        "on_input": seen.on_input,
        "output_factor": factor,
        "experts": _experts(seen),
        **_sizes(seen),
        "custom_routing": None if function is None else _name(function),
        **_problem(lambda: choice_problem(names, question, seen, gates, factor)),
    }


def _experts(seen: Seen) -> dict[str, Any]:
    """Return what a block states of its experts, by SGLang's names."""
    told = seen.runners[0]
    names = ("activation", "is_gated", "gemm1_alpha", "gemm1_clamp_limit", "swiglu_limit")
    has_bias = any("bias" in n for layer in seen.made for n, _ in layer.named_parameters())
    return {**{name: getattr(told, name) for name in names}, "has_bias": has_bias}


def _sizes(seen: Seen) -> dict[str, Any]:
    """Return how many experts a block's layer routes to, and sizes of the config and the layer.

    Code that calls experts as a function has no layer.
    """
    if not seen.made:
        return {"num_experts": None, "sizes": {}}
    told = seen.made[0].moe_runner_config
    sizes = {
        "hidden_size": (HIDDEN, told.hidden_size),
        "intermediate_size": (INNER, told.intermediate_size_per_partition),
    }
    return {"num_experts": told.num_experts - seen.shared, "sizes": sizes}


def _name(function: Any) -> str:
    """Return the name of a routing function, also of one with arguments."""
    inner = getattr(function, "func", function)
    return str(getattr(inner, "__qualname__", inner)).partition(".<locals>")[0].lstrip("_")


def _problem(find: Callable[[], str | None]) -> dict[str, str | None]:
    """Return what is wrong with a block's choice, or why that is not judged."""
    try:
        return {"choice_problem": find(), "choice_unknown": None}
    except Unsupported as reason:
        return {"choice_problem": None, "choice_unknown": str(reason)}


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
