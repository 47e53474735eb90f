"""Which hand-overs from SGLang's quantization methods to kernels are found and reached."""

from __future__ import annotations

import pytest
from sglang_targets import opened
from wheels import unpack, wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.sglang.hand_overs import HandOver, hand_overs, is_by

RUNNER = """
class FlashInferNewMoeQuantInfo(MoeQuantInfo):
    weight: object

class Parameters(Base):
    limit: float

def run_new(x, quant_info):
    from flashinfer.fused_moe import trtllm_new_moe
    return trtllm_new_moe(x, quant_info.weight)
"""
METHODS = """
from flashinfer.fused_moe import cutlass_fused_moe, shuffle_weights
from sglang.srt.layers.moe.moe_runner.flashinfer_new import FlashInferNewMoeQuantInfo, run_new

class NewMoEMethod:
    def apply(self, layer, x):
        return self.runner.run(x, FlashInferNewMoeQuantInfo(layer.weight))

class DirectMoEMethod:
    def apply(self, layer, x):
        call = cutlass_fused_moe if layer.fast else run_new
        return call(x, layer.weight)

class PreparingMoEMethod:
    def process_weights_after_loading(self, layer):
        layer.weight = shuffle_weights(layer.weight)
"""
FACTOR = """
class MarlinMoEMethod:
    fuse_routed_scaling_factor_in_topk = True

    def apply(self, layer, x):
        return self.runner.run(x, MarlinMoeQuantInfo(layer.weight))
"""
FOUND = {
    ("DirectMoEMethod", "cutlass_fused_moe"): 11,
    ("DirectMoEMethod", "run_new"): 11,
    ("MarlinMoEMethod", "fuse_routed_scaling_factor_in_topk"): 3,
    ("NewMoEMethod", "FlashInferNewMoeQuantInfo"): 7,
}


def write(root, name, text):
    path = root / "sglang/srt/layers" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_method_that_nobody_has_listed_is_found(tmp_path):
    write(tmp_path, "moe/moe_runner/flashinfer_new.py", RUNNER)
    write(tmp_path, "quantization/new.py", METHODS)
    write(tmp_path, "quantization/marlin.py", FACTOR)
    found = hand_overs(tmp_path)
    assert {(each.owner, each.given): line for each, line in found.items()} == FOUND
    write(tmp_path, "quantization/new.py", f"{METHODS}\nclass")
    with pytest.raises(Unsupported, match="cannot be parsed"):
        hand_overs(tmp_path)


def test_a_kernel_is_called_for_what_its_callers_hand_on():
    by = HandOver("a.py", "Method", "QuantInfo")
    assert is_by(by, {"owners": [["a.py", "Method"]], "given": ["kernel", "QuantInfo"]})
    assert not is_by(by, {"owners": [["a.py", "Method"]], "given": ["kernel", "OtherInfo"]})
    assert not is_by(by, {"owners": [["b.py", "Method"]], "given": ["QuantInfo"]})
    decides = HandOver("a.py", "Method", "fuse_routed_scaling_factor_in_topk")
    assert is_by(decides, {"owners": [["a.py", "Method"]], "given": ["kernel"]})


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    wheels = wheels_since("0.5.18", "sglang")
    root = unpack(wheels[-1], tmp_path_factory.mktemp("sglang")) if wheels else None
    if root is not None:
        write(root, "moe/moe_runner/flashinfer_new.py", RUNNER)
        write(root, "quantization/new.py", METHODS)
    yield from opened(root)


def test_what_no_test_reaches_is_not_judged(target):
    found = target.methods_run()
    told = {reason.split(" ", 1)[1] for reason in found.unanswered}
    reached = ", FlashInferTrtllmFp8MoeQuantInfo", ", FlashInferCutlassMoeQuantInfo"
    assert not [text for text in told if any(name in text for name in reached)]
    unknown = "no checkpoint, runner and GPU that is asked about reaches it"
    assert f"NewMoEMethod, FlashInferNewMoeQuantInfo: {unknown}" in told
    assert (
        "FusedMoEWithLoRA, should_fuse_routed_scaling_factor_in_topk: adapters are not asked about"
        in told
    )
    assert found.answered > 12
