"""The classifier: from a router's parameters to a `RoutingMethodType`, with the path it took."""

from __future__ import annotations

from pytest_moe_routing.oracle.target import Classification
from pytest_moe_routing.routing.methods import RoutingMethodType as T


def classify(
    scoring_func: str,
    top_k: int,
    renormalize: bool,
    num_expert_group: int | None,
    has_e_score_bias: bool,
    routed_scaling_factor: float | None = 1.0,
    *,
    minimax2_scales: bool = False,
) -> Classification:
    """Classify a router, as vLLM's `get_routing_method_type` does, and say how.

    Args:
        scoring_func: `softmax`, `sigmoid` or `sqrtsoftplus`; anything else is `Unspecified`.
        top_k: Experts per token. No case depends on it: Llama4 is recognized by its own routing
            function, not by `top_k == 1`.
        renormalize: Whether the chosen weights are divided by their sum.
        num_expert_group: Groups of a group-limited router; None or 0 when it has none.
        has_e_score_bias: Whether the router has an `e_score_correction_bias`.
        routed_scaling_factor: None counts as 1.0.
        minimax2_scales: Whether MiniMax2 honors the scaling factor (FlashInfer >= 0.6.13). Where
            it does not, a scaled router without groups must not become MiniMax2.
    """
    path = [f"scoring_func is {scoring_func}"]

    def end(method: T) -> Classification:
        return Classification(method.name, tuple(path))

    def ask(question: str, answer: bool) -> bool:
        path.append(question if answer else f"not {question}")
        return answer

    if scoring_func == "sqrtsoftplus":
        return end(T.DeepseekV4 if ask("renormalize", renormalize) else T.Unspecified)
    if scoring_func not in ("sigmoid", "softmax"):
        return end(T.Unspecified)
    if ask("e_score_correction_bias", has_e_score_bias):
        if scoring_func != "sigmoid" or not ask("renormalize", renormalize):
            return end(T.Unspecified)
        if ask("num_expert_group > 0", (num_expert_group or 0) > 0):
            return end(T.DeepSeekV3)
        unscaled = routed_scaling_factor in (None, 1.0)
        if minimax2_scales or ask("routed_scaling_factor is 1", unscaled):
            return end(T.MiniMax2)
        return end(T.Unspecified)
    renormalized = ask("renormalize", renormalize)
    if scoring_func == "sigmoid":
        return end(T.SigmoidRenorm if renormalized else T.Sigmoid)
    return end(T.RenormalizeNaive if renormalized else T.Default)


def get_routing_method_type(
    scoring_func: str,
    top_k: int,
    renormalize: bool,
    num_expert_group: int | None,
    has_e_score_bias: bool,
    routed_scaling_factor: float | None = 1.0,
    *,
    minimax2_scales: bool = False,
) -> T:
    """Return the routing method of a router; arguments as for `classify`."""
    return T[
        classify(
            scoring_func,
            top_k,
            renormalize,
            num_expert_group,
            has_e_score_bias,
            routed_scaling_factor,
            minimax2_scales=minimax2_scales,
        ).method
    ]
