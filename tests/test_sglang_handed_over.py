"""Calls of SGLang that are given the experts and weights of its own router."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from sglang_targets import oldest_and_newest, opened

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.formats import unlike_formats
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.suite.causes import of_format, of_modular_call
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.sglang.handed_over import findings_of
from pytest_moe_routing.targets.sglang.probe.calls import Call
from pytest_moe_routing.targets.sglang.probe.handed_over import handed_over
from pytest_moe_routing.targets.sglang.probe.world import packed, requested

MODELS = load_models(packaged_directory())
MINIMAX = MODELS["minimax-m2"]
ROUNDED = "the float32 router weights are downcast to bfloat16 before the call"


@pytest.fixture(scope="module", **oldest_and_newest())
def target(request):
    yield from opened(request.param)


def test_release_hands_over_what_its_router_chose(target):
    """SGLang packs ids and weights up to 0.5.19 (moe_runner/flashinfer_trtllm.py, PR 33631)."""
    (gate,) = target.modular_gates(MINIMAX, "nvfp4", "MiniMax2")
    assert gate.ok
    found = target.modular_findings(MINIMAX, "nvfp4")
    packs = Version(target.version()) < Version("0.5.20")
    assert list(sentences(found)) == [ROUNDED] * packs
    # The line that calls the kernel.
    assert all(re.search(r", sglang/srt/layers/\S+\.py:\d+$", each.where) for each in found)
    assert target.choice(MINIMAX, "nvfp4", "MiniMax2", modular=True).switches == ()


def test_a_published_checkpoint_of_mixed_precision_has_another_default(target):
    """Of MiniMax-M3 in NVFP4, the other layers are MXFP8 (arg_groups, _minimax_m3_overrides)."""
    model = MODELS["minimax-m3"]
    if Version(target.version()) < Version("0.5.18"):
        with pytest.raises(Unsupported, match="chooses runners in a way that the probe does not"):
            target.choice(model, "nvfp4", "MiniMax2", modular=True)
        return
    (gate,) = target.modular_gates(model, "nvfp4", "MiniMax2")
    assert gate.ok
    packs = Version(target.version()) < Version("0.5.20")
    assert list(sentences(target.modular_findings(model, "nvfp4"))) == [ROUNDED] * packs
    assert target.choice(model, "nvfp4", "MiniMax2", modular=True).switches == ()


def test_release_is_asked_about_its_default_alone(target):
    (gate,) = target.modular_gates(MODELS["deepseek-r1"], "fp8_block", "DeepSeekV3")
    assert (gate.ok, gate.reason) == (False, "the kernel routes")
    (gate,) = target.modular_gates(MODELS["grok-1"], "bf16", "Default")
    assert (gate.ok, gate.reason) == (False, "the server's default is auto")


def test_default_runner_runs_what_it_does_not_route(target, monkeypatch):
    """Its kernel for bfloat16 has no gelu, and no gate says so before the forward pass."""
    gemma = MODELS["gemma-4-26b-a4b"]
    monkeypatch.setattr(target, "_server_runner", lambda model, scheme: "flashinfer_trtllm")
    (gate,) = target.modular_gates(gemma, "bf16", "Unspecified")
    assert gate.ok
    (finding,) = target.modular_findings(gemma, "bf16")
    assert (finding.kind, finding.where) == (Kind.RAISED, "forward")
    assert "got 'gelu'" in finding.got
    # The verdict agrees, although no kernel routes for the model.
    record = judge(target, gemma, "bf16").record()
    assert (record.verdict, record.by_default, record.fails) == (Verdict.CRASH, True, True)
    assert "got 'gelu'" in record.findings[0].got
    where = "flashinfer_trtllm.py-fused_experts_none_to_flashinfer_trtllm_bf16"
    assert record.cause == f"crash:raised-AssertionError-in-{where}"
    # Another finding about that call is no crash.
    assert judge(target, MINIMAX, "nvfp4").verdict is not Verdict.CRASH


def test_a_runner_that_is_named_and_cannot_be_given_what_another_router_chose(target, monkeypatch):
    """SGLang's router serves the model by default; the layer for MXINT4 reads router logits."""
    step = MODELS["step-3.5-flash"]
    record = judge(target, step, "mxint4").record()
    assert (record.verdict, record.by_default, record.fails) == (Verdict.CRASH, False, True)
    assert record.opt_in == ("--moe-runner-backend flashinfer_trtllm",)
    where = "compressed_tensors_w4a4_mxint4_moe.py-apply_weights"
    assert record.cause == f"crash:raised-AttributeError-in-{where}"
    assert record.findings[0].got.startswith("AttributeError: 'StandardTopKOutput' object has no")
    # A model whose code names no method is a cause of its own, as a gate may look at that.
    monkeypatch.setattr(target, "method_numbers", dict)
    assert judge(target, step, "mxint4").record().cause == f"{record.cause}:Renormalize"


