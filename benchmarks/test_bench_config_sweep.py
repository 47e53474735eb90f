"""How fast the oracle is: routers per second, for all methods of a scheme, and whole verdicts."""

from __future__ import annotations

import pytest

from pytest_moe_routing.compare.equivalence import _token, counterexample
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.oracle.config_sweep import CachedTarget, sweep, swept_routers
from pytest_moe_routing.oracle.exact import same_calls
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets.builtin.target import BuiltinTarget


@pytest.mark.benchmark(group="config sweep")
@pytest.mark.parametrize("scheme", ["fp8_block", "nvfp4"])
def test_same_calls(benchmark, scheme):
    """Which methods mean what a router means, within their limits."""
    flashinfer, routers = FlashInfer.of(known_releases()[-1]), swept_routers()

    def ask_all():
        return sum(len(same_calls(router, scheme, flashinfer)) for router in routers)

    assert benchmark(ask_all) > 1000
    benchmark.extra_info["routers per second"] = len(routers) / benchmark.stats.stats.median


@pytest.mark.benchmark(group="config sweep")
def test_sweep(benchmark):
    """The whole config sweep judged on one scheme."""
    target = CachedTarget(BuiltinTarget(FlashInfer.of(known_releases()[-1])))
    assert not benchmark(sweep, target, "nvfp4", ()).causes
    benchmark.extra_info["verdicts per second"] = (
        len(swept_routers()) / benchmark.stats.stats.median
    )


@pytest.mark.benchmark(group="config sweep")
def test_counterexample(benchmark):
    """The smallest token for a forgotten scaling factor, not remembered."""
    wanted = Recipe(top_k=8, score="sigmoid", bias=True, normalize="sum", scale=3.0)
    got = Recipe(top_k=8, score="sigmoid", bias=True, normalize="sum")

    def find():
        _token.cache_clear()
        return counterexample(wanted, got, 288)

    assert benchmark(find).num_experts == 8
