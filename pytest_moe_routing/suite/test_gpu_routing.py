"""FlashInfer's routing kernels compute what this package says they compute.

Each comparison is with the reference running the *kernel's* recipe for the call (its bias rounding
and epsilon included), within the kernel's documented arithmetic error and not beyond.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_moe_routing.suite.skips import unsupported_is_skipped

# Models that share a router share a test.
pytestmark = [pytest.mark.gpu, pytest.mark.moe_models(distinct_routers=True)]

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


class Routed:
    """Inputs of one kernel call, and the comparison of what comes back."""

    def __init__(self, gpu, call, flashinfer, pattern, num_tokens):
        import torch

        from pytest_moe_routing import logits
        from pytest_moe_routing.kernels.routing import require

        with unsupported_is_skipped():
            require(flashinfer, call)
        self.call = call
        self.precision = "flashinfer-sm90" if gpu.capability[0] == 9 else "flashinfer"
        self.recipe = flashinfer.recipe(call)
        case = logits.make(
            pattern, self.recipe, num_tokens=num_tokens, num_experts=call.num_experts
        )
        self.logits = case.logits.to(getattr(torch, call.logits_dtype))
        self.bias = None if case.bias is None else case.bias.to(getattr(torch, call.bias_dtype))

    def run(self, num_tokens, **shard):
        from pytest_moe_routing.kernels.routing import run_routing

        bias = None if self.bias is None else self.bias.cuda()
        with unsupported_is_skipped():
            return run_routing(self.logits[:num_tokens].cuda(), bias, self.call, **shard)

    def check(self, num_tokens):
        """Route and compare experts, weights and permutation."""
        from pytest_moe_routing.compare import compare_routing
        from pytest_moe_routing.reference.permutation import check_permutation, permute

        got = self.run(num_tokens)
        found = compare_routing(
            got.topk_ids,
            got.topk_weights,
            self.logits[:num_tokens],
            self.recipe,
            self.bias,
            precision=self.precision,
        )
        wanted = permute(got.topk_ids.clamp(0), num_experts=self.call.num_experts)
        problems = check_permutation(got.permutation, got.topk_ids, wanted)
        if problems or not found.ok:
            text = "\n".join([*problems, *([] if found.ok else [found.message()])])
            pytest.fail(f"{self.call}\nwith {num_tokens} tokens: {text}", pytrace=False)


def call_of(model, flashinfer, logits_dtype="float32", bias_dtype="float32"):
    """The call that serves a model, with the given dtypes; a skip where no kernel does."""
    from pytest_moe_routing.backends import kernel_call
    from pytest_moe_routing.targets.builtin import BuiltinTarget

    method = BuiltinTarget(flashinfer).classify(model).method
    call = kernel_call(model.router, model.checkpoints[0], method, flashinfer)
    return replace(call, logits_dtype=logits_dtype, bias_dtype=bias_dtype)


@pytest.mark.parametrize("bias_dtype", DTYPES)
@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_model(moe_gpu, moe_model, moe_flashinfer, pattern, logits_dtype, bias_dtype):
    """Experts, weights and permutation of a model's router, at every token count."""
    if moe_model.router.correction_bias is None and bias_dtype != DTYPES[0]:
        pytest.skip("the router has no bias")
    call = call_of(moe_model, moe_flashinfer, logits_dtype, bias_dtype)
    routed = Routed(moe_gpu, call, moe_flashinfer, pattern, max(TOKENS))
    for num_tokens in TOKENS:
        routed.check(num_tokens)


@pytest.mark.parametrize("logits_dtype", DTYPES)
@pytest.mark.parametrize(("num_experts", "top_k"), SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_method(moe_gpu, moe_flashinfer, method, num_experts, top_k, logits_dtype):
    """Every routing method, whether or not a model uses it, inside its limits."""
    from pytest_moe_routing.backends import KernelCall

    # The standalone operator checks DeepSeekV3's groups as the block-scale launcher does.
    groups = 1 if method == "DeepSeekV3" else 0
    call = KernelCall(
        backend="fp8_block",
        method=method,
        num_experts=num_experts,
        top_k=top_k,
        logits_dtype=logits_dtype,
        n_group=groups,
        topk_group=groups,
        bias="router" if moe_flashinfer.honours(method, "bias") else "none",
        routed_scaling_factor=2.5,
    )
    for pattern in ("plain", "all-negative", "ties-at-k", "not-finite"):
        routed = Routed(moe_gpu, call, moe_flashinfer, pattern, 1025)
        for num_tokens in (1, 5, 17, 257, 1025):
            routed.check(num_tokens)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_reference(moe_gpu, moe_model, pattern):
    """The torch reference gives on the GPU what it gives on the CPU."""
    from pytest_moe_routing.compare import assert_routing
    from pytest_moe_routing.logits import make
    from pytest_moe_routing.reference.routing import route
    from pytest_moe_routing.routing import recipe_of

    recipe = recipe_of(moe_model.router)
    case = make(pattern, recipe, num_tokens=1024, num_experts=moe_model.router.num_experts)
    bias = None if case.bias is None else case.bias.cuda()
    got = route(case.logits.cuda(), recipe, bias)
    assert_routing(got.topk_ids, got.topk_weights, case.logits, recipe, case.bias)


@pytest.mark.parametrize("rank", [0, 1, 3])
@pytest.mark.parametrize("tile_tokens_dim", [8, 64])
def test_expert_parallel_shard(moe_gpu, moe_model, moe_flashinfer, rank, tile_tokens_dim):
    """A shard chooses and weighs as the whole does, and permutes its own experts only."""
    import torch

    from pytest_moe_routing.reference.permutation import check_permutation, permute

    experts = moe_model.router.num_experts
    call = call_of(moe_model, moe_flashinfer)
    routed = Routed(moe_gpu, call, moe_flashinfer, "plain", 1025)
    first, local = rank * experts // 4, experts // 4
    shard = {"local_expert_offset": first, "local_num_experts": local}
    for num_tokens in (1, 17, 257, 1025):
        whole = routed.run(num_tokens, tile_tokens_dim=tile_tokens_dim)
        got = routed.run(num_tokens, tile_tokens_dim=tile_tokens_dim, **shard)
        is_local = (whole.topk_ids >= first) & (whole.topk_ids < first + local)
        assert torch.equal(got.topk_ids, torch.where(is_local, whole.topk_ids, -1))
        assert torch.equal(got.topk_weights, whole.topk_weights)
        wanted = permute(
            whole.topk_ids, num_experts=experts, tile_tokens_dim=tile_tokens_dim, **shard
        )
        problems = check_permutation(got.permutation, whole.topk_ids, wanted)
        assert not problems, f"{num_tokens} tokens: {problems}"
