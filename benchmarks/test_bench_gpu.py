"""Routing on a GPU: the reference, the calls that nothing can avoid, and FlashInfer's kernel.

    pytest benchmarks/test_bench_gpu.py --benchmark-group-by=param:num_tokens

Times are of whole calls, launch to synchronization.
"""

from __future__ import annotations

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.kernels.gpu import find_gpu
from pytest_moe_routing.logits import make
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing import recipe_of

pytestmark = pytest.mark.gpu


@pytest.fixture
def deepseek(moe_session):
    return next(m for m in moe_session.models if m.id == "deepseek-r1")


@pytest.fixture(params=[1, 64, 1024, 8192], ids="{} tokens".format)
def case(request, deepseek):
    if find_gpu().missing:
        pytest.skip(find_gpu().missing)
    case = make("plain", recipe_of(deepseek.router), num_tokens=request.param, num_experts=256)
    return case.logits.cuda(), case.bias.cuda()


def timed(benchmark, function):
    def call():
        function()
        torch.cuda.synchronize()

    call()
    benchmark(call)


def test_unavoidable(benchmark, case):
    logits, _ = case
    timed(benchmark, lambda: logits.sigmoid().topk(8))


def test_reference(benchmark, case, deepseek):
    logits, bias = case
    recipe = recipe_of(deepseek.router)
    timed(benchmark, lambda: route(logits, recipe, bias))


def test_kernel(benchmark, case, deepseek, moe_flashinfer):
    from pytest_moe_routing.backends import kernel_call
    from pytest_moe_routing.kernels.routing import launch

    logits, bias = case
    call = kernel_call(deepseek.router, "fp8_block", "DeepSeekV3", moe_flashinfer)
    try:
        timed(benchmark, lambda: launch(logits, bias, call))
    except Unsupported as reason:
        pytest.skip(str(reason))
