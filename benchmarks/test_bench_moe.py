"""The MoE reference and naive implementations, in one run: read the ratios, not the seconds.

pytest benchmarks/test_bench_moe.py --benchmark-only
MOE_FULL=1 pytest benchmarks/test_bench_moe.py --benchmark-only -k full     # whole layers
"""

import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch

from pytest_moe_routing.compare.budget import bounded_moe
from pytest_moe_routing.logits import bell, distinct
from pytest_moe_routing.reference.moe import MoELayer, moe
from pytest_moe_routing.reference.quantization import dequantize
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.slots import slots_by_expert
from pytest_moe_routing.reference.weights import GeneratedExperts
from pytest_moe_routing.schemes import COMPUTED_SCHEMES, storage_of

#: tokens, experts, hidden, intermediate, top_k
CASES = {"large": (512, 64, 1024, 512, 8), "small": (512, 64, 128, 64, 8)}


class InMemory(list):
    """Experts that are opened already."""


class Case:
    def __init__(self, tokens, experts, hidden, intermediate, top_k, scheme="float32"):
        generated = GeneratedExperts(
            experts, hidden, intermediate, storage_of(scheme).weight, intermediate_scale=0.01
        )
        self.experts = InMemory(generated[e] for e in range(experts))
        self.x = bell(tokens, hidden, seed=1)
        self.ids = distinct(tokens, experts, seed=2)[:, :top_k].contiguous()
        self.weights = torch.full((tokens, top_k), 1.0 / top_k)
        self.layer = MoELayer.of(scheme)

    @property
    def routing(self):
        return Routing(self.ids, self.weights)

    def tensors(self):
        w1 = torch.stack([dequantize(e.gemm1) for e in self.experts])
        return w1, torch.stack([dequantize(e.gemm2) for e in self.experts])

    def run(self):
        return moe(self.x, self.experts, self.routing, self.layer, output_dtype=torch.float32)


@pytest.fixture(params=CASES)
def case(request, benchmark):
    benchmark.group = request.param
    return Case(*CASES[request.param])


def test_reference(benchmark, case):
    benchmark(case.run)


def test_bare_matrix_products(benchmark, case):
    """Only the products, of rows that are gathered already; nothing is activated or summed."""
    w1, w2 = case.tensors()
    steps = slots_by_expert(case.routing, len(w1), Shard.whole(len(w1)), torch.float32)
    rows = [(e, case.x[tokens]) for e, tokens, _ in steps]
    half = w2.shape[2]

    def products():
        return [(x @ w1[e].T)[:, :half] @ w2[e].T for e, x in rows]

    benchmark(products)


def test_transformers_block(benchmark, case):
    """The eager experts of DeepSeek-V3."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        name = "transformers.models.deepseek_v3"
        modeling = pytest.importorskip(f"{name}.modeling_deepseek_v3", exc_type=ImportError)
        config = importlib.import_module(f"{name}.configuration_deepseek_v3")
    w1, w2 = case.tensors()
    block = modeling.DeepseekV3Experts(
        config.DeepseekV3Config(
            num_local_experts=len(w1),
            n_routed_experts=len(w1),
            hidden_size=w1.shape[2],
            moe_intermediate_size=w2.shape[2],
        )
    )
    block.gate_up_proj.data, block.down_proj.data = w1, w2
    with torch.no_grad():
        torch.testing.assert_close(
            block(case.x, case.ids, case.weights), case.run(), rtol=1e-3, atol=1e-3
        )
        benchmark(block, case.x, case.ids, case.weights)


def test_loops_over_tokens_and_experts(benchmark, case):
    """What kernel test suites do: copy every slot into a padded buffer, and loop at each stage."""
    w1, w2 = case.tensors()
    half, pad = w2.shape[2], 8

    top_k = case.ids.shape[1]

    def loops():
        counts = torch.zeros(len(w1), dtype=torch.int64)
        for token in range(len(case.ids)):
            for slot in range(top_k):
                counts[case.ids[token, slot]] += 1
        padded = (counts + pad - 1) // pad * pad
        starts = padded.cumsum(0) - padded
        place, taken = torch.empty(case.ids.numel(), dtype=torch.int64), starts.clone()
        buffer = torch.zeros(int(padded.sum()), case.x.shape[1])
        for token in range(len(case.ids)):
            for slot in range(top_k):
                expert = case.ids[token, slot]
                place[token * top_k + slot] = taken[expert]
                taken[expert] += 1
        for token in range(len(case.ids)):
            for slot in range(top_k):
                buffer[place[token * top_k + slot]] = case.x[token]
        result = torch.zeros(len(buffer), case.x.shape[1])
        for e in range(len(w1)):
            mine = slice(int(starts[e]), int(taken[e]))
            y = buffer[mine] @ w1[e].T
            result[mine] = (torch.nn.functional.silu(y[:, :half]) * y[:, half:]) @ w2[e].T
        out = torch.zeros_like(case.x)
        for token in range(len(case.ids)):
            for slot in range(top_k):
                row = result[place[token * top_k + slot]]
                out[token] += row * case.weights[token, slot]
        return out

    torch.testing.assert_close(loops(), case.run(), rtol=1e-3, atol=1e-3)
    benchmark.pedantic(loops, rounds=3)


def test_loops_over_slots(benchmark, case):
    """The plainest reference: one row times one expert's matrices, slot by slot."""
    w1, w2 = case.tensors()
    half = w2.shape[2]

    def loops():
        out = torch.zeros_like(case.x)
        for token in range(len(case.ids)):
            for slot in range(case.ids.shape[1]):
                expert = case.ids[token, slot]
                y = w1[expert] @ case.x[token]
                y = w2[expert] @ (torch.nn.functional.silu(y[:half]) * y[half:])
                out[token] += case.weights[token, slot] * y
        return out

    benchmark.pedantic(loops, rounds=2)


