"""What a server asks of fused experts besides routing, and who hears of a request that is ignored."""

from __future__ import annotations

from collections import Counter

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.around import Answer, Request, Response, read
from pytest_moe_routing.oracle.exact import Gate
from pytest_moe_routing.oracle.ignored import Ignored, Requests, ignored_requests
from pytest_moe_routing.report.unanswered import AROUND, CONCERNED, PROPERTY, Unanswered, note
from pytest_moe_routing.suite.ignored import of_ignored
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

MODELS = load_models(packaged_directory())
LOST = Response(Answer.IGNORED, "the kernel is given logical experts", ("--enable-eplb",))
KEPT = Response(Answer.HONORED, "routing_replay_out")


class Requested(BuiltinTarget):
    """Accepts all but Llama 4, and ignores the placement for DeepSeek alone."""

    name = "requested"

    def gates(self, model, scheme, method):
        return (Gate("model", not model.id.startswith("llama"), "Llama"),)

    def around(self, model, scheme, method):
        if model.id == "minimax-m2":
            raise Unsupported("not this model")
        placed = LOST if model.id.startswith("deepseek") else Response(Answer.REJECTED, "a gate")
        return {Request.BALANCING: placed, Request.CAPTURE: KEPT}


TARGET = Requested(FlashInfer.of("0.7.0"))


def ignored(*ids):
    return ignored_requests(TARGET, "fp8_block", [MODELS[name] for name in ids])


def test_what_is_ignored_is_told_once_with_its_models():
    found = ignored("deepseek-r1", "glm-5", "llama-4-scout", "deepseek-v3", "minimax-m2")
    assert found.ignored == (Ignored(Request.BALANCING, LOST, ("deepseek-r1", "deepseek-v3")),)
    assert (found.answered, found.unanswered) == (3, {"not this model": 1})
    assert ignored("glm-5").ignored == ()


def test_experts_that_accept_no_model_are_not_asked():
    assert ignored("llama-4-scout") == Requests((), 0, Counter())


def test_a_target_that_cannot_be_asked():
    assert ignored("minimax-m2", "llama-4-scout") == Requests((), 0, Counter({"not this model": 1}))
    builtin = BuiltinTarget(FlashInfer.of("0.7.0"))
    found = ignored_requests(builtin, "fp8_block", [MODELS["glm-5"], MODELS["deepseek-r1"]])
    reason = "builtin answers no questions about requests besides routing"
    assert found.unanswered == {reason: 2}


def test_a_run_counts_the_models_that_have_no_answer():
    """Those of every test, under one sentence for each question."""
    run, properties = Unanswered(), {}
    assert not run
    for scheme in ("fp8_block", "nvfp4"):
        found = ignored_requests(TARGET, scheme, [MODELS["minimax-m2"], MODELS["glm-5"]])
        note(properties.__setitem__, {AROUND: found.unanswered, CONCERNED: {}})
        run.add(properties)
    first = "around kernel calls: 2 cases are not judged"
    assert [*run.lines(every=False)] == [f"{first}; -v lists the reasons"]
    assert [*run.lines(every=True)] == [first, "  2 x not this model"]
    one = Unanswered()
    one.add({PROPERTY: {CONCERNED: {"not this model": 1}}})
    concerned = "config sweep: 1 model is not compared"
    assert [*one.lines(every=True)] == [concerned, "  1 x not this model"]


def test_the_failure_names_who_asks():
    failure = of_ignored(TARGET, "nvfp4", Ignored(Request.BALANCING, LOST, ("deepseek-r1",)))
    assert failure.rank is Rank.SILENT
    assert failure.cause == "ignored:expert-placement-by-load-(EPLB)"
    assert failure.lines[1:] == (
        "  reach    only with an opt-in switch: --enable-eplb",
        "  because  the kernel is given logical experts",
        "  models   deepseek-r1",
    )


