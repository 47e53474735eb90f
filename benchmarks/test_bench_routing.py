"""The routing reference and others, in one run: read the ratios, not the seconds.

pytest benchmarks/test_bench_routing.py --benchmark-only
"""

import importlib
import inspect
import math
import warnings

import pytest
import torch

from pytest_moe_routing.logits import bell, integers
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing.recipe import Recipe

TOKENS, EXPERTS, TOP_K, GROUPS, KEPT, WIDTH = 4096, 256, 8, 8, 4, 8

#: DeepSeek-R1's router.
RECIPE = Recipe(
    TOP_K,
    "sigmoid",
    bias=True,
    n_group=GROUPS,
    topk_group=KEPT,
    normalize="sum",
    scale=2.5,
    epsilon=1e-20,
)
PLAIN = Recipe(TOP_K, "sigmoid", normalize="sum")


@pytest.fixture(scope="module")
def bias():
    return integers(EXPERTS, seed=2, bits=16).to(torch.float32) / 2**18


@pytest.fixture(scope="module")
def logits():
    return bell(TOKENS, EXPERTS, seed=1)


@pytest.mark.benchmark(group="groups: 4096 tokens, 256 experts, top 8 of 4 of 8 groups")
class TestGroups:
    def test_reference(self, benchmark, logits, bias):
        benchmark(route, logits, RECIPE, bias)

    def test_sigmoid_and_topk(self, benchmark, logits):
        """What no implementation can do without."""
        benchmark(lambda: logits.sigmoid().topk(TOP_K))

    def test_loop_over_tokens_in_torch(self, benchmark, logits, bias):
        """As references of kernel test suites are written: tensors of one token, slot by slot."""
        size = EXPERTS // GROUPS

        def loop():
            ids = torch.empty(TOKENS, TOP_K, dtype=torch.int64)
            weights = torch.empty(TOKENS, TOP_K)
            for token in range(TOKENS):
                scores = logits[token].sigmoid()
                keys = scores + bias
                ranks = keys.view(GROUPS, size).topk(2).values.sum(1)
                open_ = torch.zeros(GROUPS, dtype=torch.bool)
                open_[ranks.topk(KEPT).indices] = True
                chosen = keys.masked_fill(~open_.repeat_interleave(size), -torch.inf).topk(TOP_K)
                total = scores[chosen.indices].sum() + 1e-20
                for slot in range(TOP_K):
                    ids[token, slot] = chosen.indices[slot]
                    weights[token, slot] = scores[chosen.indices[slot]] / total * 2.5
            return ids, weights

        ids, _ = loop()
        assert (ids == route(logits, RECIPE, bias).topk_ids).float().mean() > 0.999
        benchmark.pedantic(loop, rounds=2)

    def test_loop_over_tokens_in_python(self, benchmark, logits, bias):
        rows, biases = logits.tolist(), bias.tolist()
        size = EXPERTS // GROUPS

        def loop():
            ids, weights = [], []
            for row in rows:
                scores = [1 / (1 + math.exp(-z)) for z in row]
                keys = [s + b for s, b in zip(scores, biases, strict=True)]
                ranks = []
                for group in range(GROUPS):
                    best = sorted(keys[group * size : (group + 1) * size], reverse=True)
                    ranks.append(best[0] + best[1])
                kept = sorted(range(GROUPS), key=lambda g: -ranks[g])[:KEPT]
                open_ = [e for e in range(EXPERTS) if e // size in kept]
                chosen = sorted(open_, key=lambda e: -keys[e])[:TOP_K]
                total = sum(scores[e] for e in chosen) + 1e-20
                ids.append(chosen)
                weights.append([scores[e] / total * 2.5 for e in chosen])
            return torch.tensor(ids), torch.tensor(weights)

        ids, weights = loop()
        ours = route(logits, RECIPE, bias)
        assert (ids == ours.topk_ids).float().mean() > 0.999
        assert weights == pytest.approx(ours.topk_weights, rel=0.1)
        benchmark.pedantic(loop, rounds=2)

    def test_vllm(self, benchmark, logits, bias):
        """vLLM's torch fallback, which CPUs and tests use."""
        name = "vllm.model_executor.layers.fused_moe.router.grouped_topk_router"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = pytest.importorskip(name, exc_type=ImportError)
        grouped = inspect.unwrap(
            getattr(module.grouped_topk, "_torchdynamo_orig_callable", module.grouped_topk)
        )
        hidden = torch.zeros(TOKENS, 1)
        benchmark(
            lambda: grouped(
                hidden,
                logits,
                TOP_K,
                True,
                num_expert_group=GROUPS,
                topk_group=KEPT,
                scoring_func="sigmoid",
                routed_scaling_factor=2.5,
                e_score_correction_bias=bias,
            )
        )


@pytest.mark.benchmark(group="the same with the router's own linear layer of 8 inputs")
class TestRouter:
    def test_reference(self, benchmark, bias):
        hidden, weight = bell(TOKENS, WIDTH, seed=3), bell(EXPERTS, WIDTH, seed=4)
        benchmark(lambda: route(torch.nn.functional.linear(hidden, weight), RECIPE, bias))

    def test_transformers(self, benchmark, bias):
        name = "transformers.models.deepseek_v3"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            modeling = pytest.importorskip(f"{name}.modeling_deepseek_v3", exc_type=ImportError)
            config = importlib.import_module(f"{name}.configuration_deepseek_v3")
        router = modeling.DeepseekV3TopkRouter(
            config.DeepseekV3Config(
                hidden_size=WIDTH,
                num_local_experts=EXPERTS,
                n_routed_experts=EXPERTS,
                n_group=GROUPS,
                topk_group=KEPT,
                num_experts_per_tok=TOP_K,
            )
        )
        router.weight.data = bell(EXPERTS, WIDTH, seed=4)
        router.e_score_correction_bias.data = bias
        hidden = bell(TOKENS, WIDTH, seed=3)
        with torch.no_grad():
            benchmark(router, hidden)


@pytest.mark.benchmark(group="no groups: 4096 tokens, 256 experts, top 8")
class TestNoGroups:
    def test_reference(self, benchmark, logits):
        benchmark(route, logits, PLAIN)

    def test_sigmoid_and_topk(self, benchmark, logits):
        benchmark(lambda: logits.sigmoid().topk(TOP_K))


@pytest.mark.benchmark(group="growth, no groups")
@pytest.mark.parametrize(
    ("tokens", "experts"), [(1024, 256), (4096, 256), (16384, 256), (4096, 64)]
)
def test_growth(benchmark, tokens, experts):
    benchmark(route, bell(tokens, experts, seed=1), PLAIN)