GROWTH = {
    "base": (128, 32, 512, 256, 4),
    "4x tokens": (512, 32, 512, 256, 4),
    "4x experts": (128, 128, 512, 256, 4),
    "2x hidden": (128, 32, 1024, 256, 4),
}


@pytest.mark.benchmark(group="growth")
@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize("scheme", ["bf16", "nvfp4"])
def test_growth(benchmark, scheme, growth):
    benchmark(Case(*GROWTH[growth], scheme).run)


@pytest.mark.benchmark(group="schemes")
@pytest.mark.parametrize("scheme", sorted(COMPUTED_SCHEMES))
def test_scheme(benchmark, scheme):
    benchmark(Case(*GROWTH["base"], scheme).run)


@pytest.mark.benchmark(group="error bars")
@pytest.mark.parametrize("scheme", ["bf16", "nvfp4", "fp8_block"])
def test_error_bars(benchmark, scheme):
    """The float64 reference with its budget: what a comparison costs."""
    case = Case(*GROWTH["base"], scheme)
    benchmark(bounded_moe, case.x, case.experts, case.routing, case.layer)


FULL = {
    "deepseek-r1 nvfp4": ("nvfp4", 256, 7168, 2048, 8),
    "deepseek-r1 fp8_block": ("fp8_block", 256, 7168, 2048, 8),
    "llama-4-maverick nvfp4": ("nvfp4", 128, 5120, 8192, 1),
    "llama-4-maverick fp8_per_tensor": ("fp8_per_tensor", 128, 5120, 8192, 1),
}

_FULL = """
import resource, sys, time, torch
from pytest_moe_routing.logits import bell, distinct
from pytest_moe_routing.reference.moe import MoELayer, moe
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.weights import GeneratedExperts
from pytest_moe_routing.schemes import storage_of
scheme, (experts, hidden, inner, top_k) = sys.argv[1], map(int, sys.argv[2:])
layer = GeneratedExperts(experts, hidden, inner, storage_of(scheme).weight, intermediate_scale=0.01)
ids = distinct(16, experts, seed=2)[:, :top_k]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
moe(bell(16, hidden, seed=1), layer, Routing(ids, torch.ones(16, top_k)), MoELayer.of(scheme))
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(seconds, peak / 2**20, before / 2**20, ids.unique().numel())
"""


@pytest.mark.skipif("MOE_FULL" not in os.environ, reason="whole layers run with MOE_FULL=1")
@pytest.mark.parametrize("layer", FULL)
def test_full_layer(benchmark, layer):
    """16 tokens through a whole layer, in a process of its own: its peak memory is its own."""
    arguments = [sys.executable, "-c", _FULL, *map(str, FULL[layer])]

    def run():
        done = subprocess.run(arguments, check=True, capture_output=True, text=True)
        return [float(number) for number in done.stdout.split()]

    names = ("seconds", "peak GiB", "GiB before", "experts used")
    numbers = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(zip(names, numbers, strict=True))
    print(layer, benchmark.extra_info)
