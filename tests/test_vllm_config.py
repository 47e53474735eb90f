"""What vLLM's quantization config is told of a layer in each scheme."""

from __future__ import annotations

import pytest
import torch

from pytest_moe_routing.targets.vllm.probe import config
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES

SILU = {"experts": {"activation": "silu"}}
GPT_OSS = {
    "experts": {
        "activation": "swigluoai",
        "activation_alpha": 1.702,
        "activation_beta": 1.0,
        "activation_limit": 7.0,
    }
}
WEIGHTS = {"w1_scale", "w2_scale"}
#: Where the scales of weights are not swizzled, the config says so.
SCALED = {*WEIGHTS, "is_scale_swizzled", "is_nvfp4_scale_swizzled"}
#: By scheme: what quantizes activations and weights, the block, and what else the config has.
TOLD = {
    "fp8_block": (torch.float8_e4m3fn, None, [128, 128], SCALED),
    "fp8_per_tensor": (torch.float8_e4m3fn, None, None, {*SCALED, "a1_scale", "a2_scale"}),
    "mxfp8": ("mxfp8", None, [1, 32], SCALED),
    "nvfp4": (
        "nvfp4",
        None,
        None,
        {*SCALED, "g1_alphas", "g2_alphas", "a1_gscale", "a2_gscale"},
    ),
    "bf16": (None, None, None, set()),
    "mxfp4": ("mxfp8", "mxfp4", None, SCALED),
    "mxint4": (None, "int4", [0, 32], SCALED),
}


class Release:
    """A release whose quantization config is a plain mapping, and takes everything."""

    def get(self, key):
        return dict

    def accepted(self, key, arguments):
        return arguments


@pytest.fixture(autouse=True)
def _release(monkeypatch):
    monkeypatch.setattr(config, "names", Release)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme(scheme):
    told = config.quant_config(SCHEMES[scheme], 4, SILU, None)
    *formats, more = TOLD[scheme]
    assert [told.pop(key) for key in ("quant_dtype", "weight_dtype", "block_shape")] == formats
    assert told.keys() == more
    # Scales of activations are one number, all others one for each expert; all of them are 1.
    scales = {key: value for key, value in told.items() if not key.startswith("is_")}
    for key, value in scales.items():
        assert torch.equal(value.float(), torch.ones(() if key in ("a1_scale", "a2_scale") else 4))
    wanted = torch.bfloat16 if scheme == "mxint4" else torch.float32
    assert {scales[key].dtype for key in WEIGHTS & scales.keys()} <= {wanted}
    assert not any(told[key] for key in told.keys() - scales.keys())


@pytest.mark.parametrize("scheme", ["fp8_block", "bf16"])
def test_scales_by_block(scheme):
    told = config.quant_config(SCHEMES[scheme], 4, SILU, None, by_block=True)
    shapes = {tuple(told[key].shape) for key in WEIGHTS & told.keys()}
    assert shapes == ({(4, 1, 1)} if scheme == "fp8_block" else set())


@pytest.mark.parametrize(
    ("model", "limit", "expected"),
    [
        (SILU, None, {}),
        (SILU, 10.0, {"gemm1_clamp_limit": 10.0}),
        (GPT_OSS, None, {"gemm1_alpha": 1.702, "gemm1_beta": 1.0, "gemm1_clamp_limit": 7.0}),
    ],
)
def test_parameters_of_the_activation(model, limit, expected):
    told = config.quant_config(SCHEMES["bf16"], 4, model, limit)
    assert {key: value for key, value in told.items() if key.startswith("gemm1_")} == expected
