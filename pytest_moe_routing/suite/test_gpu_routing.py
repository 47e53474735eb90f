"""FlashInfer's routing kernels compute what this package says they compute.

Each comparison is with the reference running the *kernel's* recipe for the call (its bias rounding
and epsilon included), within the kernel's documented arithmetic error and not beyond.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.suite.gpu import Compared, call_of, dtype, explained, require
from pytest_moe_routing.suite.skips import unsupported_is_skipped

if TYPE_CHECKING:
    from torch import Tensor

    from pytest_moe_routing.compare.routing import RoutingComparison
    from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
    from pytest_moe_routing.kernels.library import Kernels
    from pytest_moe_routing.kernels.routing import KernelRouting
    from pytest_moe_routing.logits import RoutingCase
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.reference.permutation import Permutation
    from pytest_moe_routing.routing.recipe import Recipe

# Models that share a router share a test.
pytestmark = [pytest.mark.gpu(kernels="routing"), pytest.mark.moe_models(distinct_routers=True)]

#: On both sides of every switch between kernels (facts of FlashInfer 0.7.2.post1's launcher).
TOKENS = (1, 4, 5, 16, 17, 64, 65, 256, 257, 1024, 1025, 4096)

PATTERNS = (
    "plain",
    "all-negative",
    "deep-negative-high-bias",
    "below-minus-100",
    "saturated",
    "ties-at-k",
    "ties-at-groups",
    "near-ties",
    "hot-expert",
    "bias-below-minus-1",
    "narrow-bias",
    "not-finite",
)
DTYPES = ("float32", "bfloat16")
METHODS = (
    "Default",
    "Renormalize",
    "DeepSeekV3",
    "Llama4",
    "RenormalizeNaive",
    "TopK",
    "SigmoidRenorm",
    "MiniMax2",
    "Sigmoid",
    "TopKSigmoid",
)


#: (experts, top_k) inside and at the edge of what the methods take.
SHAPES = ((16, 1), (128, 8), (256, 8), (384, 8), (512, 22), (1024, 32), (2048, 32))


@lru_cache(maxsize=2)
def made(pattern: str, recipe: Recipe, num_tokens: int, num_experts: int) -> RoutingCase:
    """Return the inputs of a pattern."""
    from pytest_moe_routing import logits

    return logits.make_case(pattern, recipe, num_tokens=num_tokens, num_experts=num_experts)


class Routed:
    """Inputs of one kernel call, and the comparison of what comes back."""

    def __init__(
        self,
        kernels: Kernels,
        call: KernelCall,
        flashinfer: FlashInfer,
        pattern: str,
        num_tokens: int,
    ) -> None:
        require(flashinfer, call)
        self.kernels, self.call, self.flashinfer = kernels, call, flashinfer
        self.recipe = flashinfer.recipe(call)
        # Dtypes change nothing in what is made, and come one after another.
        case = made(
            pattern, replace(self.recipe, bias_dtype="float32"), num_tokens, call.num_experts
        )
        self.right: KernelRouting | None = None
        self.logits = case.logits.to(dtype(call.logits_dtype))
        self.bias = None if case.bias is None else case.bias.to(dtype(call.bias_dtype))

    def run(
        self, num_tokens: int, fused_moe: Any = None, device: str | None = None, **shard: Any
    ) -> KernelRouting:
        from pytest_moe_routing.kernels.routing import run_routing

        device = device or self.kernels.device
        bias = None if self.bias is None else self.bias.to(device)
        fused_moe = fused_moe or self.kernels.fused_moe
        with unsupported_is_skipped():
            return run_routing(
                self.logits[:num_tokens].to(device), bias, self.call, fused_moe=fused_moe, **shard
            )

    def check(self, num_tokens: int) -> None:
        """Route and compare experts, weights and permutation."""
        from pytest_moe_routing.reference.permutation import permute

        got = self.run(num_tokens)
        # Tokens that a smaller batch gave this very routing have been compared.
        found = self.compared(got, self.unlike_before(got))
        if not found.ok:
            found = self.compared(got, slice(None))
        self.right = got
        wanted = permute(got.topk_ids.clamp(0), num_experts=self.call.num_experts)
        problems = {
            Compared.PERMUTATION: misplaced(got, got.topk_ids, wanted),
            Compared.CHOICE: [] if found.ok else [found.message()],
        }
        self.expect(num_tokens, problems, got)

    def compared(self, got: KernelRouting, tokens: Tensor | slice) -> RoutingComparison:
        """Compare some of the tokens with the reference."""
        from pytest_moe_routing.compare import compare_routing

        return compare_routing(
            got.topk_ids[tokens],
            got.topk_weights[tokens],
            self.logits[: len(got.topk_ids)][tokens],
            self.recipe,
            self.bias,
            precision=self.kernels.precision,
        )

    def unlike_before(self, got: KernelRouting) -> Tensor:
        """Return the tokens whose routing is not that of the last batch, which was right."""
        import torch

        new = torch.ones(len(got.topk_ids), dtype=torch.bool)
        if self.right is not None:
            ids, weights = self.right.topk_ids, self.right.topk_weights
            now = got.topk_ids[: len(ids)], got.topk_weights[: len(ids)]
            same = (weights == now[1]) | (weights.isnan() & now[1].isnan())
            new[: len(ids)] = ~((ids == now[0]) & same).all(1)
        return new

    def expect(
        self,
        num_tokens: int,
        problems: Mapping[Compared, Sequence[str]],
        got: KernelRouting,
        **shard: Any,
    ) -> None:
        """Fail with what is wrong, and with the known faults that explain it."""
        from pytest_moe_routing.simulator.explain import dense

        def weights(result: KernelRouting) -> Tensor:
            return dense(result.topk_ids, result.topk_weights, self.call.num_experts)

        def run(fused_moe: Any) -> Tensor:
            return weights(self.run(num_tokens, fused_moe, "cpu", **shard))

        if any(problems.values()):
            lines = [*chain(*problems.values()), *explained(run, weights(got), self.flashinfer)]
            text = "\n".join(lines)
            pytest.fail(f"{self.call}\nwith {num_tokens} tokens: {text}", pytrace=False)


def misplaced(got: KernelRouting, topk_ids: Tensor, wanted: Permutation) -> list[str]:
    """Return what is wrong with the kernel's placement of these experts' slots."""
    from pytest_moe_routing.reference.permutation import check_permutation

    if got.permutation is None:
        return [got.broken]
    return check_permutation(got.permutation, topk_ids, wanted)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_model(
    moe_kernels: Kernels,
    moe_model: ModelSpec,
    moe_flashinfer: FlashInfer,
    pattern: str,
    logits_dtype: str,
    bias_dtype: str,
) -> None:
    """Experts, weights and permutation of a model's router, at every token count."""
    if moe_model.router.correction_bias is None and bias_dtype != DTYPES[0]:
        pytest.skip("the router has no bias")
    call = call_of(moe_model, moe_flashinfer, logits_dtype, bias_dtype)
    routed = Routed(moe_kernels, call, moe_flashinfer, pattern, max(TOKENS))
    for num_tokens in TOKENS:
        routed.check(num_tokens)


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_method(
    moe_kernels: Kernels,
    moe_flashinfer: FlashInfer,
    method: str,
    num_experts: int,
    top_k: int,
    logits_dtype: str,
) -> None:
    """Every routing method, whether or not a model uses it, inside its limits."""
    from pytest_moe_routing.flashinfer import KernelCall

    # The standalone operator checks DeepSeekV3's groups as the block-scale launcher does.
    groups = 1 if method == "DeepSeekV3" else 0
    call = KernelCall(
        scheme="fp8_block",
        method=method,
        num_experts=num_experts,
        top_k=top_k,
        logits_dtype=logits_dtype,
        n_group=groups,
        topk_group=groups,
        bias="router" if moe_flashinfer.honors(method, "bias") else "none",
        routed_scaling_factor=2.5,
    )
    for pattern in ("plain", "all-negative", "ties-at-k", "not-finite"):
        routed = Routed(moe_kernels, call, moe_flashinfer, pattern, 1025)
        for num_tokens in (1, 5, 17, 257, 1025):
            routed.check(num_tokens)


