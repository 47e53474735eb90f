"""What SGLang's model code asks of its TopK and its MoE layer, as a request of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isclose
from typing import Any, TypedDict

from pytest_moe_routing.errors import RecipeError, Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.model_code import LayerRequest
from pytest_moe_routing.routing import Recipe, recipe_of
from pytest_moe_routing.targets.dtype_names import narrowest


class Stated(TypedDict):
    """What a block states of its experts."""

    activation: str
    is_gated: bool
    gemm1_alpha: float | None
    gemm1_clamp_limit: float | None
    swiglu_limit: float | None
    has_bias: bool


class Asked(TypedDict):
    """The arguments of a block's TopK, and what goes around it."""

    block: str
    captured: bool
    num_experts: int | None
    sizes: dict[str, list[int]]
    config_class: str
    top_k: int
    use_grouped_topk: bool
    num_expert_group: int | None
    topk_group: int | None
    renormalize: bool
    scoring_func: str
    routed_scaling_factor: float | None
    bias_dtype: str | None
    bias_is_loaded: bool
    logits_dtype: str
    gate_dtypes: list[str]
    router_weight_dtypes: list[str]
    on_input: bool
    output_factor: float
    experts: Stated
    custom_routing: str | None
    choice_problem: str | None
    choice_unknown: str | None


#: Arguments behind each field of a recipe.
_BEHIND: Mapping[str, tuple[str, ...]] = {
    "score": ("scoring_func",),
    "n_group": ("use_grouped_topk", "num_expert_group", "topk_group"),
    "topk_group": ("use_grouped_topk", "num_expert_group", "topk_group"),
    "top_k": ("top_k",),
    "normalize": ("renormalize",),
    "logits_dtype": ("logits_dtype",),
}


#: A factor is measured on bfloat16 outputs.
_MEASURED = 2.0**-8


def requests_of(
    answers: Iterable[Mapping[str, Any]], model: ModelSpec, rounds_logits: str | None = None
) -> LayerRequest:
    """Make a request of each answer; those that differ from the first are its further ones.

    Args:
        rounds_logits: See `request_of`.
    """
    first, *others = (request_of(answer, model, rounds_logits) for answer in answers)
    further = (other for other in others if replace(other, when="") != first)
    return replace(first, further=tuple(further))


def request_of(
    answer: Mapping[str, Any], model: ModelSpec, rounds_logits: str | None = None
) -> LayerRequest:
    """Make a request of the arguments that SGLang's TopK is made with.

    Groups count with `use_grouped_topk`; with a bias they are scored by the best two of them, and
    all scores are sigmoid, whatever `scoring_func` is (`biased_grouped_topk` of topk.py). A scaling
    factor is TopK's own where TopK is told to apply it; all else that multiplies is measured.

    Args:
        rounds_logits: Why logits of lesser precision than the model's are no defect.
    """

    def said(*names: str) -> str:
        return ", ".join(f"{name}={answer[name]!r}" for name in names)

    factor = answer["routed_scaling_factor"]
    passed = {field: said(*names) for field, names in _BEHIND.items()} | {
        "bias": f"correction_bias={'None' if answer['bias_dtype'] is None else '...'}",
        "scale": f"{said('routed_scaling_factor')}, and x {answer['output_factor']:.4g} behind it",
        "activation": ", ".join(f"{k}={v!r}" for k, v in answer["experts"].items()),
        "weight_on": f"apply_router_weight_on_input={answer['on_input']}",
    }
    wanted, output_factor = recipe_of(model.router), answer["output_factor"]
    if isclose(output_factor, wanted.scale, rel_tol=_MEASURED):
        output_factor = wanted.scale
    is_grouped = bool(answer["use_grouped_topk"] and answer["num_expert_group"])
    has_bias = answer["bias_dtype"] is not None
    score = "sigmoid" if is_grouped and has_bias else answer["scoring_func"]
    recipe, otherwise = wanted, None
    has_own = model.router.not_expressible is not None
    if answer["choice_unknown"] is not None and (has_own or answer["custom_routing"] is not None):
        raise Unsupported(f"{answer['block']}: {answer['choice_unknown']}")
    try:
        if has_own or answer["custom_routing"] is not None:
            recipe = replace(recipe, top_k=answer["top_k"], scale=1.0 if factor is None else factor)
        else:
            recipe = Recipe(
                top_k=answer["top_k"],
                score=score,
                bias=has_bias,
                n_group=answer["num_expert_group"] if is_grouped else 1,
                topk_group=(answer["topk_group"] or 1) if is_grouped else 1,
                group_score="top2_sum" if has_bias else "max",
                normalize="sum" if answer["renormalize"] else "none",
                scale=1.0 if factor is None else factor,
                bias_dtype=answer["bias_dtype"] or "float32",
            )
    except RecipeError as error:
        otherwise = f"the model code requests a routing that no router computes: {error}"
    if otherwise is None and answer["choice_problem"] is not None:
        routes = answer["custom_routing"] or "the block"
        otherwise = f"{routes} routes otherwise: {answer['choice_problem']}"
    return LayerRequest(
        judges_step=has_own,
        experts=_experts(answer["experts"]),
        unanswered=answer["choice_unknown"] and f"{answer['block']}: {answer['choice_unknown']}",
        block=answer["block"],
        when="while a CUDA graph is captured, as servers decode by default" * answer["captured"],
        config_class=answer["config_class"],
        num_experts=answer["num_experts"] or model.router.num_experts,
        sizes={
            name: (ours, theirs)
            for name, (ours, theirs) in answer["sizes"].items()
            # Experts of a narrower width have a hidden size of their own.
            if not (name == "hidden_size" and model.experts.latent_size)
        },
        recipe=replace(recipe, weight_on="input" if answer["on_input"] else "output"),
        passed=passed,
        # TopK is not told a dtype: it takes what it is handed.
        told_dtype=answer["logits_dtype"],
        logits_dtype=answer["logits_dtype"],
        gate_dtype=narrowest(answer["gate_dtypes"], default="float32"),
        router_weight_dtype=narrowest(answer["router_weight_dtypes"], default=""),
        output_factor=output_factor,
        bias_is_loaded=answer["bias_is_loaded"],
        otherwise=otherwise,
        rounds_logits=rounds_logits,
    )


def _experts(stated: Stated) -> dict[str, Any]:
    """Return what a block states of its experts, by key of `ExpertsConfig`.

    gpt-oss' activation is silu with an alpha. SiTU's linear beta takes the place of a limit.
    """
    alpha, clamp = stated["gemm1_alpha"], stated["gemm1_clamp_limit"]
    activation = stated["activation"]
    found: dict[str, Any] = {"gated": stated["is_gated"], "bias": stated["has_bias"]}
    if activation == "situ":
        return {
            **found,
            "activation": activation,
            "activation_alpha": alpha,
            "activation_beta": clamp,
        }
    limit = clamp if stated["swiglu_limit"] is None else stated["swiglu_limit"]
    return {
        **found,
        "activation": "swigluoai" if activation == "silu" and alpha is not None else activation,
        "activation_limit": limit,
        "activation_alpha": alpha,
    }
