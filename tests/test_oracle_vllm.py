"""A second oracle: vLLM's own torch routing functions, on every model of the zoo that they serve.

They run on a CPU with the models' real sizes (`tox -e vllm`); skipped without vLLM. Patterns made of
exact ties are left out: these functions use `torch.topk`, which leaves ties undefined.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pytest_moe_routing.compare import assert_routing, compare_routing
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.logits import make_case
from pytest_moe_routing.models import load_models
from pytest_moe_routing.routing import recipe_of

pytest.importorskip("vllm")
# vLLM's own warnings are not ours to fail on.
pytestmark = pytest.mark.filterwarnings("ignore")
PATTERNS = ("plain", "all-negative", "bias-below-minus-1", "narrow-bias", "near-ties", "hot-expert")
MODELS = {
    id_: model
    for id_, model in load_models(packaged_directory()).items()
    if model.router.not_expressible is None
}


def grouped(model):
    router = model.router
    with_bias = router.correction_bias is not None
    fits = router.group_score == ("top2_sum" if with_bias else "max")
    return router.n_group is not None and (fits or router.n_group == 1)


def vllm_grouped(router, logits, bias):
    from vllm.model_executor.layers.fused_moe.router import grouped_topk_router as module

    function = getattr(module.grouped_topk, "_torchdynamo_orig_callable", module.grouped_topk)
    return function(
        logits,
        logits,
        router.top_k,
        router.renormalize,
        router.n_group,
        router.topk_group,
        router.scoring_func,
        router.routed_scaling_factor,
        bias,
    )


def vllm_softmax(router, logits, bias):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import _softmax_topk

    return _softmax_topk(logits, router.top_k, router.renormalize)


def vllm_llama4(router, logits, bias):
    from vllm.model_executor.models.llama4 import Llama4MoE

    return Llama4MoE.custom_routing_function(logits, logits, router.top_k, router.renormalize)


def vllm_cohere(router, logits, bias):
    from vllm.model_executor.models.cohere2_moe import token_choice_with_bias

    return token_choice_with_bias(logits, logits, router.top_k, router.renormalize)


def function_for(model):
    """vLLM's function for a router, and whether it leaves the scale to others."""
    router = model.router
    if grouped(model):
        return vllm_grouped, False
    if router.n_group is not None or router.correction_bias is not None:
        return None, False
    if model.architecture.startswith("Llama4"):
        return vllm_llama4, True
    return {"softmax": vllm_softmax, "sigmoid": vllm_cohere}.get(router.scoring_func), True


CASES = [m for m in MODELS.values() if function_for(m)[0] is not None]


def test_most_families_are_compared():
    assert len(CASES) > 30
    assert {function_for(m)[0] for m in CASES} >= {vllm_grouped, vllm_softmax, vllm_llama4}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("model", CASES, ids=str)
def test_vllm_routes_as_the_reference(model, pattern):
    function, leaves_scale = function_for(model)
    # vLLM adds no epsilon, and gives weights for the output whatever they are multiplied with.
    recipe = replace(recipe_of(model.router), epsilon=0.0)
    if leaves_scale:
        recipe = replace(recipe, scale=1.0)
    case = make_case(pattern, recipe, num_tokens=48, num_experts=model.router.num_experts)
    weights, ids = function(model.router, case.logits, case.bias)
    assert_routing(ids, weights, case.logits, recipe, case.bias)


def test_a_wrong_recipe_is_told_apart():
    """The comparison has teeth: vLLM's function does not route as DeepSeek-R1 without groups."""
    router = MODELS["deepseek-r1"].router
    recipe = replace(recipe_of(router), epsilon=0.0, n_group=1, topk_group=1)
    case = make_case("plain", recipe, num_tokens=48, num_experts=256)
    weights, ids = vllm_grouped(router, case.logits, case.bias)
    found = compare_routing(ids, weights, case.logits, recipe, case.bias)
    assert len(found.differences) > 24


def test_dtype_of_what_vllm_returns():
    logits = torch.zeros(2, 8)
    weights, ids = vllm_softmax(replace(MODELS["minimax-m2"].router, top_k=2), logits, None)
    assert (weights.dtype, ids.dtype) == (torch.float32, torch.int32)
