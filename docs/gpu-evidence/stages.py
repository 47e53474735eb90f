"""FlashInfer's finalize and DeepSeek FP8 activation kernels against the reference and the simulator.

    python stages.py stages.so

Both kernels are those of flashinfer-python 0.7.2.post1, built for sm_90a by build.sh, and called as
its runner calls them. Inputs are permuted rows of `simulator.placement.permute`; rows that no slot
owns hold NaN, so that a kernel that reads them shows it.
"""

import ctypes
import sys

import torch

from pytest_moe_routing.reference.activation import activation
from pytest_moe_routing.reference.quantization import dequantize, quantize
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.simulator.placement import permute

library = ctypes.CDLL(sys.argv[1])
TILE = 8


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def routed(tokens, experts, top_k, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    weights = torch.rand(tokens, top_k, generator=generator) - 0.25
    return ids, weights, generator


def place_of(ids, shard):
    place = permute(ids, shard, TILE)
    padded = torch.tensor([len(place.tokens)], dtype=torch.int32).cuda()
    return place, place.expanded.flatten().to(torch.int32).cuda(), padded


def finalize(tokens, experts, top_k, hidden, dtype, weighted, shard):
    ids, weights, generator = routed(tokens, experts, top_k)
    weights = weights.to(dtype)
    place, expanded, padded = place_of(ids, shard)
    rows = torch.full((len(place.tokens), hidden), torch.nan)
    used = place.tokens >= 0
    rows[used] = torch.randn(int(used.sum()), hidden, generator=generator)
    rows = rows.bfloat16()
    output = torch.full((tokens, hidden), torch.nan, dtype=torch.bfloat16).cuda()
    given = weights.cuda().contiguous() if weighted else None
    on_gpu = rows.cuda()
    status = library.run_finalize(
        pointer(on_gpu),
        pointer(given),
        int(dtype == torch.float32),
        pointer(expanded),
        pointer(padded),
        pointer(output),
        tokens,
        experts,
        top_k,
        hidden,
        hidden,
    )
    assert status == 0, f"CUDA error {status}"
    exact = torch.zeros(tokens, hidden, dtype=torch.float64)
    size = torch.zeros_like(exact)
    for token in range(tokens):
        for slot in range(top_k):
            row = int(place.expanded[token, slot])
            if row >= 0:
                weight = weights[token, slot].double() if weighted else 1.0
                exact[token] += weight * rows[row].double()
                size[token] += (weight * rows[row].double()).abs()
    # The sum in float32 is off by top_k roundings of the terms, the result by half a bfloat16 step.
    off = (output.cpu().double() - exact).abs()
    allowed = 2**-8 * exact.abs() * 1.01 + top_k * 2**-23 * size + 1e-30
    worst = float((off / allowed).nan_to_num(1e30).max())
    # What the simulator does: float32, slot by slot.
    simulated = torch.zeros(tokens, hidden)
    for slot in range(top_k):
        row = place.expanded[:, slot]
        term = rows[row.clamp_min(0)].float() * (weights[:, slot, None].float() if weighted else 1)
        simulated += term.masked_fill((row < 0).unsqueeze(1), 0)
    same = (simulated.bfloat16() == output.cpu()).double().mean()
    print(
        f"finalize tokens={tokens} experts={experts} k={top_k} hidden={hidden} {dtype} weighted={weighted} "
        f"shard={shard.local_num_experts}: worst error / allowed {worst:.3f}, equal to the simulator {same:.5f}"
    )
    return worst <= 1


def deepseek_activation(tokens, experts, top_k, inner, constants, shard):
    ids, _, generator = routed(tokens, experts, top_k)
    place, expanded, padded = place_of(ids, shard)
    count = len(place.tokens)
    gemm1 = torch.randn(count, 2 * inner, generator=generator) * 3
    stored = quantize(gemm1, "fp8_1x128")
    # Scales lie [blocks, rows].
    scales = stored.scales.T.contiguous().cuda()
    codes = stored.data.clone()
    outside = place.tokens < 0
    scales[:, outside.cuda()] = torch.nan
    out = torch.zeros(count, inner, dtype=torch.uint8).cuda()
    out_scales = torch.full((inner // 128, count), torch.nan).cuda()
    owner = place.expert_of_tile.to(torch.int32).cuda()
    local = shard.local_num_experts
    alpha = beta = limit = None
    if constants:
        alpha = 1 + torch.arange(local) / 8
        beta = torch.arange(local) / 4
        limit = 2 + torch.arange(local) / 2
    given = [None if x is None else x.float().cuda() for x in (alpha, beta, limit)]
    codes_gpu = codes.cuda()
    status = library.run_activation(
        pointer(codes_gpu),
        pointer(scales),
        pointer(out),
        pointer(out_scales),
        pointer(expanded),
        pointer(padded),
        pointer(owner),
        *map(pointer, given),
        tokens,
        top_k,
        2 * inner,
        TILE,
    )
    assert status == 0, f"CUDA error {status}"
    used = ~outside
    real = dequantize(stored, torch.float64)[used]
    owners = place.expert_of_tile[torch.arange(count) // TILE][used]
    # The kernel takes [up, gate] columns.
    up, gate = real.chunk(2, 1)
    if constants:
        a, b, most = (x.double()[owners].unsqueeze(1) for x in (alpha, beta, limit))
        gate, up = torch.minimum(gate, most), torch.maximum(torch.minimum(up, most), -most) + b
        exact = up * gate * torch.sigmoid(a * gate)
    else:
        exact = activation("silu")(torch.cat((gate, up), 1))
    got_scales = out_scales.cpu().T[used].double()
    blocks = exact.view(-1, inner // 128, 128)
    wanted = blocks.abs().amax(2) / 448
    got = out.cpu()[used].view(torch.float8_e4m3fn).double().view(
        -1, inner // 128, 128
    ) * got_scales.unsqueeze(2)
    scale_error = float(((got_scales - wanted).abs() / wanted).nan_to_num(1e30).max())
    # Half a step of e4m3 (2**-4 relative, 2**-10 of a scale at least), and float32 before it.
    allowed = (
        torch.maximum(blocks.abs() * 2**-4, wanted.unsqueeze(2) * 2**-10) + 1e-4 * blocks.abs()
    )
    worst = float(((got - blocks).abs() / allowed).nan_to_num(1e30).max())
    print(
        f"activation tokens={tokens} k={top_k} inner={inner} constants={constants} shard={local}: "
        f"scales off by {scale_error:.2e} at most, worst error / allowed {worst:.3f}"
    )
    return worst <= 1.01 and scale_error < 1e-5


good = True
for tokens, experts, top_k, hidden in (
    (1, 8, 2, 256),
    (5, 16, 4, 512),
    (33, 16, 8, 2880),
    (300, 64, 6, 7168),
    (4097, 32, 3, 512),
    (7, 8, 1, 264),
):
    for dtype in (torch.bfloat16, torch.float32):
        for weighted in (True, False):
            for shard in (Shard.whole(experts), Shard(experts // 4, experts // 4)):
                good &= finalize(tokens, experts, top_k, hidden, dtype, weighted, shard)
for tokens, experts, top_k, inner in (
    (1, 8, 2, 128),
    (5, 16, 4, 256),
    (33, 16, 8, 512),
    (1025, 32, 8, 2048),
):
    for constants in (False, True):
        for shard in (Shard.whole(experts), Shard(experts // 4, experts // 4)):
            good &= deepseek_activation(tokens, experts, top_k, inner, constants, shard)
print("all within what rounding allows" if good else "FAILED")
sys.exit(not good)