@pytest.mark.parametrize("bias_dtype", DTYPES)
def test_large_bias(
    moe_kernels: Kernels, moe_model: ModelSpec, moe_flashinfer: FlashInfer, bias_dtype: str
) -> None:
    """Weights are those of the scores, however much was added for choosing."""
    import torch

    if moe_model.router.correction_bias is None:
        pytest.skip("the router has no bias")
    call = call_of(moe_model, moe_flashinfer, bias_dtype=bias_dtype)
    routed = Routed(moe_kernels, call, moe_flashinfer, "plain", 257)
    assert routed.bias is not None
    # Next to this number a float32 is 1/64 wide, and hardly any choice is certain.
    routed.bias = torch.full_like(routed.bias, 2**17)
    for num_tokens in (1, 17, 257):
        routed.check(num_tokens)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reference(moe_kernels: Kernels, moe_model: ModelSpec, pattern: str) -> None:
    """The torch reference gives on the GPU what it gives on the CPU."""
    from pytest_moe_routing.compare import assert_routing
    from pytest_moe_routing.logits import make_case
    from pytest_moe_routing.reference.routing import route
    from pytest_moe_routing.routing import recipe_of

    recipe = recipe_of(moe_model.router)
    case = make_case(pattern, recipe, num_tokens=1024, num_experts=moe_model.router.num_experts)
    device = moe_kernels.device
    bias = None if case.bias is None else case.bias.to(device)
    got = route(case.logits.to(device), recipe, bias)
    assert_routing(got.topk_ids, got.topk_weights, case.logits, recipe, case.bias)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("tile_tokens_dim", [8, 64])
