"""Time the references on a GPU by CUDA events: the median of single calls, launches included.

    python speed.py LABEL

Prints milliseconds, and the ratio to the bare operations: for routing, `sigmoid` and `topk`, and the
operations of a router with groups as plain torch has them (vLLM's `grouped_topk`, uncompiled); for
the MoE, the matrix products of rows that are gathered already.
"""

import statistics
import sys
from functools import partial

import torch

from pytest_moe_routing.logits import distinct
from pytest_moe_routing.reference.moe import MoELayer, moe
from pytest_moe_routing.reference.quantization import Quantized, find_format
from pytest_moe_routing.reference.routing import Routing, route
from pytest_moe_routing.reference.weights import Expert
from pytest_moe_routing.routing.recipe import Recipe

TOKENS = (1, 2, 4, 8, 64, 1024, 8192)


def timed(call, times, *arguments):
    for _ in range(5):
        call(*arguments)
    torch.cuda.synchronize()
    found = []
    for _ in range(times):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call(*arguments)
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def scored(logits):
    return logits.sigmoid().topk(8)


def grouped(logits, bias):
    """As vLLM 0.33.0's `grouped_topk` in torch: sigmoid, groups by their two best, a bias, a factor."""
    tokens = len(logits)
    scores = logits.sigmoid()
    keys = scores + bias
    groups = keys.view(tokens, 8, -1).topk(2, dim=-1)[0].sum(-1)
    kept = groups.topk(4, dim=-1, sorted=False)[1]
    mask = torch.zeros_like(groups).scatter_(1, kept, 1)
    mask = mask.unsqueeze(-1).expand(tokens, 8, logits.shape[1] // 8).reshape(tokens, -1)
    ids = keys.masked_fill(~mask.bool(), -torch.inf).topk(8, dim=-1, sorted=False)[1]
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * 2.5, ids


def ungrouped(logits, bias):
    """The operations of a router without groups, in plain torch."""
    scores = logits.sigmoid()
    ids = (scores + bias).topk(8, dim=-1)[1]
    weights = scores.gather(1, ids)
    return weights / weights.sum(-1, keepdim=True) * 2.5, ids


def graphed(call):
    """The same call in a CUDA graph."""
    try:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            call()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except Exception as error:
        torch.cuda.synchronize()
        print(f"  no CUDA graph: {str(error).splitlines()[0][:100]}")
        return None
    return graph.replay


def routing(label):
    base = {"score": "sigmoid", "bias": True, "top_k": 8, "weigh_by": "sigmoid", "normalize": "sum"}
    flat = Recipe(**base, scale=2.5)
    groups = Recipe(
        **base, scale=2.5, n_group=8, topk_group=4, group_score="top2_sum", epsilon=1e-20
    )
    for tokens in TOKENS:
        logits = torch.randn(tokens, 256, device="cuda")
        bias = torch.randn(256, device="cuda") / 8
        bare = timed(scored, 100, logits)
        plain = timed(grouped, 100, logits, bias)
        one = timed(route, 60, logits, flat, bias)
        other = timed(route, 60, logits, groups, bias)
        plain_flat = timed(ungrouped, 100, logits, bias)
        # A call that waits for the GPU cannot be captured, and ends the process's use of it.
        replay = None if label == "before" else graphed(partial(route, logits, groups, bias))
        graph = "" if replay is None else f"; in a CUDA graph {timed(replay, 60):.4f}"
        print(
            f"{label} routing {tokens:5d} tokens: sigmoid and topk {bare:.4f} ms; without groups plain torch "
            f"{plain_flat:.4f}, reference {one:.4f} ({one / plain_flat:.2f} x, {one / bare:.2f} x sigmoid and "
            f"topk); with groups plain torch {plain:.4f}, reference {other:.4f} ({other / plain:.2f} x, "
            f"{other / bare:.2f} x sigmoid and topk){graph}",
            flush=True,
        )


def experts(label):
    fmt, generator = find_format("float32"), torch.Generator("cuda").manual_seed(0)

    def matrix(rows, columns):
        x = torch.randn(rows, columns, device="cuda", generator=generator)
        return Quantized(fmt, x / columns**0.5)

    made = [Expert(matrix(1024, 1024), matrix(1024, 512)) for _ in range(64)]
    layer = MoELayer.of("float32")
    for tokens in TOKENS:
        ids = distinct(tokens, 64, seed=2)[:, :8].contiguous().cuda()
        weights = Routing(ids, torch.full(ids.shape, 0.125, device="cuda"))
        hidden = torch.randn(tokens, 1024, device="cuda", generator=generator)
        rows = [(e, hidden[(ids == e).any(1)]) for e in range(64)]
        rows = [(made[e], x) for e, x in rows if len(x)]

        def bare(rows=rows):
            for e, x in rows:
                (x @ e.gemm1.data.T)[:, :512] @ e.gemm2.data.T

        products = timed(bare, 30)
        whole = timed(lambda h=hidden, r=weights: moe(h, made, r, layer), 30)
        again = [moe(hidden, made, weights, layer) for _ in range(2)]
        print(
            f"{label} MoE {tokens:5d} tokens: products {products:.3f} ms; reference {whole:.3f} "
            f"({whole / products:.2f} x); two runs {'equal' if torch.equal(*again) else 'different'}",
            flush=True,
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
    with torch.no_grad():
        routing(sys.argv[1])
        experts(sys.argv[1])
