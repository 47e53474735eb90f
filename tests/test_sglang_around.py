"""What SGLang's TRT-LLM runner makes of padding rows, placed experts and captured expert ids."""

from __future__ import annotations

import re

import pytest
import torch
from packaging.version import Version
from sglang_targets import oldest_and_newest, opened
from wheels import source_line

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.around import Answer, Request
from pytest_moe_routing.oracle.ignored import ignored_requests
from pytest_moe_routing.suite.ignored import of_ignored
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.sglang.probe.around import around, placement
from pytest_moe_routing.targets.sglang.probe.calls import Call
from pytest_moe_routing.targets.sglang.probe.ranks import RANKS, sharing_out, splitting
from pytest_moe_routing.targets.sglang.probe.world import requested, stand_ins

MODELS = load_models(packaged_directory())
R1 = MODELS["deepseek-r1"]
#: From here on, runners look at what is requested besides routing.
LOOKS = Version("0.5.23")
TOLD = "expert_location_dispatch_info"


@pytest.fixture(scope="module", **oldest_and_newest())
def target(request):
    yield from opened(request.param)


@pytest.mark.parametrize("scheme", ["fp8_block", "nvfp4"])
def test_release_ignores_what_its_kernel_is_not_told(target, scheme):
    """Confirmed in the source; docs/findings.md has files and lines."""
    answers = target.around(R1, scheme, "DeepSeekV3")
    found = {request: response.answer.value for request, response in answers.items()}
    looks = Version(target.version()) >= LOOKS
    assert found == {
        Request.PADDING: "rejected" if looks and scheme == "fp8_block" else "ignored",
        # Its NVFP4 runner accepts the placement, and raises when it asks for the logits.
        Request.BALANCING: ("rejected" if scheme == "fp8_block" else "failed")
        if looks
        else "ignored",
        Request.UNEVEN: "rejected",
        Request.CAPTURE: "ignored",
        # TopK compiled for one token gives experts, and the FP8 runner asserts that it does not.
        Request.COMPILE: "failed" if not looks and scheme == "fp8_block" else "rejected",
    }
    capture = answers[Request.CAPTURE]
    assert capture.why == "the kernel is given no routing_replay_out"
    assert capture.switches == ("--enable-return-routed-experts",)


def test_release_tells_the_models_that_are_served_so(target):
    models = [R1, MODELS["qwen3-30b-a3b"]]
    found = ignored_requests(target, "nvfp4", models)
    [captured] = [each for each in found.ignored if each.request is Request.CAPTURE]
    assert captured.models == ("deepseek-r1", "qwen3-30b-a3b")
    [placed] = [each for each in found.ignored if each.request is Request.BALANCING]
    # The line that calls the kernel.
    done, why = "ignored", r"sglang/srt/\S+\.py:\d+: the kernel is given logical experts"
    if Version(target.version()) >= LOOKS:
        done, why = "fails in the forward pass", "NotImplementedError: Expert placement remapping"
    lines = of_ignored(target, "nvfp4", placed).lines
    assert lines[:2] == (
        f"{target}, experts for nvfp4: expert placement by load (EPLB) {done}",
        "  reach    only with an opt-in switch: --ep-size 2, --enable-eplb",
    )
    assert re.match(f"  because  {why}", lines[2])


def test_release_whose_arguments_reject_a_request_does_not_run_with_it(target):
    """Nemotron-H's code rejects the placement when a server starts, from 0.5.23 on."""
    answer = target.around(MODELS["nemotron-3-nano"], "nvfp4", "DeepSeekV3")[Request.BALANCING]
    if Version(target.version()) < LOOKS:
        assert answer.answer is Answer.IGNORED
        return
    assert answer.answer is Answer.REJECTED
    place = answer.why.rpartition("(")[2][:-1]
    assert place.startswith("sglang/srt/arg_groups/model_overrides/nemotron_h.py:")
    assert source_line(target.source.root, place) == "raise ValueError("


