"""Calls that FlashInfer rejects after routing, and those of the operator; see launcher_cases.py."""

import torch
from launcher_cases import (
    BF16,
    CONSTANTS,
    DEEPSEEK,
    F16,
    F32,
    U8,
    Case,
    N,
    R,
    V,
    both,
    cast,
    cut,
    deep,
    grown,
    ones,
    put,
    strided,
)


def weights():
    """`check_moe` of each launcher, and the GEMM runner."""
    yield Case(
        "launcher:1493", R, "bf16", lambda a: {"hidden_states": a["hidden_states"].unsqueeze(2)}
    )
    yield Case("launcher:1846", R, "bf16", put(weight_layout=0))
    yield Case("launcher:4340", R, "fp8_block", cast("hidden_states", F16))
    scales = "hidden_states_scale"
    yield Case("launcher:4344", R, "fp8_block", deep(scales))
    yield Case("launcher:4346", R, "fp8_block", cut(scales, 0))
    yield Case("launcher:4348", R, "fp8_block", cut(scales, 1))
    lines = {"gemm1": (4370, 4372, 4377, 4379), "gemm2": (4391, 4393, 4395, 4397)}
    for name, (rank, *sizes) in lines.items():
        yield Case(f"launcher:{rank}", R, "fp8_block", deep(f"{name}_weights_scale"))
        for dim, at in enumerate(sizes):
            yield Case(f"launcher:{at}", R, "fp8_block", cut(f"{name}_weights_scale", dim))
    yield Case(
        "launcher:4374",
        R,
        "fp8_block",
        lambda a: {
            "intermediate_size": 192,
            "gemm1_weights": a["gemm1_weights"][:, :384],
            "gemm1_weights_scale": a["gemm1_weights_scale"][:, :3],
            "gemm2_weights": a["gemm2_weights"][:, :, :192],
            "gemm2_weights_scale": a["gemm2_weights_scale"][:, :, :1],
        },
    )
    for name in ("gemm1_weights", "gemm2_weights"):
        yield Case("launcher:1329", R, "mxfp8", in_one_block(name))
        yield Case("launcher:1335", R, "bf16", whole_rows(name))
        less = both(put(num_fused_shared_experts=1), without_one_more(name))
        yield Case("launcher:1369", R, "fp8_block", less, DEEPSEEK)
    yield Case("launcher:1341", N, "fp8_block", put(weight_layout=1))
    yield Case("launcher:1347", R, "mxfp8", cut("gemm1_weights", 1))
    yield Case(
        "launcher:1352", R, "mxfp8", lambda a: {"gemm1_weights": a["gemm1_weights"][:, :256]}
    )
    yield Case("launcher:1354", R, "bf16", cut("gemm1_weights", 1))
    yield Case("launcher:1361", R, "mxfp8", cut("gemm2_weights", 1))
    yield Case("launcher:1364", R, "mxfp8", cut("gemm2_weights", 2))
    yield Case(
        "launcher:1862",
        R,
        "bf16",
        lambda a: {
            "intermediate_size": 192,
            "gemm1_weights": a["gemm1_weights"][:, :, :384],
            "gemm2_weights": a["gemm2_weights"][:, :3],
        },
    )
    for name, rows, dtype, rank, experts, size in (
        ("gemm1_bias", 512, 4411, 4413, 4415, 4417),
        ("gemm2_bias", 256, 4421, 4423, 4425, 4427),
    ):
        yield Case(f"launcher:{dtype}", R, "mxfp8", ones(name, 8, rows, dtype=BF16))
        yield Case(f"launcher:{rank}", R, "mxfp8", ones(name, 8, rows, 1))
        yield Case(f"launcher:{experts}", R, "mxfp8", ones(name, 7, rows))
        yield Case(f"launcher:{size}", R, "mxfp8", ones(name, 8, rows - 1))
    for name, rank, size in (
        ("output1_scales_scalar", 3697, 3699),
        ("output1_scales_gate_scalar", 3706, 3708),
        ("output2_scales_scalar", 3715, 3717),
    ):
        yield Case(f"launcher:{rank}", R, "fp8_per_tensor", ones(name, 8, 1))
        yield Case(f"launcher:{size}", R, "fp8_per_tensor", ones(name, 7))
    yield Case(
        "launcher:1390",
        R,
        "fp8_per_tensor",
        put(gemm1_clamp_limit=strided(8)),
        {"activated": "swiglustep"},
    )
    for at, name in ((4835, "gemm1_weights_scale"), (4838, "gemm2_weights_scale")):
        yield Case(f"launcher:{at}", R, "mxint4", cast(name, F32))
    yield Case("launcher:5084", R, "mxfp4", put(activation_type=7))
    yield Case(
        "launcher:5087", R, "mxfp4", lambda a: {"hidden_states": torch.zeros(5, 128, dtype=U8)}
    )
    yield Case(
        "launcher:5091",
        R,
        "nvfp4",
        lambda a: {"gemm1_weights_scale": a["gemm1_weights_scale"][..., ::2].contiguous()},
    )
    yield Case(
        "launcher:5103",
        R,
        "mxfp4",
        lambda a: {"gemm1_weights_scale": a["gemm1_weights_scale"].repeat(1, 1, 2)},
    )
    names = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
    for name, nvfp4, fp8 in zip(names, (5095, 5097, 5099), (5109, 5111, 5113), strict=True):
        yield Case(f"launcher:{nvfp4}", R, "nvfp4", put(**{name: None}))
        rest = {other: torch.ones(8) for other in names if other != name}
        yield Case(f"launcher:{fp8}", R, "mxfp4", put(hidden_states_scale=None, **rest))
    yield Case("launcher:5221", R, "mxfp4", ones("per_token_scale", 5))
    for at, name in ((5118, "gemm1_weights_scale"), (5121, "gemm2_weights_scale")):
        yield Case(f"launcher:{at}", R, "nvfp4", cast(name, U8))
    step = {"activated": "swiglustep"}
    for at, limit in (
        (1383, torch.ones(8, dtype=BF16)),
        (1384, torch.ones(8, 1)),
        (1389, torch.ones(7)),
        (1390, strided(8)),
    ):
        yield Case(f"launcher:{at}", R, "nvfp4", put(gemm1_clamp_limit=limit), step)
    # Gelu with tanh is gated and has no kernel; Silu is neither gated nor has it one.
    yield Case("runner:125", R, "bf16", put(activation_type=8))
    yield Case("runner:139", R, "nvfp4", lambda a: {"activation_type": 2, "intermediate_size": 512})
    yield Case("gemm:606", R, "fp8_per_tensor", put(intermediate_size=192), {"activated": "relu2"})
    yield Case("gemm:606", R, "mxfp4", put(intermediate_size=192))


