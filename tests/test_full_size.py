"""Layers of a model's own size: padding, the experts that tokens reach, and the memory they take."""

import re
import resource

import pytest
import torch

from pytest_moe_routing.compare import assert_moe
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.kernels.fused import fused_arguments, launch_fused
from pytest_moe_routing.kernels.padding import PaddedExperts, misaligned, padded_sizes
from pytest_moe_routing.kernels.reached import ReachedExperts
from pytest_moe_routing.kernels.weights import prepare
from pytest_moe_routing.logits import bell
from pytest_moe_routing.reference.moe import MoELayer
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.weights import GeneratedExperts
from pytest_moe_routing.schemes import kernel_of, storage_of
from pytest_moe_routing.simulator.simulator import Simulator

FLASHINFER = FlashInfer.of("0.7.2.post1")
CALL = {"method": "Renormalize", "num_experts": 8, "top_k": 2, "logits_dtype": "float32"}


def problem(scheme, activated, sizes, biases=False):
    call = KernelCall(scheme, **CALL)
    layer = MoELayer.of(scheme, activated)
    gated = layer.activation.gated
    experts = GeneratedExperts(8, *sizes, storage_of(scheme).weight, gated, biases, 0.01)
    recipe = FLASHINFER.recipe(call)
    hidden, logits = bell(5, sizes[0], seed=5), bell(5, 8, seed=3)
    return call, MoEProblem.of(hidden, experts, layer, recipe=recipe, logits=logits)


def run(call, given, prepared):
    kernel = kernel_of(given.layer.scheme)
    arguments = fused_arguments(given, call, prepared, FLASHINFER)
    return launch_fused(Simulator(FLASHINFER), kernel.function(), arguments)[0]


@pytest.mark.parametrize(
    ("scheme", "activated", "sizes", "padded"),
    [
        ("bf16", "silu", (256, 192), (256, 256)),
        ("fp8_per_tensor", "relu2", (256, 176), (256, 256)),
        ("mxfp8", "silu", (160, 96), (256, 128)),
        ("nvfp4", "relu2", (160, 176), (256, 256)),
        ("nvfp4", "silu", (160, 176), (256, 192)),
        ("mxfp4", "swigluoai", (160, 96), (256, 128)),
        ("mxfp4_bf16", "swigluoai", (160, 96), (256, 128)),
    ],
)
def test_a_padded_layer_computes_the_same(scheme, activated, sizes, padded):
    call, given = problem(scheme, activated, sizes, biases=kernel_of(scheme).biases)
    gated = given.layer.activation.gated
    assert padded_sizes(*sizes, scheme, gated) == padded
    experts = PaddedExperts(given.experts, scheme, gated)
    prepared = prepare(experts, kernel_of(scheme), gated=gated)
    assert (prepared.hidden_size, prepared.intermediate_size) == padded
    output = run(call, given, prepared)
    assert output.shape[1] == padded[0]
    assert not output[:, sizes[0] :].any()
    assert_moe(output[:, : sizes[0]], given)


def test_sizes_that_no_padding_makes_fit():
    assert misaligned(2880, 2880, "mxfp4", True) == ""
    assert misaligned(2688, 1856, "fp8_per_tensor", False) == ""
    assert misaligned(2880, 2880, "bf16", True) == (
        "the bf16 kernel requires weight rows in multiples of 128, and frameworks do not pad to "
        "it: found 5888 and 2880 rows"
    )
    assert "found 1856 and 256 rows" in misaligned(256, 928, "mxint4", True)


def test_only_reached_experts_are_prepared():
    call, given = problem("nvfp4", "silu", (256, 256), biases=True)
    reached = ReachedExperts(given.experts, kernel_of("nvfp4"), gated=True)
    used = given.routing.topk_ids.unique().tolist()
    assert reached.reach(used)
    assert not reached.reach(used[:1])
    assert reached.done == set(used) < set(range(8))
    whole = prepare(given.experts, kernel_of("nvfp4"), gated=True)
    for name, tensor in reached.prepared.tensors.items():
        same = [
            torch.equal(a.view(torch.uint8), b.view(torch.uint8))
            for a, b in zip(tensor, whole.tensors[name], strict=True)
        ]
        assert [e for e in range(8) if same[e]] == used
    assert torch.equal(run(call, given, reached.prepared), run(call, given, whole))


@pytest.mark.parametrize(
    ("model", "cases"), [("gpt-oss-120b", 1), ("nemotron-3-nano", 2), ("deepseek-r1", 2)]
)
def test_models_in_their_own_size(pytester, model, cases):
    """Sizes that kernels take padded only, and the largest; within 3 GiB."""
    result = pytester.runpytest_subprocess(
        *("--moe-golden", "-m", "gpu", "-k", "test_full_size", "--moe-scale", "full"),
        *("--moe-kernels", "simulator", "--moe-models", model, "--moe-flashinfer", "0.7.2.post1"),
        *("-p", "no:cacheprovider", "-p", "no:xdist", "-q"),
    )
    result.assert_outcomes(passed=cases)
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 3 * 2**20


def test_full_sizes_are_left_out_of_reduced_runs(pytester):
    result = pytester.runpytest_subprocess(
        *("--moe-golden", "-m", "gpu", "--collect-only", "-q", "--moe-models", "gpt-oss-120b")
    )
    assert not re.search("test_full_size", result.stdout.str())
