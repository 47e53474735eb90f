"""FlashInfer's fused MoE entry points compute what this package says they compute.

A fused call is taken apart: its choice of experts and its weights are compared as the routing
kernels' are; then its output, within the error budget of the scheme, for the experts and weights
that it chose itself; then with the sum of its own rows, and with the routed twin, which were given
the same experts and weights and need no reference to be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.schemes import COMPUTED_SCHEMES, KERNEL_SCHEMES, kernel_of
from pytest_moe_routing.suite.fused import Fused, moved
from pytest_moe_routing.suite.gpu import Compared, call_of, require

if TYPE_CHECKING:
    from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
    from pytest_moe_routing.kernels.library import Kernels
    from pytest_moe_routing.models import ModelSpec

pytestmark = pytest.mark.gpu

#: What the fixture `fused` is: it makes a layer, or skips.
Make = Callable[..., Fused]

#: One token, some, and more than a tile of them.
TOKENS = (1, 5, 33)

#: Enough for the aggregate of a row of weights to show one of its scales.
MANY = 129

#: Schemes whose entry points take fused shared experts.
SHARING = ("fp8_block", "mxfp8", "nvfp4", "nvfp4_per_token", "mxfp4", "mxfp4_bf16")

ACTIVATIONS = ("silu", "relu2", "gelu_tanh", "swigluoai", "swiglustep")


def small_call(scheme: str, method: str = "DeepSeekV3", **fields: Any) -> KernelCall:
    """Return a call with 16 experts, whether or not a model makes it."""
    from pytest_moe_routing.flashinfer import KernelCall

    bias = "router" if method == "DeepSeekV3" else "none"
    given: dict[str, Any] = {"num_experts": 16, "top_k": 4, "logits_dtype": "float32", "bias": bias}
    if method == "DeepSeekV3":
        given |= {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
    return KernelCall(scheme, method, **{**given, **fields})


@pytest.fixture
def fused(moe_kernels: Kernels, moe_flashinfer: FlashInfer) -> Make:
    """`fused(call, scheme, ...)`: a layer, or a skip where its kernel does not run."""

    def make(call: KernelCall, scheme: str, activated: str = "silu", **how: Any) -> Fused:
        if moe_kernels.lacks_fused:
            pytest.skip(moe_kernels.lacks_fused)
        require(moe_flashinfer, call)
        if activated not in kernel_of(scheme).activations:
            pytest.skip(f"no {scheme} kernel for {activated}")
        return Fused(moe_kernels, moe_flashinfer, call, scheme, activated, **how)

    return make


@pytest.mark.moe_models(distinct_routers=True, published=True)
def test_model(
    fused: Make, moe_model: ModelSpec, moe_scheme: str, moe_flashinfer: FlashInfer
) -> None:
    """A model's experts, groups and activation in each of its quantizations."""
    call = call_of(moe_model, moe_flashinfer, moe_model.router.logits_dtype, scheme=moe_scheme)
    layer = fused(call, moe_scheme, moe_model.experts.activation)
    for num_tokens in TOKENS:
        layer.check(num_tokens)


@pytest.mark.moe_models(distinct_layers=True, published=True)
def test_full_size(
    fused: Make, moe_model: ModelSpec, moe_scheme: str, _moe_full_scale: bool
) -> None:
    """A model's own sizes, padded as frameworks pad them; only with `--moe-scale full`."""
    from pytest_moe_routing.kernels.padding import misaligned

    experts, router = moe_model.experts, moe_model.router
    sizes = (experts.latent_size or experts.hidden_size, experts.intermediate_size)
    if reason := misaligned(*sizes, moe_scheme, experts.gated):
        pytest.skip(reason)
    # Routing is not the subject, and this method takes any numbers of experts.
    numbers = {"num_experts": router.num_experts, "top_k": router.top_k}
    call = small_call(moe_scheme, "Renormalize", **numbers)
    fused(call, moe_scheme, experts.activation, sizes=sizes).check(1)


@pytest.mark.parametrize("activated", ACTIVATIONS)
@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_scheme(fused: Make, scheme: str, activated: str) -> None:
    """Every quantization with every activation, and what the routed twin takes."""
    layer = fused(small_call(scheme), scheme, activated)
    pairs = (False, True) if layer.flashinfer.has(layer.kernel.pairs_since or "9999") else (False,)
    for num_tokens in TOKENS:
        layer.check(num_tokens, pairs=pairs)


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_equal_shares(fused: Make, scheme: str) -> None:
    """Many tokens, each with experts of equal shares: rounding hides no weight and no scale."""
    fused(small_call(scheme), scheme, even=True).check(MANY)


