"""What vLLM's compiled routing operators compute, as recipes of their arguments.

From `csrc/libtorch_stable/moe/` (`topk_softmax_kernels.cu`, `topk_softplus_sqrt_kernels.cu`,
`grouped_topk_kernels.cu`) and `csrc/cpu/sgl-kernels/topk.cpp` of vLLM 0.33.0. The probe puts these
in the place of the operators on a CPU; on a GPU, the operators themselves are compared with them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.routing import Recipe

if TYPE_CHECKING:
    from torch import Tensor

#: The operators that score logits and choose the best of all experts: what they score by.
SCORES = {
    "topk_softmax": "softmax",
    "topk_sigmoid": "sigmoid",
    "topk_hash_softplus_sqrt": "sqrtsoftplus",
}


def flat_recipe(name: str, top_k: int, *, renormalize: bool, bias: bool, scale: float) -> Recipe:
    """Return the recipe of an operator that knows no groups."""
    return Recipe(
        top_k=top_k,
        score=SCORES[name],
        bias=bias,
        normalize="sum" if renormalize else "none",
        scale=scale,
    )


def grouped_recipe(
    top_k: int, groups: int, kept: int, *, renormalize: bool, scale: float, scoring_func: int
) -> Recipe:
    """Return the recipe of `grouped_topk`: `scoring_func` 0 is given scores, 1 logits."""
    return Recipe(
        top_k=top_k,
        score="sigmoid" if scoring_func else "identity",
        bias=True,
        n_group=groups,
        topk_group=kept,
        normalize="sum" if renormalize else "none",
        scale=scale,
    )


def _flat(name: str) -> Callable[..., None]:
    from pytest_moe_routing.reference.routing import route

    def operator(
        topk_weights: Tensor,
        topk_ids: Tensor,
        token_expert_indices: Tensor,
        gating_output: Tensor,
        renormalize: bool = False,
        e_score_correction_bias: Tensor | None = None,
        routed_scaling_factor: float = 1.0,
        **_: Any,
    ) -> None:
        bias = e_score_correction_bias
        recipe = flat_recipe(
            name,
            topk_ids.shape[1],
            renormalize=renormalize,
            bias=bias is not None,
            scale=routed_scaling_factor,
        )
        routing = route(gating_output, recipe, bias)
        topk_weights.copy_(routing.topk_weights)
        topk_ids.copy_(routing.topk_ids)

    return operator


def _softplus_sqrt(
    topk_weights: Tensor,
    topk_indices: Tensor,
    token_expert_indices: Tensor,
    gating_output: Tensor,
    renormalize: bool = False,
    routed_scaling_factor: float = 1.0,
    e_score_correction_bias: Tensor | None = None,
    input_tokens: Tensor | None = None,
    hash_indices_table: Tensor | None = None,
    **_: Any,
) -> None:
    from pytest_moe_routing.errors import Unsupported

    if hash_indices_table is not None:
        raise Unsupported("experts are looked up in a table, not chosen by logits")
    _flat("topk_hash_softplus_sqrt")(
        topk_weights,
        topk_indices,
        token_expert_indices,
        gating_output,
        renormalize,
        e_score_correction_bias,
        routed_scaling_factor,
    )


def _grouped_topk(
    scores: Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    renormalize: bool,
    routed_scaling_factor: float,
    bias: Tensor,
    scoring_func: int = 0,
) -> tuple[Tensor, Tensor]:
    import torch

    from pytest_moe_routing.reference.routing import route

    recipe = grouped_recipe(
        topk,
        num_expert_group,
        topk_group,
        renormalize=renormalize,
        scale=routed_scaling_factor,
        scoring_func=scoring_func,
    )
    routing = route(scores, recipe, bias)
    return routing.topk_weights, routing.topk_ids.to(torch.int32)


def _biased_topk_cpu(
    hidden_states: Tensor,
    gating_output: Tensor,
    correction_bias: Tensor,
    topk: int,
    renormalize: bool,
    scoring_func: str,
    num_fused_shared_experts: int,
    routed_scaling_factor: float | None,
    apply_routed_scaling_factor_on_output: bool,
) -> tuple[Tensor, Tensor]:
    import torch

    from pytest_moe_routing.reference.routing import route

    factor = routed_scaling_factor if apply_routed_scaling_factor_on_output else None
    recipe = Recipe(
        top_k=topk,
        score=scoring_func,
        bias=True,
        normalize="sum" if renormalize else "none",
        scale=1.0 if factor is None else factor,
    )
    routing = route(gating_output, recipe, correction_bias)
    return routing.topk_weights, routing.topk_ids.to(torch.int32)


def in_torch(platform: str) -> Mapping[str, Callable[..., Any]]:
    """Return torch functions for the operators of `vllm._custom_ops` on a platform, by name."""
    if platform == "cpu":
        return {"biased_topk_cpu": _biased_topk_cpu}
    return {
        "topk_softmax": _flat("topk_softmax"),
        "topk_sigmoid": _flat("topk_sigmoid"),
        "topk_hash_softplus_sqrt": _softplus_sqrt,
        "grouped_topk": _grouped_topk,
    }