def test_a_checkpoint_of_another_format_that_a_named_runner_does_not_serve(target):
    """Of the usual checkpoint, the runner serves the model with what SGLang's router chose."""
    model = MODELS["longcat-flash" if target.version() == "0.5.18" else "mixtral-8x22b"]
    [unlike] = unlike_formats(target, "nvfp4", [model]).unlike
    assert unlike.usual in (Verdict.FALLBACK, Verdict.MISSED)
    failure = of_format(unlike)
    where = "compressed_tensors_w4a4_nvfp4_moe.py-apply_weights"
    assert failure.cause == f"format:crash:raised-AssertionError-in-{where}:undeclared"
    told = "compressed-tensors; in the scheme's usual checkpoint, the verdict is "
    assert failure.lines[1] == f"  format   {told}{unlike.usual}"
    assert "assert layer.routing_method_type is not None" in unlike.record.findings[0].got


def test_checkpoints_that_no_kernel_of_flashinfer_serves(target):
    """By default their layers take Triton's runner; a server accepts TRT-LLM's by name."""
    [other] = target.served_elsewhere("fp8_per_channel").values()
    [call] = other.other_experts(MODELS["glm-4.5"], "fp8_per_channel")
    assert call.requests
    assert call.switches == ("--moe-runner-backend flashinfer_trtllm",)
    [text] = sentences(call.findings)
    assert text.startswith("forward: TypeError: Unexpected quant_info type for flashinfer_trtllm: ")
    # Of the server of Marlin's kernels, no runner of FlashInfer's is left.
    [other] = target.served_elsewhere("mxint4").values()
    [call] = other.other_experts(MODELS["glm-4.5"], "mxint4")
    assert (call.experts, call.findings) == ("none", ())
    assert not other.served_elsewhere("mxint4")
    assert not target.served_elsewhere("nvfp4")


def test_weights_of_less_precision_are_a_downcast(target):
    finding = Finding(Kind.DOWNCAST, "weights", "float32", "bfloat16", "trtllm_routed_moe")
    choice = target.choice(MINIMAX, "nvfp4", "MiniMax2", modular=True)
    failure = of_modular_call(target, MINIMAX, "nvfp4", (finding,), choice)
    assert (failure.rank, failure.cause) == (
        Rank.DOWNCAST,
        "modular-call:downcast-weights:trtllm_routed_moe",
    )
    crash = Finding(Kind.RAISED, "forward", None, "ValueError", "forward")
    assert of_modular_call(target, MINIMAX, "nvfp4", (crash,), choice).rank is Rank.LOUD
    both = of_modular_call(target, MINIMAX, "nvfp4", (finding, crash), choice)
    assert both.rank is Rank.SILENT


class Config:
    top_k = 2
    apply_routed_scaling_factor_on_output = False
    routed_scaling_factor = 3.0


class Folding(Config):
    """Of a router that multiplies its weights by the factor."""

    apply_routed_scaling_factor_on_output = True


