"""Calls that FlashInfer and the simulator take, for tests that change one argument."""

import fused_cases
import torch

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.kernels.fused import fused_arguments
from pytest_moe_routing.kernels.routing import routing_arguments
from pytest_moe_routing.kernels.weights import prepare
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.schemes import kernel_of
from pytest_moe_routing.simulator.checks import Names, release

FLASHINFER = FlashInfer.of(release())


def good_call(scheme, *, activated="silu", routed=False, pair=False, method="Renormalize"):
    """The function and the arguments of a call that the simulator takes."""
    fields = {"method": method}
    if method == "DeepSeekV3":
        fields |= {"n_group": 4, "topk_group": 2, "bias": "router"}
    call = fused_cases.call(scheme, **fields)
    if scheme == "routing":
        bias = torch.zeros(8) if call.bias == "router" else None
        shard = Shard.whole(8)
        given = routing_arguments(torch.zeros(5, 8), bias, call, tile_tokens_dim=8, shard=shard)
        given["routing_method"] = FLASHINFER.number(method)
        return "trtllm_gen_routing", given
    problem = fused_cases.problem(FLASHINFER, call, scheme, activated)
    kernel = kernel_of(scheme)
    prepared = prepare(problem.experts, kernel, gated=problem.layer.activation.gated)
    given = fused_arguments(problem, call, prepared, FLASHINFER, routed=routed, pair=pair)
    return kernel.function(routed), given


def changed(case):
    function, given = good_call(case.scheme, **case.how)
    return function, {**given, **case.change(given)}


def bound(function, given):
    arguments = FLASHINFER.signature(function).bind(**given)
    arguments.apply_defaults()
    return Names(function, arguments.arguments, FLASHINFER)
