"""What SGLang's own router makes of the config sweep, so that no kernel is blamed for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from sglang_targets import oldest_and_newest, opened

from pytest_moe_routing.oracle.config_sweep import CachedTarget, sweep
from pytest_moe_routing.oracle.swept_configs import as_model, swept_models, swept_routers

LLAMA4 = [router for router in swept_routers(1) if router.weight_on == "input"]
SCALED = next(router for router in LLAMA4 if router.routed_scaling_factor != 1.0)


@pytest.fixture(scope="module", **oldest_and_newest())
def target(request):
    for made in opened(request.param):
        yield CachedTarget(made)


def test_what_llama_4s_router_does_not_read(target):
    """`Llama4MoE` gives its TopK no factor (models/llama4.py)."""
    plain, scaled = target.read_routers([as_model(LLAMA4[0]), as_model(SCALED)])
    assert plain == LLAMA4[0]
    assert scaled == replace(SCALED, routed_scaling_factor=1.0)


def test_what_sglang_cannot_be_asked(target):
    models = list(swept_models())
    other, half = (
        next(m for m in models if m.router.weight_on == "input" and condition(m))
        for condition in (
            lambda m: m.experts.activation_limit is not None,
            lambda m: m.dtype == "float16",
        )
    )
    plain = next(m for m in models if m.router.weight_on == "output")
    reasons = map(str, target.read_routers([other, half, plain]))
    for reason, expected in zip(
        reasons, ("has other experts than", "only in bfloat16", "no AnyMoeFor"), strict=True
    ):
        assert expected in reason


def test_no_cause_is_one_of_what_the_router_does_not_read(target):
    found = sweep(target, "nvfp4", (), [*LLAMA4[:4], SCALED])
    assert found.causes
    fields = {field for cause in found.causes for field in cause.fields}
    assert not {name for kind, name in fields if kind == "recipe"} - {"weight_on", "weigh_by"}