def test_ranks_are_as_many_wherever_a_block_looks_at_them(target):
    """Code that decides about shared experts is run with one rank that has all experts."""
    scheme = "mxfp4" if Version(target.version()) >= LOOKS else "nvfp4"
    for model in ("deepseek-r1", "gpt-oss-20b", "qwen3-30b-a3b"):
        try:
            answers = target.around(MODELS[model], scheme, "Renormalize")
        except Unsupported:
            # No kernel routes for it in this scheme.
            continue
        answer = answers[Request.UNEVEN]
        assert answer.answer is Answer.REJECTED, model
        assert "layers/moe/fused_moe_triton/layer.py:" in answer.why
    changed = [(RANKS.count, RANKS.parts, RANKS.apart)]
    with sharing_out(3):
        with splitting(4):
            changed.append((RANKS.count, RANKS.parts, RANKS.apart))
        changed.append((RANKS.count, RANKS.parts, RANKS.apart))
    changed.append((RANKS.count, RANKS.parts, RANKS.apart))
    assert changed == [(2, 1, True), (1, 4, True), (3, 1, True), (2, 1, True)]


def test_release_is_not_asked_where_no_kernel_routes(target):
    with pytest.raises(Unsupported, match="no kernel routes: SGLang's own top-k routes"):
        target.around(MODELS["mimo-v2-flash"], "bf16", "DeepSeekV3")


def answers_of(
    runs, replay=None, tell=False, first=11, rejects=lambda options: None, compiles=False
):
    """Ask a runner that answers each request as `runs` has it, by the request's option.

    An answer is what raises, or what SGLang's own router is told.
    """
    written = torch.arange(6, dtype=torch.int16).reshape(3, 2)
    given = {"local_expert_offset": first, "local_num_experts": 5}
    calls = [Call.of("trtllm", {"routing_replay_out": written if replay else None, **given})]

    def run():
        if tell and requested("capturer"):
            requested("capturer").capture(layer_id=5, topk_indices=written.int())
        given = {"refused": None, "failed": None, "by_choice": False}
        said = [answer for option, answer in runs.items() if requested(option) is not None]
        for answer in said:
            if isinstance(answer, Unsupported):
                raise answer
            given |= answer
        return given

    names = Names(Contract.of("sglang"), "0.5.23", stubs.definitions("sglang", "nowhere"))
    found = around(names, run, calls, rejects, num_experts=16, compiles=compiles)
    assert requested("capturer") is None
    return {name: (answer["answer"], answer["why"]) for name, answer in found.items()}


def own(*told):
    return {"refused": "own top-k", "by_choice": True, "told": told}


def test_a_request_at_a_time():
    runs = {"placement": own("expert_location_dispatch_info")}
    found = answers_of(runs, replay=True, tell=True)
    assert found == {
        Request.PADDING: ("ignored", "the kernel is given every row"),
        Request.BALANCING: ("rejected", "own top-k"),
        Request.UNEVEN: ("honored", "local_expert_offset"),
        Request.CAPTURE: ("honored", "routing_replay_out"),
    }


def test_ranks_that_cannot_have_as_many_experts():
    """The last of three has the last five of sixteen experts."""
    why = "the kernel is given 5 experts from 10 on, of 16"
    assert answers_of({}, first=10)[Request.UNEVEN] == ("ignored", why)


def test_ids_that_nobody_is_told():
    why = "the ids that the kernel writes reach no consumer"
    assert answers_of({}, replay=True)[Request.CAPTURE] == ("ignored", why)
    why = "the kernel is given no routing_replay_out"
    assert answers_of({}, tell=True)[Request.CAPTURE] == ("ignored", why)
    rejected = answers_of({"capturer": own()}, replay=True, tell=True)
    assert rejected[Request.CAPTURE] == ("rejected", "own top-k")


