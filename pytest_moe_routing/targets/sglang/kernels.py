"""What SGLang's routing kernels compute, as recipes of their arguments.

From the docstrings and sources of `sglang/kernels/ops/moe/` of SGLang 0.5.23 (`moe_fused_gate.py`,
`moe_topk_softmax.py`, `moe_topk_sigmoid.py`), and of FlashInfer's `fused_topk_deepseek`. The probe
puts these in the place of the kernels on a CPU; `kernels/sglang.py` compares kernels with them on a
GPU. From 0.5.18 on, `moe_fused_gate` is not replaced: `probe/triton_gate.py` runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.errors import RecipeError, Unsupported
from pytest_moe_routing.routing import Recipe

if TYPE_CHECKING:
    from torch import Tensor

_OPS = "sglang.kernels.ops.moe"


def gate_recipe(
    top_k: int,
    score: str,
    *,
    bias: bool,
    renormalize: bool,
    scale: float,
    groups: tuple[int, int] = (1, 1),
) -> Recipe:
    """Return the recipe of a gate kernel, of `moe_fused_gate` above all."""
    return Recipe(
        top_k=top_k,
        score=score,
        bias=bias,
        n_group=groups[0],
        topk_group=groups[1],
        normalize="sum" if renormalize else "none",
        # In the place of the kernels' guard against a sum of zero.
        epsilon=1e-20 if renormalize else 0.0,
        scale=scale,
    )


def _moe_fused_gate(
    scores: Tensor,
    bias: Tensor | None,
    topk: int,
    scoring_func: str = "sigmoid",
    num_fused_shared_experts: int = 0,
    renormalize: bool = True,
    routed_scaling_factor: float | None = 1.0,
    apply_routed_scaling_factor_on_output: bool = False,
    moe_softcapping: float = 0.0,
    num_expert_group: int = 1,
    topk_group: int = 1,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Choose `topk` slots of which the last are shared experts: ids from E on, weight 1 / scale.

    With the factor on the output, shared experts weigh 1.
    """
    import torch

    from pytest_moe_routing.reference.routing import route

    if scoring_func == "softmax" and bias is not None:
        # The kernel takes the softmax of the biased logits.
        scores, bias = scores.float() + bias, None
    shared = num_fused_shared_experts
    factor = 1.0 if routed_scaling_factor is None else routed_scaling_factor
    recipe = gate_recipe(
        topk - shared,
        scoring_func,
        bias=bias is not None,
        renormalize=renormalize,
        scale=factor if apply_routed_scaling_factor_on_output else 1.0,
        groups=(num_expert_group, topk_group),
    )
    routing = route(scores, recipe, bias)
    weights, ids = routing.topk_weights, routing.topk_ids.to(torch.int32)
    if shared:
        tokens, experts = scores.shape
        own = torch.arange(experts, experts + shared, dtype=torch.int32).expand(tokens, -1)
        weight = 1.0 if apply_routed_scaling_factor_on_output else 1.0 / factor
        weights = torch.cat([weights, weights.new_full((tokens, shared), weight)], 1)
        ids = torch.cat([ids, own], 1)
    return weights, ids


def _fused_topk_deepseek(
    gating_output: Tensor,
    correction_bias: Tensor,
    num_expert_group: int,
    topk_group: int,
    topk: int,
    scaling_factor: float,
    topk_weights: Tensor,
    topk_ids: Tensor,
    launch_with_pdl: bool = True,
    **_: Any,
) -> None:
    """Choose experts as FlashInfer's kernel does.

    Raises:
        RecipeError: FlashInfer's check of the arguments raises (`fused_routing_dsv3.py` of 0.6.12
            to 0.7.2, `_check_dsv3_fused_routing_supported`).
    """
    from pytest_moe_routing.reference.routing import route

    groups = num_expert_group, topk_group
    experts = gating_output.shape[1]
    limits = {
        f"topk_group {topk_group} is more than n_group {num_expert_group}": groups[1] <= groups[0],
        f"topk_group * n_group is less than topk {topk}": groups[0] * groups[1] >= topk,
        f"topk {topk} is more than 8": topk <= 8,
    }
    if num_expert_group > 1:
        limits["a group has more than 32 experts"] = experts <= 32 * groups[0]
        limits["the best groups have more than 128 experts"] = (
            experts * groups[1] <= 128 * groups[0]
        )
    else:
        limits[f"{experts} experts are more than 384"] = experts <= 384
    for problem, is_kept in limits.items():
        if not is_kept:
            raise RecipeError(f"fused_topk_deepseek: {problem}")
    recipe = gate_recipe(
        topk, "sigmoid", bias=True, renormalize=True, scale=scaling_factor, groups=groups
    )
    routing = route(gating_output, recipe, correction_bias)
    topk_weights.copy_(routing.topk_weights)
    topk_ids.copy_(routing.topk_ids)


