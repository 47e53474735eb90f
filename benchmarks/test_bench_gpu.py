"""On a GPU: the references, the calls that nothing can avoid, and FlashInfer's routing kernel.

    pytest benchmarks/test_bench_gpu.py --benchmark-group-by=param:num_tokens

Times are of whole calls, launch to synchronization.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.kernels.gpu import find_gpu
from pytest_moe_routing.logits import bell, distinct, make_case
from pytest_moe_routing.reference.moe import MoELayer, moe
from pytest_moe_routing.reference.routing import Routing, route
from pytest_moe_routing.reference.weights import GeneratedExperts
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.suite.fused import moved

pytestmark = pytest.mark.gpu


@pytest.fixture
def deepseek(_moe_session):
    return next(m for m in _moe_session.models if m.id == "deepseek-r1")


@pytest.fixture(params=[1, 64, 1024, 8192], ids="{} tokens".format)
def case(request, deepseek):
    if find_gpu().missing:
        pytest.skip(find_gpu().missing)
    case = make_case("plain", recipe_of(deepseek.router), num_tokens=request.param, num_experts=256)
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
    from pytest_moe_routing.kernels.routing import launch
    from pytest_moe_routing.oracle.exact import kernel_call

    logits, bias = case
    call = kernel_call(deepseek.router, "fp8_block", "DeepSeekV3", moe_flashinfer)
    try:
        timed(benchmark, lambda: launch(logits, bias, call))
    except Unsupported as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=[1, 64, 1024, 8192], ids="{} tokens".format)
def layer(request):
    """64 experts, hidden 1024, intermediate 512, top 8, in float32."""
    if find_gpu().missing:
        pytest.skip(find_gpu().missing)
    experts = [GeneratedExperts(64, 1024, 512, "float32")[e] for e in range(64)]
    experts = [
        replace(e, gemm1=moved(e.gemm1, "cuda"), gemm2=moved(e.gemm2, "cuda")) for e in experts
    ]
    ids = distinct(request.param, 64, seed=2)[:, :8].contiguous().cuda()
    routing = Routing(ids, torch.full(ids.shape, 0.125, device="cuda"))
    return bell(request.param, 1024, seed=1).cuda(), experts, routing


def test_moe_unavoidable(benchmark, layer):
    """The matrix products alone, of rows that are gathered already."""
    hidden, experts, routing = layer
    rows = [(e, hidden[(routing.topk_ids == e).any(1)]) for e in range(64)]
    weights = [(e.gemm1.data, e.gemm2.data) for e in experts]

    def products():
        for e, x in rows:
            if len(x):
                (x @ weights[e][0].T)[:, :512] @ weights[e][1].T

    timed(benchmark, products)


def test_moe_reference(benchmark, layer):
    timed(benchmark, lambda: moe(*layer, MoELayer.of("float32")))
