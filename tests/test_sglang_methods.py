"""Which methods of layers of experts lose the routed scaling factor, read from their source."""

from __future__ import annotations

import ast

import pytest

from pytest_moe_routing.targets.sglang.probe.methods import lost_factors

APPLY = """
class Fp4MoEMethod:
    def apply(self, layer, x, topk_output, routed_scaling_factor=None):
        {body}
"""
WITH_CONFIG = """
class Wna16MoEMethod:
    def create_moe_runner(self, layer, moe_runner_config):
        self.moe_runner_config = moe_runner_config

    def apply(self, layer, dispatch_output):
        {body}
"""


def lost(source, body):
    text = source.format(body=body.replace("\n", "\n        "))
    return [
        (run["function"], deviation["cause"])
        for run in lost_factors({"quantization/some.py": ast.parse(text)})
        for deviation in run["deviations"]
    ]


def before(returned):
    return f"the routed scaling factor is not used before {returned} is returned"


@pytest.mark.parametrize(
    ("body", "returned"),
    [
        ("return cutlass(x, layer.w13)", ["cutlass"]),
        ("if fast:\n    return\nreturn triton(x, routed_scaling_factor)", ["nothing"]),
        ("return triton(x, routed_scaling_factor=routed_scaling_factor)", []),
        ("y = cutlass(x)\ny *= routed_scaling_factor\nreturn y", []),
        ("routed_scaling_factor = 1.0\nreturn cutlass(x)", ["cutlass"]),
        # A factor of None is no factor.
        ("if routed_scaling_factor is not None:\n    x *= routed_scaling_factor\nreturn x", []),
        # One of two backends loses it.
        ("if fast:\n    return cutlass(x)\nreturn triton(x, routed_scaling_factor)", ["cutlass"]),
        ("with memory():\n    y = cutlass(x)\nreturn y[0]", ["y[0]"]),
        # Other devices, and what never returns.
        ("if use_intel_amx_backend(layer):\n    return cpu(x)\nraise ValueError", []),
        ("if fast:\n    from aiter import moe\n    return moe(x)\nreturn layer.run(x)", []),
        # What is given the layer finds the factor there.
        ("return scheme.apply_weights(layer, x)", []),
        ("return layer.run_moe(x)", []),
        ("return run_moe(layer.w13, x)", ["run_moe"]),
    ],
)
def test_each_way_to_return_uses_the_factor(body, returned):
    assert lost(APPLY, body) == [("Fp4MoEMethod.apply", before(each)) for each in returned]


@pytest.mark.parametrize(
    ("body", "returned"),
    [
        ("return marlin(x, self.moe_runner_config.activation)", ["marlin"]),
        ("return marlin(x, factor=self.moe_runner_config.routed_scaling_factor)", []),
        ("return marlin(x, self.moe_runner_config)", []),
        ("return self.runner.run(dispatch_output, quant_info)", []),
    ],
)
def test_a_config_that_is_handed_on_has_the_factor(body, returned):
    assert lost(WITH_CONFIG, body) == [("Wna16MoEMethod.apply", before(each)) for each in returned]


def test_methods_of_other_devices_or_without_a_factor_are_not_read():
    body = "return cutlass(x)"
    for name in ("NPU_W8A8MoEMethod", "AWQMoEAscendMethod", "Mxfp4DynamicQuantMoEMethod"):
        assert lost(APPLY.replace("Fp4MoEMethod", name), body) == []
    assert lost(APPLY.replace("routed_scaling_factor", "inplace"), body) == []
    # No word of a device, but the name of what is returned.
    assert lost(APPLY, "return StandardCombineInput(hidden_states=x)")


def test_the_answer_says_where():
    (run,) = lost_factors({"quantization/some.py": ast.parse(APPLY.format(body="return f(x)"))})
    assert run["deviations"][0]["text"] == "quantization/some.py:4 returns without it"
    assert run["reach"] == "opt-in"
