"""The MoE reference gives on the GPU what it gives on the CPU, within its own error bars."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytestmark = pytest.mark.gpu

SCHEMES = ("float32", "bf16", "fp8_per_tensor", "fp8_block", "mxfp8", "nvfp4", "mxfp4", "mxint4")


def on_gpu(matrix):
    """A matrix in its format, on the GPU."""
    moved = {
        name: None if (tensor := getattr(matrix, name)) is None else tensor.cuda()
        for name in ("data", "scales", "global_scale")
    }
    return replace(matrix, **moved)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_reference(moe_gpu, scheme):
    import torch

    from pytest_moe_routing.compare import MoEProblem, assert_moe
    from pytest_moe_routing.logits import bell, distinct
    from pytest_moe_routing.reference.moe import SCHEMES as FORMATS
    from pytest_moe_routing.reference.moe import Layer, moe
    from pytest_moe_routing.reference.routing import Routing
    from pytest_moe_routing.reference.weights import GeneratedExperts

    generated = GeneratedExperts(16, 256, 128, FORMATS[scheme].weight, intermediate_scale=0.01)
    experts = [generated[e] for e in range(16)]
    hidden = bell(32, 256, seed=1)
    routing = Routing(distinct(32, 16, seed=2)[:, :4].contiguous(), torch.full((32, 4), 0.25))
    layer = Layer.of(scheme)
    problem = MoEProblem.of(hidden, experts, layer, routing)
    got = moe(
        on_gpu(problem.hidden),
        [replace(e, gemm1=on_gpu(e.gemm1), gemm2=on_gpu(e.gemm2)) for e in experts],
        Routing(routing.topk_ids.cuda(), routing.topk_weights.cuda()),
        layer,
    )
    assert got.device.type == "cuda"
    assert_moe(got.cpu(), problem)