def test_expert_parallel_shard(
    moe_kernels: Kernels,
    moe_model: ModelSpec,
    moe_flashinfer: FlashInfer,
    rank: int,
    tile_tokens_dim: int,
) -> None:
    """A shard chooses and weighs as the whole does, and permutes its own experts only."""
    import torch

    from pytest_moe_routing.reference.permutation import permute
    from pytest_moe_routing.reference.shard import Shard

    experts = moe_model.router.num_experts
    call = call_of(moe_model, moe_flashinfer)
    routed = Routed(moe_kernels, call, moe_flashinfer, "plain", 1025)
    shard = Shard(rank * (experts // 4), experts // 4)
    how: dict[str, Any] = {"tile_tokens_dim": tile_tokens_dim, "shard": shard}
    for num_tokens in (1, 17, 257, 1025):
        whole = routed.run(num_tokens, tile_tokens_dim=tile_tokens_dim)
        got = routed.run(num_tokens, **how)
        is_local = torch.isin(whole.topk_ids, torch.tensor(shard.experts))
        wanted = permute(
            whole.topk_ids.clamp(0),
            num_experts=experts,
            tile_tokens_dim=tile_tokens_dim,
            shard=shard,
        )
        problems = {Compared.PERMUTATION: misplaced(got, whole.topk_ids, wanted)}
        if not torch.equal(got.topk_ids, torch.where(is_local, whole.topk_ids, -1)):
            problems[Compared.LOCAL_EXPERTS] = [
                "topk_ids are not the local experts of the unsharded routing, with -1 for the "
                "other slots"
            ]
        if not torch.equal(got.topk_weights, whole.topk_weights):
            problems[Compared.LOCAL_WEIGHTS] = [
                "topk_weights differ from those of the unsharded routing"
            ]
        routed.expect(num_tokens, problems, got, **how)
