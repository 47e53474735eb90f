"""Calls that FlashInfer 0.7.2.post1 rejects, one for each of its checks, by file and line.

Each case begins with a call that the simulator takes and changes what the check is about. The
exception types are those of the source: ICHECK and FLASHINFER_CHECK arrive as RuntimeError.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

F32, BF16, F16, FP8 = torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn
U8, I16, I32, I64 = torch.uint8, torch.int16, torch.int32, torch.int64


@dataclass(frozen=True)
class Case:
    """A call and the check that rejects it.

    Attributes:
        at: Name of the file in checks.yaml and line.
        raises: What FlashInfer raises there.
        scheme: Quantization scheme of the call, or `routing`.
        change: From the arguments of a good call to those that differ.
        how: Keywords of `good_call`: activation, routed, pair, method.
    """

    at: str
    raises: type[Exception]
    scheme: str
    change: Callable[[dict[str, Any]], dict[str, Any]]
    how: dict[str, Any] = field(default_factory=dict)

    def __str__(self):
        return f"{self.at}-{self.scheme}"


def put(**values):
    return lambda a: values


def cast(name, dtype):
    """The same shape in another dtype; float8 has no conversion from all."""
    return lambda a: {name: torch.zeros(a[name].shape, dtype=dtype)}


def deep(*names):
    """One dimension more, of one element: all other sizes are right."""
    return lambda a: {name: a[name].unsqueeze(-1) for name in names}


def grown(a, *, by=1, but=()):
    """Weights, scales and scalars of some experts more, except of some names."""
    found = {}
    for name, value in a.items():
        per_expert = name.startswith(("gemm", "output1", "output2"))
        if per_expert and isinstance(value, torch.Tensor) and name not in but:
            raw = value.contiguous().view(U8).view(len(value), -1)
            more = raw[:1].expand(by, -1)
            found[name] = torch.cat((raw, more)).view(value.dtype).view(-1, *value.shape[1:])
    return found


def sharing(*changes, by=1, **values):
    """A call with fused shared experts, and their weights."""
    given = {"num_fused_shared_experts": by, **values}
    return both(lambda a: grown(a, by=by), put(**given), *changes)


def cut(name, dim):
    """One less in a dimension."""
    return lambda a: {name: a[name].narrow(dim, 0, a[name].shape[dim] - 1)}


def ones(name, *shape, dtype=F32):
    return lambda a: {name: torch.ones(shape, dtype=dtype)}


def both(*changes):
    return lambda a: {k: v for change in changes for k, v in change(a).items()}


def pair(ids=None, weights=None):
    """A pair with other ids or weights."""

    def change(a):
        given = a["topk_ids"]
        return {"topk_ids": (given[0], weights(given[1]) if weights else given[1])}

    return change


def blocks(*names):
    """Weights in blocks of 128 columns, `[experts, K / 128, M, 128]`."""
    return lambda a: {name: a[name].unflatten(2, (-1, 128)).transpose(1, 2) for name in names}


def strided(*shape, dtype=F32):
    """Ones that are not contiguous."""
    return torch.ones((*shape[:-1], 2 * shape[-1]), dtype=dtype)[..., ::2]


def wide(top_k, experts):
    """Other numbers of experts."""
    logits = torch.zeros(5, experts)
    return put(top_k=top_k, num_experts=experts, routing_logits=logits)


DEEPSEEK = {"method": "DeepSeekV3"}
ROUTED, PAIR = {"routed": True}, {"routed": True, "pair": True}
CONSTANTS = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
R, V, A, T, N = RuntimeError, ValueError, AssertionError, TypeError, NotImplementedError


def public():
    """The functions of core.py."""
    # Without one of the routed experts: the shared one makes as many weights as before.
    yield Case(
        "core:4737", V, "fp8_block", put(num_fused_shared_experts=1, local_num_experts=7), DEEPSEEK
    )
    yield Case("core:4745", V, "nvfp4", sharing())
    replay = "routing_replay_out"
    for scheme in ("bf16", "fp8_per_tensor", "fp8_block", "nvfp4", "mxint4"):
        yield Case("core:4705", V, scheme, ones(replay, 5, 2, dtype=I32))
        yield Case("core:4709", V, scheme, ones(replay, 5, 2, 1, dtype=I16))
        yield Case("core:4713", V, scheme, ones(replay, 5, 3, dtype=I16))
        yield Case("core:4717", V, scheme, ones(replay, 4, 2, dtype=I16))
        yield Case("core:4722", V, scheme, put(**{replay: strided(5, 2, dtype=I16)}))
    for name in CONSTANTS[:2]:
        yield Case("validation:41", V, "bf16", ones(name, 8), {"activated": "swiglustep"})
        yield Case("core:4785", V, "mxfp8", ones(name, 8), {"activated": "swiglustep"})
        yield Case("launcher:1017", R, "nvfp4", ones(name, 8), {"activated": "swiglustep"})
    for name in CONSTANTS:
        yield Case("validation:46", V, "bf16", ones(name, 8), {"activated": "relu2"})
        yield Case("core:4801", V, "mxfp8", ones(name, 8), {"activated": "relu2"})
        yield Case("core:4801", V, "mxfp8", ones(name, 8), {"activated": "gelu_tanh"})
        yield Case("utils:814", V, "bf16", ones(name, 7))
        yield Case("utils:818", V, "bf16", ones(name, 8, dtype=BF16))
        yield Case("launcher:1383", R, "fp8_block", ones(name, 8, dtype=BF16))
        yield Case("launcher:1384", R, "fp8_block", ones(name, 8, 1))
        yield Case("launcher:1389", R, "mxfp8", ones(name, 7))
        yield Case("launcher:1390", R, "mxfp8", put(**{name: strided(8)}))
    yield Case(
        "core:4795", V, "fp8_block", both(ones("gemm1_alpha", 8), put(fp8_quantization_type=0))
    )
    limit = "gemm1_clamp_limit"
    yield Case("core:4761", V, "fp8_per_tensor", ones(limit, 8))
    yield Case("utils:814", V, "fp8_per_tensor", ones(limit, 7), {"activated": "swiglustep"})
    yield Case(
        "utils:818", V, "fp8_per_tensor", ones(limit, 8, dtype=BF16), {"activated": "swiglustep"}
    )
    yield Case("core:4782", V, "fp8_block", lambda a: {"activation_type": 7})


def operators():
    """The operators behind them."""
    logits = put(routing_logits=None)
    for at, scheme in (
        ("2082", "bf16"),
        ("3098", "fp8_block"),
        ("3493", "nvfp4"),
        ("3879", "mxint4"),
    ):
        yield Case(f"core:{at}", A, scheme, logits)
    for at, scheme in (("2618", "fp8_per_tensor"), ("3100", "mxfp8"), ("3495", "mxfp4")):
        yield Case(f"core:{at}", A, scheme, cast("topk_ids", I64), ROUTED)
    for scheme in ("bf16", "fp8_per_tensor"):
        yield Case("utils:814", V, scheme, ones("output", 5, 128, dtype=BF16))
    for scheme in ("bf16", "fp8_per_tensor", "mxfp8", "nvfp4", "mxint4"):
        yield Case("utils:818", V, scheme, ones("output", 5, 256))
    for scheme, rows, columns in (
        ("fp8_block", 3137, 3140),
        ("mxfp4", 3558, 3561),
        ("mxint4", 3923, 3926),
    ):
        yield Case(f"core:{rows}", A, scheme, ones("output", 6, 256, dtype=BF16))
        yield Case(f"core:{columns}", A, scheme, ones("output", 5, 512, dtype=BF16))
    yield Case("enums:221", A, "nvfp4", put(hidden_states_scale=None))
    yield Case("enums:227", V, "mxfp4_bf16", cast("hidden_states", F16))
    yield Case("validation:139", N, "nvfp4", put(hidden_states_scale_layout=0))


def entry_points():
    """The beginning of each launcher."""
    yield Case("launcher:5445", R, "bf16", cast("routing_logits", F16))
    yield Case("launcher:5448", R, "bf16", cast("hidden_states", F16))
    for at, name in ((5450, "gemm1_weights"), (5452, "gemm2_weights")):
        yield Case(f"launcher:{at}", R, "bf16", cast(name, F16))
    scalars = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
    yield Case("launcher:5542", T, "fp8_per_tensor", put(routing_logits=None))
    yield Case("launcher:5558", R, "fp8_per_tensor", cast("hidden_states", U8))
    yield Case("launcher:5678", R, "fp8_per_tensor", cast("hidden_states", U8), ROUTED)
    for how, lines in (({}, (5543, 5544, 5545)), (ROUTED, (5652, 5652, 5653))):
        for at, name in zip(lines, scalars, strict=True):
            yield Case(f"launcher:{at}", T, "fp8_per_tensor", put(**{name: None}), how)
    for how, lines in (({}, (5560, 5562)), (ROUTED, (5680, 5682))):
        for at, name in zip(lines, ("gemm1_weights", "gemm2_weights"), strict=True):
            yield Case(f"launcher:{at}", R, "fp8_per_tensor", cast(name, U8), how)
    for how, lines in (({}, (5564, 5566, 5568)), (ROUTED, (5684, 5686, 5688))):
        for at, name in zip(lines, scalars, strict=True):
            yield Case(f"launcher:{at}", R, "fp8_per_tensor", cast(name, BF16), how)
    yield Case("launcher:5671", R, "fp8_per_tensor", deep("topk_ids"), ROUTED)
    yield Case("launcher:5673", R, "fp8_per_tensor", cut("topk_ids", 0), ROUTED)
    yield Case("launcher:5675", R, "fp8_per_tensor", ones("topk_ids", 5, 3, dtype=I32), ROUTED)
    yield Case("launcher:5676", R, "fp8_per_tensor", put(topk_ids=strided(5, 2, dtype=I32)), ROUTED)
    for at, name in (
        (5818, "hidden_states_scale"),
        (5818, "gemm1_weights_scale"),
        (5822, "gemm2_weights_scale"),
    ):
        yield Case(f"launcher:{at}", T, "fp8_block", put(**{name: None}))
    # Relu2 and Geglu.
    yield Case("launcher:5839", N, "fp8_block", put(activation_type=6))
    yield Case("launcher:5839", N, "fp8_block", put(activation_type=4))
    yield Case("launcher:5857", R, "fp8_block", cast("hidden_states", F32))
    yield Case("launcher:5860", R, "fp8_block", cast("hidden_states_scale", BF16))
    yield Case("launcher:5863", R, "mxfp8", cast("hidden_states_scale", F32))
    yield Case("launcher:5866", N, "fp8_block", put(fp8_quantization_type=0))
    yield Case("launcher:5866", N, "fp8_block", put(fp8_quantization_type=3))
    for name, weights, square, block in (("gemm1", 5869, 5874, 5879), ("gemm2", 5871, 5876, 5881)):
        yield Case(f"launcher:{weights}", R, "mxfp8", cast(f"{name}_weights", U8))
        yield Case(f"launcher:{square}", R, "fp8_block", cast(f"{name}_weights_scale", BF16))
        yield Case(f"launcher:{block}", R, "mxfp8", cast(f"{name}_weights_scale", F32))
    yield Case("launcher:5888", R, "mxfp8", put(use_shuffled_weight=False))
    in_blocks = both(put(weight_layout=2), blocks("gemm1_weights", "gemm2_weights"))
    yield Case("launcher:5889", R, "mxfp8", in_blocks)
    yield Case("launcher:6051", R, "nvfp4", cut("gemm1_weights_scale", 1))
    bias = "routing_bias"
    for scheme, dtype, rank, size in (
        ("nvfp4", 6060, 6062, 6064),
        ("mxint4", 6227, 6228, 6230),
        ("bf16", 1281, 1282, 1284),
    ):
        yield Case(f"launcher:{dtype}", R, scheme, ones(bias, 8, dtype=F16))
        yield Case(f"launcher:{rank}", R, scheme, ones(bias, 8, 1))
        yield Case(f"launcher:{size}", R, scheme, ones(bias, 7))
    yield Case("launcher:6073", R, "nvfp4", cast("gemm2_weights", FP8))
    yield Case("launcher:6082", R, "nvfp4", cast("hidden_states_scale", F32))
    yield Case("launcher:6088", N, "nvfp4", ones("hidden_states_scale", 5, 4, dtype=FP8))
    scalars = ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
    yield Case(
        "launcher:6095",
        N,
        "mxfp4",
        both(ones("hidden_states_scale", 5, 16, dtype=FP8), *(ones(name, 8) for name in scalars)),
    )
    yield Case(
        "launcher:6214",
        R,
        "mxint4",
        lambda a: {"gemm1_weights_scale": a["gemm1_weights_scale"][:, :, :4]},
    )
    yield Case("launcher:6219", R, "mxint4", cast("routing_logits", F16))
    yield Case("launcher:6220", R, "mxint4", deep("routing_logits"))
    yield Case("launcher:6222", R, "mxint4", cut("routing_logits", 1))
    yield Case("launcher:6239", R, "mxint4", cast("gemm1_weights", FP8))
    yield Case("launcher:6240", R, "mxint4", cast("hidden_states", F16))
    yield Case("launcher:1737", R, "fp8_block", put(weight_layout=3))
    yield Case("launcher:1737", R, "bf16", put(weight_layout=-1))


def routing():
    """`check_routing` of each launcher."""
    for scheme, rank, tokens, slots in (
        ("fp8_block", 4211, 4213, 4215),
        ("bf16", 1778, 1780, 1782),
    ):
        yield Case(f"launcher:{rank}", R, scheme, deep("topk_ids"), ROUTED)
        yield Case(f"launcher:{tokens}", R, scheme, cut("topk_ids", 0), ROUTED)
        yield Case(f"launcher:{slots}", R, scheme, ones("topk_ids", 5, 3, dtype=I32), ROUTED)
    yield Case("launcher:1783", R, "bf16", cast("topk_ids", I64), ROUTED)
    pairs = (
        ("fp8_block", 4223, 4224, 4226, 4228),
        ("bf16", 1790, 1791, 1793, 1795),
        ("fp8_per_tensor", 3619, 3620, 3622, 3623),
    )
    for scheme, dtype, rank, tokens, slots in pairs:
        yield Case(f"launcher:{dtype}", R, scheme, pair(weights=lambda w: w.to(F16)), PAIR)
        yield Case(f"launcher:{rank}", R, scheme, pair(weights=lambda w: w.unsqueeze(-1)), PAIR)
        yield Case(f"launcher:{tokens}", R, scheme, pair(weights=lambda w: w[1:]), PAIR)
        yield Case(f"launcher:{slots}", R, scheme, pair(weights=lambda w: w[:, 1:]), PAIR)
    yield Case("launcher:5045", R, "nvfp4", pair(weights=lambda w: w.to(F16)), PAIR)
    for scheme in ("bf16", "fp8_per_tensor", "fp8_block", "nvfp4", "mxint4"):
        yield Case("launcher:1395", R, scheme, put(top_k=9))
        if scheme != "mxint4":
            # There the count of scales is checked first.
            yield Case("launcher:1397", R, scheme, put(local_num_experts=9))
            yield Case("launcher:1397", R, scheme, put(local_num_experts=0))
        yield Case("launcher:1400", R, scheme, put(local_expert_offset=1))
        yield Case("launcher:1243", R, scheme, cut("routing_logits", 0))
    yield Case("launcher:1241", R, "fp8_block", deep("routing_logits"))
    yield Case("launcher:1245", R, "nvfp4", cut("routing_logits", 1))
    yield Case("launcher:1250", R, "fp8_per_tensor", cast("routing_logits", F16))
    yield Case("launcher:4235", R, "fp8_block", put(n_group=4))
    yield Case("launcher:4237", R, "mxfp8", put(topk_group=2))
    for how in (DEEPSEEK, DEEPSEEK | ROUTED):
        yield Case("launcher:4241", R, "fp8_block", put(n_group=0), how)
        yield Case("launcher:4242", R, "fp8_block", put(topk_group=0), how)
        yield Case("launcher:4244", R, "fp8_block", put(n_group=3), how)
        yield Case("launcher:4255", R, "fp8_block", put(n_group=8, topk_group=5), how)
        yield Case("launcher:4257", R, "fp8_block", put(n_group=2, topk_group=4), how)
        yield Case("launcher:4259", R, "fp8_block", put(n_group=4, topk_group=1), how)
    yield Case(
        "launcher:4252", R, "fp8_block", both(wide(9, 64), ones("routing_bias", 64)), DEEPSEEK
    )
    yield Case(
        "launcher:4252", R, "fp8_block", both(wide(23, 512), ones("routing_bias", 512)), DEEPSEEK
    )
    yield Case("launcher:4270", R, "mxfp8", wide(33, 64))
    yield Case("launcher:4273", R, "fp8_block", put(routing_method_type=3))
    yield Case("launcher:4277", R, "fp8_block", wide(2, 10))
    yield Case("launcher:4278", R, "fp8_block", wide(8, 8))
    yield Case("launcher:4786", R, "mxint4", cut("topk_ids", 0), ROUTED)
    yield Case("launcher:4788", R, "mxint4", ones("topk_ids", 5, 3, dtype=I32), ROUTED)
    yield Case("launcher:4789", R, "mxint4", cast("topk_ids", I64), ROUTED)
    yield Case("launcher:5052", R, "nvfp4", sharing(), DEEPSEEK | ROUTED)
    three = sharing(lambda a: {"topk_ids": (torch.zeros(5, 3, dtype=I32), a["topk_ids"][1])})
    yield Case("launcher:5055", R, "nvfp4", three, DEEPSEEK | PAIR)
    many = both(wide(2, 512), put(local_num_experts=512), ones("routing_bias", 512))
    many = both(many, lambda a: grown(a, by=505), put(num_fused_shared_experts=1))
    yield Case("deepseek:558", R, "fp8_block", many, DEEPSEEK)


def shared_experts():
    """Fused shared experts, in the routing kernels' runner and in DeepSeek's."""
    one = put(num_fused_shared_experts=1)
    for at, method in ((118, "MiniMax2"), (221, "Llama4"), (269, "Renormalize")):
        top_k = {"top_k": 1} if method == "Llama4" else {}
        bias = ones("routing_bias", 8) if method == "MiniMax2" else put()
        change = both(put(num_fused_shared_experts=1, **top_k), bias)
        yield Case(f"router:{at}", R, "routing", change, {"method": method})
    for scheme in ("routing", "fp8_block"):
        flat_groups = put(n_group=1, topk_group=1)
        yield Case("router:70", R, scheme, sharing(flat_groups), DEEPSEEK)
        yield Case("deepseek:549", R, scheme, sharing(by=33), DEEPSEEK)
        yield Case("deepseek:565", R, scheme, sharing(by=31), DEEPSEEK)
    logits = both(one, put(routing_logits=torch.zeros(5, 512)), ones("routing_bias", 512))
    given = both(logits, put(local_num_experts=512))
    yield Case("deepseek:558", R, "routing", given, DEEPSEEK)


CASES = [*shared_experts(), *public(), *operators(), *entry_points(), *routing()]