def in_one_block(name):
    """Weights `[experts, 1, M, K]`, which have the rows and columns of `[experts, M, K]`."""
    return lambda a: {name: a[name].unsqueeze(1)}


def whole_rows(name):
    """Weights `[experts, M, K]`, which have the rows and columns of those in blocks."""
    return lambda a: {name: a[name].transpose(1, 2).flatten(2)}


def without_one_more(*names):
    """Weights of one expert more, but not these."""
    return lambda a: grown(a, but=names)


def shared_experts():
    """FP4 with a fused shared expert: every tensor holds one expert more."""

    def case(at, *, but=(), **values):
        change = both(without_one_more(*but), put(num_fused_shared_experts=1, **values))
        return Case(at, R, "nvfp4", change, DEEPSEEK | {"activated": "swigluoai"})

    yield case("launcher:5131", but=("gemm1_weights",))
    yield case("launcher:5133", but=("gemm2_weights",))
    for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
        yield case("launcher:5141", **{name: torch.ones(9, 1)})
        yield case("launcher:5143", but=(name,))
    for name, size in (("gemm1_bias", 512), ("gemm2_bias", 256)):
        yield case("launcher:5141", **{name: torch.ones(9, size, 1)})
        yield case("launcher:5143", **{name: torch.ones(8, size)})
    for name in CONSTANTS:
        yield case("launcher:1389", **{name: torch.ones(8)})


def operator():
    """The standalone routing operator."""
    for at, raises, change in (
        (113, V, put(routing_logits=torch.zeros(8))),
        (118, V, cast("routing_logits", F16)),
        (122, V, put(top_k=9)),
        (122, V, put(top_k=0)),
        (125, V, ones("routing_bias", 7)),
        (130, V, put(tile_tokens_dim=12)),
        (130, V, put(tile_tokens_dim=0)),
        (133, V, put(routing_method=10)),
    ):
        yield Case(f"operator:{at}", raises, "routing", change)
    for at, change in (
        (77, put(routing_logits=torch.zeros(0, 8))),
        (81, put(local_num_experts=9)),
        (81, put(local_num_experts=0)),
        (83, put(local_expert_offset=5, local_num_experts=4)),
        (114, put(n_group=2)),
        (116, put(topk_group=2)),
        (128, ones("routing_bias", 8, dtype=F16)),
    ):
        yield Case(f"binding:{at}", R, "routing", change)
    for at, change in (
        (79, put(num_fused_shared_experts=-1)),
        (96, put(n_group=0)),
        (97, put(topk_group=0)),
        (98, put(n_group=3)),
        (
            106,
            both(
                put(routing_logits=torch.zeros(5, 64), routing_bias=torch.zeros(64)), put(top_k=9)
            ),
        ),
        (109, put(n_group=8, topk_group=5)),
        (110, put(n_group=2, topk_group=4)),
        (112, put(n_group=4, topk_group=1)),
    ):
        yield Case(f"binding:{at}", R, "routing", change, DEEPSEEK)


CASES = [*weights(), *shared_experts(), *operator()]
