"""NVFP4 with a scale for each token: the format, and what the simulated kernel makes of it."""

import torch
from good_calls import FLASHINFER, good_call

from pytest_moe_routing.logits import loud
from pytest_moe_routing.reference.quantization import dequantize, quantize
from pytest_moe_routing.simulator.simulator import Simulator


def run(function, given, **changed):
    (output,) = getattr(Simulator(FLASHINFER), function)(**{**given, **changed})
    return output


def test_each_row_is_quantized_as_if_alone():
    x = loud(5, 64, seed=3)
    whole = quantize(x, "nvfp4_token")
    assert whole.global_scale.shape == (5, 1)
    for i in range(5):
        alone = quantize(x[i : i + 1], "nvfp4")
        assert torch.equal(whole.data[i : i + 1], alone.data)
        assert torch.equal(dequantize(whole)[i : i + 1], dequantize(alone))


def test_a_token_scale_belongs_to_its_token():
    function, given = good_call("nvfp4_per_token")
    assert given["per_token_scale"].shape == (5,)
    output = run(function, given)
    scale = given["per_token_scale"].clone()
    scale[3] *= 2
    changed = (run(function, given, per_token_scale=scale) != output).any(1)
    assert changed.tolist() == [False, False, False, True, False]
    # A factor of two is the same in either scale.
    halved = given["hidden_states_scale"].to(torch.float32) / 2
    moved = run(
        function,
        given,
        per_token_scale=2 * given["per_token_scale"],
        hidden_states_scale=halved.to(torch.float8_e4m3fn),
    )
    assert torch.equal(moved, output)


def test_no_static_scale_limits_the_intermediate():
    """NVFP4's own intermediate saturates beyond its static scale; that of each token does not."""
    function, given = good_call("nvfp4_per_token")
    louder = run(function, given, per_token_scale=2.0**12 * given["per_token_scale"])
    assert louder.isfinite().all()
    assert float(louder.abs().max()) > 2.0**20 * float(run(function, given).abs().max())
