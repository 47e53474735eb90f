"""What the quantization config of vLLM's CUTLASS experts is told in each scheme."""

from __future__ import annotations

import pytest
import torch

from pytest_moe_routing.targets.vllm.probe import config
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES

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
    told = config.quant_config(SCHEMES[scheme], 4)
    *formats, more = TOLD[scheme]
    assert [told.pop(key) for key in ("quant_dtype", "weight_dtype", "block_shape")] == formats
    assert told.keys() == more
    # Scales of activations are one number, those of weights are blocks, all others are one for each
    # expert; all of them are 1.
    scales = {key: value for key, value in told.items() if not key.startswith("is_")}
    shapes = {"a1_scale": (), "a2_scale": (), "w1_scale": (4, 1, 1), "w2_scale": (4, 1, 1)}
    for key, value in scales.items():
        assert torch.equal(value.float(), torch.ones(shapes.get(key, 4)))
    wanted = torch.bfloat16 if scheme == "mxint4" else torch.float32
    assert {scales[key].dtype for key in WEIGHTS & scales.keys()} <= {wanted}
    assert not any(told[key] for key in told.keys() - scales.keys())
