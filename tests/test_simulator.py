"""The simulated kernels against the reference: every layout is read as it was written."""

import inspect
from dataclasses import replace

import fused_cases
import pytest
import torch

from pytest_moe_routing.compare import assert_moe, assert_routing
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.kernels.fused import fused_arguments, launch_fused, rows_of, without_routing
from pytest_moe_routing.kernels.weights import prepare
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.schemes import KERNEL_SCHEMES, kernel_of
from pytest_moe_routing.simulator.explain import dense
from pytest_moe_routing.simulator.faults import FAULTS
from pytest_moe_routing.simulator.simulator import Simulator

FLASHINFER = FlashInfer.of(known_releases()[-1])
LAYOUTS = [
    (scheme, act, layout)
    for scheme, act in fused_cases.CASES
    for layout in kernel_of(scheme).layouts
]


def run(problem, call, *, layout="", shard=None, fault=None, **how):
    kernel = kernel_of(problem.layer.scheme)
    prepared = prepare(
        problem.experts,
        kernel,
        gated=problem.layer.activation.gated,
        layout=layout,
        shard=shard,
    )
    given = fused_arguments(problem, call, prepared, FLASHINFER, **how)
    simulator = Simulator(FLASHINFER, FAULTS[fault] if fault else None)
    return launch_fused(simulator, kernel.function(how.get("routed", False)), given)


@pytest.mark.parametrize("routed", [False, True], ids=["logits", "routed"])
@pytest.mark.parametrize(("scheme", "activated", "layout"), LAYOUTS)
def test_simulator_agrees_with_the_reference(scheme, activated, layout, routed):
    call = fused_cases.call(scheme)
    problem = fused_cases.problem(FLASHINFER, call, scheme, activated)
    (output,) = run(problem, call, layout=layout, routed=routed)
    assert_moe(output, problem)


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4", "mxfp4_bf16"])
def test_biases_of_experts(scheme):
    call = fused_cases.call(scheme)
    problem = fused_cases.problem(FLASHINFER, call, scheme, "swigluoai", biases=True)
    (output,) = run(problem, call)
    assert_moe(output, problem)


def test_shards_add_up_and_rows_are_weighted():
    call = fused_cases.call("bf16")
    problem = fused_cases.problem(FLASHINFER, call, "bf16", num_tokens=19)
    for first in (0, 4):
        shard = Shard(first, 4)
        mine = replace(problem, shard=shard)
        (output,) = run(mine, call, shard=shard)
        assert_moe(output, mine)
        found = rows_of(run(mine, call, shard=shard, finalize=False), 19, fused_cases.TOP_K)
        total = (found.rows.float() * found.weights.float().unsqueeze(-1)).sum(1)
        torch.testing.assert_close(output.float(), total, rtol=2**-7, atol=1e-6)
        assert (found.local == ((problem.routing.topk_ids // 4) == first // 4)).all()


@pytest.mark.parametrize("method", ["DeepSeekV3", "MiniMax2"])
def test_a_bias_chooses_and_does_not_weigh(method):
    grouped = {"n_group": 1, "topk_group": 1} if method == "DeepSeekV3" else {}
    call = fused_cases.call(
        "bf16", method=method, bias="router", routed_scaling_factor=2.5, **grouped
    )
    problem = fused_cases.problem(FLASHINFER, call, "bf16", num_tokens=32)
    unbiased = route(problem.logits, replace(problem.recipe, bias=False)).topk_ids
    assert (problem.routing.topk_ids != unbiased).any()
    (output,) = run(problem, call)
    assert_moe(output, problem)


@pytest.mark.parametrize("scheme", ["bf16", "mxint4"])
def test_a_factor_that_given_weights_include_is_applied_again_by_the_fault_that_is_named_so(scheme):
    """Whether they are given as pairs or packed, as of mxint4."""
    call = fused_cases.call(scheme, routed_scaling_factor=2.0)
    problem = fused_cases.problem(FLASHINFER, call, scheme)
    right, again = (run(problem, call, routed=True, fault=f)[0] for f in (None, "scaled-again"))
    torch.testing.assert_close(again.float(), 2 * right.float(), rtol=2**-7, atol=1e-6)


def test_a_routing_as_weights_by_expert_counts_slots_without_one():
    ids = torch.tensor([[0, 2], [2, -1], [0, 3]])
    found = dense(ids, torch.tensor([[0.25, 0.5], [1.0, 7.0], [0.5, 9.0]]), 3)
    assert found[:, :3].tolist() == [[0.25, 0, 0.5], [0, 0, 1.0], [0.5, 0, 0]]
    assert found[:, 3].tolist() == [0, 1, 1]


def test_weight_on_the_input():
    call = fused_cases.call("fp8_per_tensor", method="Llama4", top_k=1, weight_on="input")
    problem = fused_cases.problem(FLASHINFER, call, "fp8_per_tensor")
    assert problem.layer.weight_on == "input"
    (output,) = run(problem, call)
    assert_moe(output, problem)
    (routed,) = run(without_routing(problem, problem.routing), call, routed=True)
    assert torch.equal(routed, output)


def test_signatures_are_those_of_the_release():
    simulator = Simulator(FLASHINFER)
    for scheme in KERNEL_SCHEMES:
        name = kernel_of(scheme).function()
        assert inspect.signature(getattr(simulator, name)) == FLASHINFER.signature(name)
    with pytest.raises(TypeError, match="unexpected keyword argument 'tile'"):
        simulator.trtllm_gen_routing(torch.zeros(1, 8), None, 1, 2, tile=8)
    with pytest.raises(TypeError, match="missing a required argument: 'top_k'"):
        simulator.trtllm_gen_routing(torch.zeros(1, 8), None, 1)
    with pytest.raises(AttributeError, match=r"simulated FlashInfer 0\.6\.18 has no trtllm_gen"):
        _ = Simulator(FlashInfer.of("0.6.18")).trtllm_gen_routing


def test_replay_is_what_was_chosen():
    call = fused_cases.call("bf16")
    problem = fused_cases.problem(FLASHINFER, call, "bf16")
    replay = torch.zeros(5, 2, dtype=torch.int16)
    rows = rows_of(run(problem, call, finalize=False, replay=replay), 5, 2)
    assert_routing(replay, rows.weights, problem.logits, problem.recipe, precision="flashinfer")


def test_strides_are_not_looked_at():
    """As in the launchers: a transposed view of the right shape is read in memory order."""
    call = fused_cases.call("fp8_block")
    problem = fused_cases.problem(FLASHINFER, call, "fp8_block")
    prepared = prepare(problem.experts, kernel_of("fp8_block"), gated=True)
    arguments = fused_arguments(problem, call, prepared, FLASHINFER)
    right = Simulator(FLASHINFER).trtllm_fp8_block_scale_moe(**arguments)
    arguments["hidden_states_scale"] = problem.hidden.scales.T
    wrong = Simulator(FLASHINFER).trtllm_fp8_block_scale_moe(**arguments)
    assert not torch.equal(right, wrong)