def handed(give, scale=1.0, config=Config, **answer):
    """Run a block that gives a kernel what `give` makes of ids and weights."""
    calls = []

    def run():
        output = requested("router")(router_logits=torch.zeros(4, 8), topk_config=config())
        arguments = {"topk_ids": give(output.topk_ids, output.topk_weights)}
        calls[:] = [Call.of("trtllm_routed_moe", arguments)]
        said = {
            "refused": "given experts",
            "failed": None,
            "by_choice": True,
            "unprepared": [],
            "shared": 0,
            "scale_after": 1.0,
        }
        return {**said, **answer}

    names = Names(Contract.of("sglang"), "0.5.23", stubs.definitions("sglang", "nowhere"))
    names.get = lambda _: (
        lambda weights, ids, _: type("Out", (), {"topk_ids": ids, "topk_weights": weights})
    )
    return handed_over(names, run, SimpleNamespace(calls=calls, experts={}), scale)


def parts(answer):
    given = answer["arguments"]["topk_ids"]
    return [part.get("is") for part in (given if isinstance(given, list) else [given])]


def test_ids_and_weights_are_recognized():
    assert parts(handed(lambda ids, weights: (ids, weights))) == ["ids", "weights"]
    assert parts(handed(packed)) == ["packed"]
    # Step's code multiplies the weights by the factor itself.
    assert parts(handed(lambda ids, weights: (ids, weights * 3), scale=3.0)) == ["ids", "weights"]
    assert parts(handed(lambda ids, weights: packed(ids, weights * 3), scale=3.0)) == ["packed"]


def test_other_ids_and_weights_are_not():
    assert parts(handed(lambda ids, weights: (ids, weights * 3))) == ["ids", None]
    assert parts(handed(lambda ids, weights: (ids + 1, weights))) == [None, "weights"]
    assert parts(handed(lambda ids, weights: packed(ids, weights * 2))) == [None]


def test_the_factor_of_the_weights_is_told():
    """SGLang's router may have it, or Step's code, or what follows the kernel."""

    def scaled(ids, weights):
        return ids, weights * 3

    answers = [
        handed(lambda *chosen: chosen, scale=3.0),
        handed(scaled, scale=3.0),
        handed(packed, scale=3.0, config=Folding),
        handed(scaled, scale=3.0, config=Folding),
    ]
    assert [answer["router_factor"] for answer in answers] == [1.0, 3.0, 3.0, 9.0]


def test_a_block_that_hands_nothing_over():
    failed = {"failed": "raises", "raised_in": "ValueError-in-some.py-run"}
    assert handed(packed, **failed) == failed
    assert handed(packed, by_choice=False, refused=None) == {"refused": "the kernel routes"}
    found = findings_of(failed, MINIMAX, "nvfp4", FlashInfer.of("0.7.0"))
    (finding,) = found
    assert (finding.kind, finding.got, finding.where) == (Kind.RAISED, "raises", "forward")
    # Neither the line nor the message is part of it.
    assert finding.id == "raised-ValueError-in-some.py-run"


def test_a_release_without_the_question(target):
    with pytest.raises(Unsupported):
        target.modular_gates(MINIMAX, "fp8_per_channel", "MiniMax2")


def test_release_hands_the_choice_to_another_runner(target):
    """CUTLASS kernels had no parameters of the activation before 0.5.21."""
    m3 = MODELS["minimax-m3"]
    loses = Version(target.version()) < Version("0.5.21")
    lost = [
        "swiglu_alpha arrives as 1, the layer has 1.702",
        "swiglu_beta arrives as 0, the layer has 1",
        "swiglu_limit arrives as inf, the layer has 7",
    ]
    for scheme in ("nvfp4", "bf16", "fp8_per_tensor"):
        call, *more = target.other_experts(m3, scheme)
        named = [each for each in more if each.experts == "flashinfer_trtllm_routed runner"]
        assert list(sentences(call.findings)) == lost * loses
        # FP8 per tensor has no kernel that is given experts and weights. In NVFP4, the other runner
        # is the default.
        assert len(named) == (scheme == "bf16")
        assert call.switches == ("--moe-runner-backend flashinfer_cutlass",)
    (named,) = target.other_experts(m3, "fp8_block")
    assert named.switches == ("--moe-runner-backend flashinfer_trtllm_routed",)
    call, _ = target.other_experts(MODELS["gpt-oss-20b"], "bf16")
    assert "fc1_expert_biases arrives as none, the layer has its fc1 biases" in sentences(
        call.findings
    )