def test_a_request_that_fails_in_the_forward_pass_is_loud():
    raised = "NotImplementedError: placed experts (layers/moe/topk.py:418)"
    failed = Response(
        Answer.FAILED, raised, ("--enable-eplb",), "", "NotImplementedError-in-topk.py-forward"
    )
    failure = of_ignored(TARGET, "nvfp4", Ignored(Request.BALANCING, failed, ("deepseek-r1",)))
    assert (failure.rank, failure.cause) == (
        Rank.LOUD,
        "fails:expert-placement-by-load-(EPLB):NotImplementedError-in-topk.py-forward",
    )
    assert failure.lines == (
        f"{TARGET}, experts for nvfp4: expert placement by load (EPLB) fails in the forward pass",
        "  reach    only with an opt-in switch: --enable-eplb",
        f"  because  {raised}",
        "  models   deepseek-r1",
    )


def test_a_failure_and_a_request_that_is_not_judged_are_told():
    raised = "NotImplementedError: placed experts (layers/moe/topk.py:418)"
    failed = Response(Answer.FAILED, raised, ("--enable-eplb",))
    unknown = Response(Answer.NOT_JUDGED, "no such stand-in")

    class Failing(Requested):
        def around(self, model, scheme, method):
            return {Request.BALANCING: failed, Request.CAPTURE: unknown}

    target = Failing(FlashInfer.of("0.7.0"))
    found = ignored_requests(target, "fp8_block", [MODELS["deepseek-r1"]])
    assert found.ignored == (Ignored(Request.BALANCING, failed, ("deepseek-r1",)),)
    assert (found.answered, found.unanswered) == (1, {"captured expert ids: no such stand-in": 1})


def test_a_model_without_any_judged_request_is_not_answered_for():
    unknown = Response(Answer.NOT_JUDGED, "no such stand-in")

    class Unknown(Requested):
        def around(self, model, scheme, method):
            return {Request.CAPTURE: unknown}

    target = Unknown(FlashInfer.of("0.7.0"))
    found = ignored_requests(target, "fp8_block", [MODELS["deepseek-r1"]])
    assert found == Requests((), 0, Counter({"captured expert ids: no such stand-in": 1}))


def test_padding_rows_that_are_routed_are_one_line():
    rows = Response(Answer.IGNORED, "the kernel is given every row", ("--flag",))
    failure = of_ignored(TARGET, "bf16", Ignored(Request.PADDING, rows, ("glm-4.5",)))
    assert failure.rank is Rank.LATENT
    assert failure.lines == (
        "bf16: padding rows ignored, as the kernel is given every row (only with an opt-in switch: "
        "--flag)",
    )


def test_reasons_that_are_not_told_are_one_line():
    silent = Response(Answer.IGNORED, "select raises ValueError: none")
    failure = of_ignored(TARGET, "nvfp4", Ignored(Request.REASONS, silent, ("glm-4.5",)))
    assert (failure.rank, failure.cause) == (
        Rank.LATENT,
        "ignored:reasons-for-choosing-no-experts",
    )
    assert failure.lines == (
        "nvfp4: reasons for choosing no experts not stated: select raises ValueError: none",
    )


def test_a_backend_that_is_ignored_is_a_loss():
    lost = Response(Answer.IGNORED, "Method takes one class", ("--moe-backend",))
    failure = of_ignored(TARGET, "mxfp4", Ignored(Request.BACKEND, lost, ("glm-4.5",)))
    assert failure.rank is Rank.MISSED
    assert failure.lines[1] == "  reach    only with an opt-in switch: --moe-backend"


def test_experts_that_another_device_loses():
    gate = "vllm/fp8.py:7"
    lost = Response(Answer.IGNORED, "a gate answers no", source=gate)
    failure = of_ignored(TARGET, "nvfp4", Ignored(Request.DEVICE, lost, ("glm-4.5",)))
    assert (failure.rank, failure.source) == (Rank.MISSED, gate)
    # Two gates are two causes, and a line that moves is none.
    assert failure.cause == "other-device:vllm/fp8.py"
    assert failure.lines[1:] == (
        "  reach    whoever serves on B300 or GB300",
        "  because  a gate answers no",
        "  models   glm-4.5",
        "  at       vllm/fp8.py:7",
    )


def test_answers_of_a_child():
    given = {"captured expert ids": {"answer": "rejected", "why": "a.py:1", "switches": ["--f"]}}
    assert read(given) == {Request.CAPTURE: Response(Answer.REJECTED, "a.py:1", ("--f",))}
    with pytest.raises(ValueError, match="guessed"):
        read({"captured expert ids": {"answer": "guessed", "why": "", "switches": []}})