@pytest.mark.parametrize("scheme", [name for name in KERNEL_SCHEMES if kernel_of(name).biases])
def test_biases_of_experts(fused: Make, scheme: str) -> None:
    """Biases of both GEMMs, in the units of the accumulators."""
    fused(small_call(scheme), scheme, "swigluoai", biases=True).check(5)


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_clamp(fused: Make, scheme: str) -> None:
    """A clamp of a checkpoint's own that many numbers reach."""
    fused(small_call(scheme), scheme, limit=0.5).check(5)


@pytest.mark.parametrize("layout", kernel_of("fp8_block").layouts)
def test_layout(fused: Make, layout: str) -> None:
    """The layouts between which DeepSeek's scheme leaves the choice."""
    fused(small_call("fp8_block"), "fp8_block", layout=layout).check(5)


def test_weight_on_the_input(fused: Make) -> None:
    """Llama4: the router weight multiplies the first GEMM's result, and nothing else."""
    call = small_call("fp8_per_tensor", "Llama4", top_k=1, weight_on="input")
    fused(call, "fp8_per_tensor").check(5)


@pytest.mark.parametrize("method", ["Renormalize", "SigmoidRenorm", "TopK"])
def test_method(fused: Make, method: str) -> None:
    """Weights of another kind, negative ones among them, packed with ids and apart."""
    for pattern in ("plain", "all-negative"):
        fused(small_call("bf16", method), "bf16").check(5, pattern=pattern, pairs=(False, True))


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_zero_expert(fused: Make, scheme: str) -> None:
    """An expert whose weights are all zero adds nothing, and no NaN."""
    fused(small_call(scheme), scheme, silent=3).check(17)


@pytest.mark.parametrize("scheme", SHARING)
def test_fused_shared_experts(fused: Make, scheme: str) -> None:
    """Shared experts behind the routed ones: every token runs through them, with weight 1."""
    layer = fused(small_call(scheme), scheme, shared=2)
    for num_tokens in TOKENS:
        layer.check(num_tokens)


@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_autotuned(fused: Make, scheme: str) -> None:
    """The tactic that autotuning picks gives what the first one gives, within rounding."""
    layer = fused(small_call(scheme), scheme)
    problem = layer.problem(33)
    ids, found = layer.rows(problem)
    layer.check_choice(problem, ids, found)
    first, _ = layer.output(problem)
    tuned, why = layer.output(problem, tuned=True)
    layer.check_sum(Compared.TACTIC, tuned, first, found, why)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("scheme", KERNEL_SCHEMES)
def test_expert_parallel_shard(fused: Make, scheme: str, rank: int) -> None:
    """A rank computes the share of its own experts, from weights that are its own only."""
    from pytest_moe_routing.compare import compare_moe
    from pytest_moe_routing.reference.routing import Routing
    from pytest_moe_routing.reference.shard import Shard

    layer = fused(small_call(scheme), scheme)
    local = layer.call.num_experts // 4
    shard = Shard(rank * local, local)
    prepared = layer.prepared(shard)
    for num_tokens in TOKENS:
        problem = layer.problem(num_tokens)
        ids, found = layer.rows(problem)
        problem = replace(problem, routing=Routing(ids, found.weights), shard=shard)
        output, why = layer.output(problem, prepared=prepared)
        compared = compare_moe(output, problem)
        layer.expect(Compared.OUTPUT, compared.ok, num_tokens, compared.message, why)


@pytest.mark.parametrize("scheme", COMPUTED_SCHEMES)
def test_reference(moe_kernels: Kernels, scheme: str) -> None:
    """The MoE reference gives on the GPU what it gives on the CPU, within its own error bars."""
    import torch

    from pytest_moe_routing.compare import assert_moe
    from pytest_moe_routing.logits import bell, distinct
    from pytest_moe_routing.reference.moe import MoELayer, moe
    from pytest_moe_routing.reference.problem import MoEProblem
    from pytest_moe_routing.reference.routing import Routing
    from pytest_moe_routing.reference.weights import GeneratedExperts

    device = moe_kernels.device
    layer = MoELayer.of(scheme)
    generated = GeneratedExperts(16, 256, 128, layer.storage.weight, intermediate_scale=0.01)
    experts = [generated[e] for e in range(16)]
    hidden = bell(32, 256, seed=1)
    routing = Routing(distinct(32, 16, seed=2)[:, :4].contiguous(), torch.full((32, 4), 0.25))
    problem = MoEProblem.of(hidden, experts, layer, routing)
    got = moe(
        moved(problem.hidden, device),
        [replace(e, gemm1=moved(e.gemm1, device), gemm2=moved(e.gemm2, device)) for e in experts],
        Routing(routing.topk_ids.to(device), routing.topk_weights.to(device)),
        layer,
    )
    assert got.device.type == device
    assert_moe(got.cpu(), problem)
