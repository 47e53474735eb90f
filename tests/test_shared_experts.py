"""Fused shared experts in the simulator: every token runs through them, with weight 1."""

import pytest
import torch
from good_calls import FLASHINFER, good_call

from pytest_moe_routing.kernels.library import simulated
from pytest_moe_routing.reference.moe import real_input, run_expert
from pytest_moe_routing.simulator.simulator import Simulator
from pytest_moe_routing.suite.fused import Fused
from pytest_moe_routing.suite.test_gpu_moe import SHARING, small_call


def test_the_routing_operator_appends_them():
    function, given = good_call("routing", method="DeepSeekV3")
    simulator = Simulator(FLASHINFER)
    alone = getattr(simulator, function)(**given)
    found = getattr(simulator, function)(**given, num_fused_shared_experts=2)
    assert torch.equal(found.topk_ids[:, :2], alone.topk_ids)
    assert torch.equal(found.topk_weights[:, :2], alone.topk_weights)
    assert found.topk_ids[:, 2:].tolist() == [[8, 9]] * 5
    assert found.topk_weights[:, 2:].tolist() == [[1, 1]] * 5
    # Five tokens of each shared expert make one tile of eight rows.
    assert found.total_num_padded_tokens == alone.total_num_padded_tokens + 16
    assert found.cta_idx_xy_to_batch_idx[-2:].tolist() == [8, 9]


@pytest.mark.parametrize("scheme", SHARING)
def test_they_add_what_they_compute_alone(scheme):
    call, kernels = small_call(scheme), simulated("simulator", FLASHINFER)
    with_shared = Fused(kernels, FLASHINFER, call, scheme, shared=2)
    problem = with_shared.problem(5)
    output, _ = with_shared.output(problem)
    plain = Fused(kernels, FLASHINFER, call, scheme)
    routed, _ = plain.output(plain.problem(5))
    x = real_input(problem.hidden, with_shared.layer, torch.float32)
    shared = [run_expert(x, with_shared.experts[e], with_shared.layer).output for e in (16, 17)]
    size = routed.float().abs() + sum(rows.abs() for rows in shared)
    assert all(float(rows.abs().mean()) > 0.1 for rows in shared)
    # Each part is rounded to bfloat16 once, and the activation is another's.
    off = (output.float() - routed.float() - sum(shared)).abs()
    assert float((off / size).mean()) < 0.01
