"""Small fused MoE problems in every scheme, for tests of adapters and of the simulator."""

from functools import cache

import torch

from pytest_moe_routing.flashinfer import KernelCall
from pytest_moe_routing.logits import bell
from pytest_moe_routing.reference.moe import MoELayer
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.routing import Routing, route
from pytest_moe_routing.reference.weights import GeneratedExperts
from pytest_moe_routing.schemes import KERNEL_SCHEMES, kernel_of, storage_of

EXPERTS, TOP_K, HIDDEN, INNER = 8, 2, 256, 256

CASES = [(scheme, act) for scheme in KERNEL_SCHEMES for act in kernel_of(scheme).activations]


@cache
def experts(scheme, gated, biases=False):
    made = GeneratedExperts(
        EXPERTS, HIDDEN, INNER, storage_of(scheme).weight, gated, biases, intermediate_scale=0.01
    )
    return [made[e] for e in range(EXPERTS)]


def call(scheme="bf16", **fields):
    given = {"method": "Renormalize", "num_experts": EXPERTS, "top_k": TOP_K}
    return KernelCall(**{"scheme": scheme, "logits_dtype": "float32", **given, **fields})


def problem(flashinfer, call, scheme, activated="silu", *, num_tokens=5, biases=False):
    layer = MoELayer.of(scheme, activated, call.weight_on)
    recipe = flashinfer.recipe(call)
    logits = bell(num_tokens, call.num_experts, seed=3)
    bias = bell(call.num_experts, seed=4) / 8 if recipe.bias else None
    routing = route(logits, recipe, bias)
    routing = Routing(routing.topk_ids, routing.topk_weights.to(torch.bfloat16))
    return MoEProblem.of(
        bell(num_tokens, HIDDEN, seed=5),
        experts(scheme, layer.activation.gated, biases),
        layer,
        routing,
        recipe=recipe,
        logits=logits,
        bias=bias,
    )
