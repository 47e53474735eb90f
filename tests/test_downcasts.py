"""What is rounded on the way to a kernel, and whether the kernel would have taken it as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_moe_routing import __version__
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.downcasts import avoidable_downcasts
from pytest_moe_routing.oracle.exact import Gate, kernel_call
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.target import Captured
from pytest_moe_routing.suite import test_downcasts as suite
from pytest_moe_routing.suite.causes import of_downcast
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

MODELS = load_models(packaged_directory())
NEWEST = known_releases()[-1]


class Rounds(BuiltinTarget):
    """Hands logits and bias over in bfloat16, as SGLang 0.5.15 did for FP8 per tensor."""

    name = "rounds"

    def gates(self, model, scheme, method):
        return (Gate("anything goes", True),)

    def capture(self, model, scheme, method):
        call = kernel_call(model.router, scheme, method, self.flashinfer)
        rounded = ["logits"] if model.router.logits_dtype == "float32" else ["gate"]
        if model.router.correction_bias:
            call = replace(call, bias_dtype="bfloat16")
            rounded.append("bias")
        downcasts = (Finding(Kind.DOWNCAST, what, "float32", "bfloat16") for what in rounded)
        return Captured(replace(call, logits_dtype="bfloat16"), tuple(downcasts))


@pytest.mark.parametrize(
    ("model", "scheme", "release", "lost"),
    [
        # The kernel without groups adds the bias in float32, the grouped one in bfloat16 itself.
        ("minimax-m2", "nvfp4", NEWEST, ["logits", "bias"]),
        ("deepseek-r1", "nvfp4", NEWEST, ["logits"]),
        # What launchers refuse is not lost needlessly.
        ("kimi-k2.5", "mxint4", "0.6.17", ["logits"]),
        ("kimi-k2.5", "mxint4", "0.6.18", ["logits", "bias"]),
        ("qwen3-235b-a22b", "fp8_block", "0.6.7", []),
        ("qwen3-235b-a22b", "fp8_block", "0.6.8", ["gate"]),
    ],
)
def test_only_what_the_kernel_takes_is_lost(model, scheme, release, lost):
    found = judge(Rounds(FlashInfer.of(release)), MODELS[model], scheme)
    assert found.verdict == "exact"
    assert [downcast.field for downcast in avoidable_downcasts(found)] == lost


def test_the_message_counts_tokens_that_get_other_experts():
    found = judge(Rounds(FlashInfer.of(NEWEST)), MODELS["glm-5.2"], "nvfp4")
    bias = next(d for d in avoidable_downcasts(found) if d.field == "bias")
    text = "\n".join(of_downcast(found, bias).lines)
    assert text.startswith(
        f"glm-5.2 on nvfp4, decided by rounds {__version__}, FlashInfer {NEWEST}: less precise than the"
    )
    assert "because  the float32 bias is downcast to bfloat16 before the call" in text
    assert "64.8% of the tokens of the logits pattern 'narrow-bias', which get other exp" in text
    assert "kernel   DeepSeekV3 accepts float32 without loss" in text


def test_nothing_rounded_is_nothing_lost():
    found = judge(BuiltinTarget(FlashInfer.of(NEWEST)), MODELS["glm-5.2"], "nvfp4")
    assert avoidable_downcasts(found) == []


def test_the_suite_asks_recorded_calls_only(host):
    models = ("--moe-models", "minimax-m2", "--moe-schemes", "nvfp4,mxfp8")
    run = ("--moe-golden", "-k", "test_downcasts", "-rs", *models)
    result = host.runpytest_subprocess(*run, "--moe-target", "test_downcasts:Rounds")
    counts = result.parseoutcomes()
    # Logits and bias are two causes; the other scheme has the same ones.
    assert (counts["failed"], counts["repeated"]) == (1, 1)
    result.stdout.fnmatch_lines(
        [
            f"_*minimax-m2 on nvfp4, decided by rounds {__version__}, *: less precise than the kernel*"
        ]
    )
    result.stdout.fnmatch_lines(["  also     1 more: minimax-m2 mxfp8"])
    other = host.runpytest_subprocess(*run, "--moe-target", "miniatures:LosesScale")
    other.assert_outcomes(skipped=2, deselected=other.parseoutcomes()["deselected"])
    other.stdout.fnmatch_lines([f"SKIPPED*loses-scale {__version__}: its calls are not recorded"])
    # Our own calls are what the model says: there is nothing to ask.
    result = host.runpytest_subprocess(*run)
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_call_without_a_result_is_skipped_with_its_verdict():
    """Before 0.6.8, a launcher read bfloat16 logits as float32: what it computed is undefined."""
    target = Rounds(FlashInfer.of("0.6.7"))
    with pytest.raises(pytest.skip.Exception) as skipped:
        suite.test_downcasts(target, MODELS["deepseek-r1"], "bf16", lambda *_: None)
    assert str(skipped.value) == "there is no result of a fused kernel: the verdict is wrong"