def test_only_what_raises_before_a_forward_pass_is_a_rejection():
    asked = []

    def rejects(options):
        asked.append(options)
        return "a hook says no" if options.get("enable_return_routed_experts") else None

    runs = {
        "num_token_non_padded": {"refused": "an assertion of the layer"},
        "placement": {"failed": "raises in topk.py", "raised_in": "ValueError-in-topk.py-run"},
    }
    assert answers_of(runs, replay=True, rejects=rejects) == {
        Request.PADDING: ("rejected", "an assertion of the layer"),
        Request.BALANCING: ("failed", "raises in topk.py"),
        Request.UNEVEN: ("honored", "local_expert_offset"),
        Request.CAPTURE: ("rejected", "a hook says no"),
    }
    assert asked == [{"enable_eplb": True}, {"enable_return_routed_experts": True}]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"failed": "an assertion", "raised_in": "AssertionError"}, ("failed", "an assertion")),
        ({"refused": "given experts", "by_choice": True}, ("rejected", "given experts")),
        ({}, ("honored", "the kernel routes")),
    ],
)
def test_a_compiled_model_runs_with_what_its_topk_gives(answer, told):
    found = answers_of({"enable_torch_compile": answer}, compiles=True)
    assert found[Request.COMPILE] == told
    assert Request.COMPILE not in answers_of({})


def test_what_raises_without_a_reason_is_not_judged():
    found = answers_of({"placement": Unsupported("TypeError: a stub")}, replay=True, tell=True)
    assert found[Request.BALANCING] == ("not judged", "TypeError: a stub")
    assert found[Request.CAPTURE] == ("honored", "routing_replay_out")


def test_a_request_that_does_not_reach_sglangs_own_router_is_ignored():
    runs = {"num_token_non_padded": own(), "placement": own("num_token_non_padded")}
    found = answers_of(runs)
    why = "SGLang's own top-k is given no num_token_non_padded"
    assert found[Request.PADDING] == ("ignored", why)
    why = "SGLang's own top-k is given no expert_location_dispatch_info"
    assert found[Request.BALANCING] == ("ignored", why)


@pytest.mark.parametrize("redundant", [0, 1])
def test_a_placement_is_asked_with_redundant_experts_and_without(redundant):
    """SGLang's code may look at how many physical experts there are."""

    class OnlySome(dict):
        def items(self):
            placed = requested("placement")
            looks = placed is not None and placed.num_physical_experts == 16 + redundant
            return {"placement": own()}.items() if looks else {"placement": own(TOLD)}.items()

    said, why = answers_of(OnlySome())[Request.BALANCING]
    assert (said, why) == ("ignored", f"SGLang's own top-k is given no {TOLD}")


def test_every_expert_of_a_placement_lies_somewhere():
    placed = placement(4, 1)
    every = placed.partial_logical_to_all_physical_map
    count = placed.partial_logical_to_all_physical_map_num_valid
    found = [int(e) for row, n in zip(every, count, strict=True) for e in row[:n]]
    assert sorted(found) == list(range(placed.num_physical_experts))
    first = placed.partial_logical_to_rank_dispatch_physical_map
    assert torch.equal(first, every[:, 0])


def test_the_code_of_sglang_that_names_no_runner_is_named(target):
    rule = target.rule(MODELS["deepseek-v2"], "bf16", "", "")
    assert rule.instead == "triton by default"
    assert "_deepseek_moe_quant_resolution" in rule.name.split(" or ")
    assert source_line(target.source.root, rule.source) == "return {}"


def test_the_answer_of_sglang_that_routes_outside_the_kernel_is_named_with_its_line(target):
    model = MODELS["minimax-m2"]
    if Version(target.version()) < LOOKS:
        pytest.skip("it does not ask yet whether the kernel computes the router of TopK")
    rule = target.rule(model, "nvfp4", target.classify(model).method, "the kernel routes")
    assert rule.name == "_can_bypass_trtllm_routing"
    assert source_line(target.source.root, rule.source) == "return False"


def test_every_stand_in_tells_the_same_gpu():
    told = stand_ins(Names(Contract.of("sglang"), "0.5.23", stubs.definitions("sglang", "nowhere")))
    major, minor = told["get_device_capability"]()
    numbers = {told["get_device_sm"](), told["get_platform"]().device_sm, 10 * major + minor}
    assert numbers == {100}  # Blackwell, of which `is_sm100_supported` speaks