def _flat(score: str) -> Callable[..., None]:
    from pytest_moe_routing.reference.routing import route

    def kernel(
        topk_weights: Tensor,
        topk_ids: Tensor,
        gating_output: Tensor,
        renormalize: bool = False,
        correction_bias: Tensor | None = None,
        routed_scaling_factor: float = 1.0,
        *_: Any,
        **__: Any,
    ) -> None:
        bias = correction_bias
        recipe = gate_recipe(
            topk_ids.shape[1],
            score,
            bias=bias is not None,
            renormalize=renormalize,
            scale=routed_scaling_factor,
        )
        routing = route(gating_output, recipe, bias)
        topk_weights.copy_(routing.topk_weights)
        topk_ids.copy_(routing.topk_ids)

    return kernel


def _zero_experts(
    expert_indices: Tensor,
    expert_scales: Tensor,
    num_experts: int,
    zero_expert_type: str,
    hidden_states: Tensor,
) -> Tensor:
    """Return tokens times the weights of their zero experts, whose slots lose id and weight."""
    is_zero = expert_indices >= num_experts
    weight = expert_scales.masked_fill(~is_zero, 0.0).sum(-1, keepdim=True)
    expert_indices[is_zero], expert_scales[is_zero] = 0, 0.0
    return (hidden_states * weight).to(hidden_states.dtype)


def _fused_moe_router_shim(
    moe_softcapping: float,
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Route by the product with a gate's weight, softly capped: a softmax over all weighs."""
    from torch.nn.functional import linear

    logits = linear(hidden_states.float(), gating_output.float())
    if moe_softcapping:
        logits = moe_softcapping * (logits / moe_softcapping).tanh()
    if correction_bias is not None:
        logits = logits + correction_bias
    weights, ids = logits.softmax(-1).topk(topk)
    return weights, ids.int()


def hash_topk(
    router_logits: Tensor,
    input_ids: Tensor,
    tid2eid: Tensor,
    num_fused_shared_experts: int = 0,
    routed_scaling_factor: float = 1.0,
    scoring_func: str = "sqrtsoftplus",
) -> tuple[Tensor, Tensor]:
    """Weigh the experts of tokens in a table; shared experts follow, as in `_moe_fused_gate`.

    From `hash_topk.cuh` of SGLang 0.5.18 and `triton_hash_topk.py` of 0.5.23.

    Raises:
        Unsupported: The scoring function is not that of the models that have such tables.
    """
    import torch
    from torch.nn.functional import softplus

    if scoring_func != "sqrtsoftplus":
        raise Unsupported(f"not judged: hash_topk with {scoring_func}")
    ids = tid2eid[input_ids].to(torch.int32)
    scores = softplus(router_logits.float()).sqrt().gather(1, ids.long())
    weights, (tokens, experts) = scores / scores.sum(1, keepdim=True), router_logits.shape
    if shared := num_fused_shared_experts:
        own = torch.arange(experts, experts + shared, dtype=torch.int32).expand(tokens, -1)
        weight = weights.new_full((tokens, shared), 1.0 / routed_scaling_factor)
        return torch.cat([weights, weight], 1), torch.cat([ids, own], 1)
    return weights, ids


def in_torch() -> Mapping[str, Mapping[str, Callable[..., Any]]]:
    """Return torch functions for kernels, by module and name."""
    return {
        "flashinfer.fused_moe": {"fused_topk_deepseek": _fused_topk_deepseek},
        _OPS: {"topk_softmax": _flat("softmax")},
        f"{_OPS}.moe_topk_sigmoid": {"topk_sigmoid": _flat("sigmoid")},
        f"{_OPS}.ep_moe_kernels": {"zero_experts_compute_triton": _zero_experts},
        f"{_OPS}.router": {"fused_moe_router_shim": _fused_moe_router_shim},
    }


def old_in_torch() -> Mapping[str, Callable[..., Any]]:
    """Return torch functions for the kernels of releases before 0.5.18, by bare name.

    From `sgl_kernel/moe.py` and the kernels' sources: `moe_fused_gate` always normalizes.
    """
    softmax = _flat("softmax")

    def topk_softmax(topk_weights: Tensor, topk_ids: Tensor, *more: Any, **options: Any) -> None:
        # Before 0.4.7 the logits came after a buffer, and nothing was normalized.
        is_old = len(more) == 2 and not isinstance(more[1], bool)
        softmax(topk_weights, topk_ids, *(more[1:] if is_old else more), **options)

    def moe_fused_gate(
        scores: Tensor, bias: Tensor, *more: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if "scoring_func" in options or len(more) < 3:
            # The Triton kernel of later releases has the name as well.
            return _moe_fused_gate(scores, bias, *more, **options)
        groups, kept, top_k, *further = more
        shared, scale, on_output = [*further, *(0, None, False)[len(further) :]][:3]
        return _moe_fused_gate(
            scores,
            bias,
            top_k,
            num_fused_shared_experts=options.get("num_fused_shared_experts", shared),
            routed_scaling_factor=options.get("routed_scaling_factor", scale),
            apply_routed_scaling_factor_on_output=options.get(
                "apply_routed_scaling_factor_on_output", on_output
            ),
            num_expert_group=groups,
            topk_group=kept,
        )

    return {
        "topk_softmax": topk_softmax,
        "topk_sigmoid": _flat("sigmoid"),
        "moe_fused_gate": moe_fused_gate,
        "kimi_k2_moe_fused_gate": _moe_fused_gate,
        "fused_topk_deepseek": _fused_topk_deepseek,
    }
