"""Which experts a target takes by default, and what a selector does that its gates do not say."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.choice import Choice
from pytest_moe_routing.oracle.exact import Gate
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.record import Reach
from pytest_moe_routing.oracle.target import Captured
from pytest_moe_routing.report import matrix, terminal, text
from pytest_moe_routing.suite.causes import of_modular_call
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

MODELS = load_models(packaged_directory())
R1 = MODELS["deepseek-r1"]
FLAG = "--moe-backend flashinfer_trtllm"


class Chooses(BuiltinTarget):
    """Takes its experts when `switches` are on, whatever its gates say."""

    name = "chooses"
    switches: tuple[str, ...] | None = ()
    device: tuple[str, ...] = ()
    accepts = True

    def gates(self, model, scheme, method):
        return (Gate("shape", self.accepts, "odd"),)

    def choice(self, model, scheme, method, *, modular=False):
        return Choice("select", self.switches, "OtherExperts", self.device)

    def capture(self, model, scheme, method):
        return Captured(self.kernel_call(model, scheme, method))


def judged(**attributes):
    target = type("Target", (Chooses,), attributes)(FlashInfer.of("0.7.0"))
    return judge(target, R1, "fp8_block").record()


def test_what_is_taken_by_default():
    record = judged()
    assert (record.verdict, record.reach, record.opt_in) == ("exact", Reach.PUBLISHED, ())
    assert text.reach(record) == "a published checkpoint, by default"
    assert "  reach    a published checkpoint, by default" in text.story(record)


def test_what_is_taken_on_request_alone():
    record = judged(switches=("SWITCH=1", FLAG))
    assert (record.verdict, record.reach) == ("exact", Reach.OPT_IN)
    assert text.reach(record) == f"only with an opt-in switch: SWITCH=1, {FLAG}"


def test_a_choice_that_is_not_known():
    record = judged(choice=lambda *_, **__: None)
    assert (record.reach, record.by_default) == (Reach.PUBLISHED, False)
    assert text.reach(record) == "a published checkpoint"


def cannot_say(*_):
    raise Unsupported("the crystal ball is cloudy")


@pytest.mark.parametrize(
    ("answer", "reach", "is_default"),
    [
        (lambda *_: (), "a published checkpoint, by default", True),
        (lambda *_: (FLAG,), f"only with an opt-in switch: {FLAG}", False),
        (lambda *_: None, "a published checkpoint", False),
        (cannot_say, "a published checkpoint; it is not known whether by default", False),
    ],
)
def test_a_target_without_selectors_says_what_makes_it_take_its_experts(answer, reach, is_default):
    record = judged(choice=lambda *_, **__: None, opt_in=answer)
    assert (text.reach(record), record.by_default) == (reach, is_default)


def test_an_open_reach_is_told_with_its_reason_and_counted():
    record = judged(choice=lambda *_, **__: None, opt_in=cannot_say)
    assert "  open     the crystal ball is cloudy" in text.story(record)
    [line] = matrix.open_points([record, judged()])
    assert line.startswith("1 x it is not known who can reach the verdict: the crystal ball")
    told = ["".join(piece.text for piece in each) for each in terminal.summary([record], width=200)]
    assert line in told


def test_a_selector_that_never_takes_what_the_gates_accept():
    record = judged(switches=None)
    assert (record.verdict, record.fails) == ("missed", True)
    assert record.rejected_by == {
        "backend selection": "select never selects these experts, although their gates accept "
        "the layer: OtherExperts"
    }


def test_a_selector_that_takes_what_the_gates_reject():
    """The call is judged then, and the contradiction is wrong by itself."""
    record = judged(accepts=False)
    assert (record.verdict, record.fails) == ("wrong", True)
    assert list(text.sentences(record.findings)) == [
        "select selects the experts, although their gates reject the layer (shape)"
    ]
    assert record.kernel is not None


def test_a_selector_that_agrees_with_gates_that_reject():
    record = judged(accepts=False, switches=None)
    assert (record.verdict, record.rejected_by) == ("missed", {"shape": "odd"})
    assert (record.reach, record.fails) == (Reach.PUBLISHED, True)


def test_a_loss_that_needs_a_switch_does_not_fail():
    """vLLM's MXINT4 experts run on no device unless a variable is set."""
    record = judged(accepts=False, switches=None, device=("SWITCH=1",))
    assert (record.verdict, record.fails) == ("missed", False)
    assert text.reach(record) == "only with an opt-in switch: SWITCH=1"


WRONG = (
    Finding(Kind.APPLIED, "router weight", "once", "nowhere", "a.Method->kernel, rank 1 of 2"),
)


@pytest.mark.parametrize(
    ("choice", "reach", "rank"),
    [
        (None, "a published checkpoint", Rank.SILENT),
        (Choice("select", ()), "a published checkpoint, by default", Rank.SILENT),
        (Choice("select", (FLAG,)), f"only with an opt-in switch: {FLAG}", Rank.SILENT),
    ],
)
def test_who_reaches_a_wrong_call_of_modular_experts(choice, reach, rank):
    failure = of_modular_call(Chooses(FlashInfer.of("0.7.0")), R1, "nvfp4", WRONG, choice)
    assert failure.lines[1] == f"  reach    {reach}"
    assert failure.rank is rank
    assert failure.cause == "modular-call:applied-router-weight-nowhere:a.Method->kernel"


def test_a_weight_that_is_applied_otherwise_is_another_cause():
    """A number in it is that of an example."""
    texts = ("on the expert input and on the expert output", "with a factor of 6.25")
    ids = [replace(WRONG[0], got=text).id for text in texts]
    assert ids == [
        "applied-router weight-on the expert input and on the expert output",
        "applied-router weight",
    ]


def test_modular_experts_that_are_never_taken_are_one_line():
    choice = Choice("select", None, "OtherExperts")
    failure = of_modular_call(Chooses(FlashInfer.of("0.7.0")), R1, "nvfp4", WRONG, choice)
    assert failure.rank is Rank.LATENT
    assert failure.lines == (
        "deepseek-r1 on nvfp4: router weight is applied nowhere; the layer applies it once (never "
        "chosen: OtherExperts)",
    )


def test_a_call_that_ends_in_an_exception_is_loud():
    raised = (Finding(Kind.RAISED, "NotImplementedError", None, "not yet", "m.py:1"),)
    failure = of_modular_call(Chooses(FlashInfer.of("0.7.0")), R1, "nvfp4", raised, None)
    assert failure.rank is Rank.LOUD
