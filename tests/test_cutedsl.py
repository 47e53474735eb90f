"""Calls of CuteDSL's kernels: what is recorded of them, and what is wrong with one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.flashinfer.signatures import parameters
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.given import read_given
from pytest_moe_routing.oracle.laid_out import LaidOut
from pytest_moe_routing.oracle.layouts import wrong_layouts
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.report.text import sentence
from pytest_moe_routing.targets import recorder, scales
from pytest_moe_routing.targets.limits import DoesNotBind
from pytest_moe_routing.targets.sglang.probe.other_ways import unjudged

MODELS = load_models(packaged_directory())
FLASHINFER = FlashInfer.of(known_releases()[-1])
R1, GEMMA, NEMOTRON, K3 = (
    MODELS[name] for name in ("deepseek-r1", "gemma-4-26b-a4b", "nemotron-3-nano", "kimi-k3")
)
RUN = "CuteDslMoEWrapper.run"
#: What the scales of the first experts are to the kernel.
SCALES = {
    "w1_alpha": [w * a for w, a in zip(*(scales.GIVEN[n] for n in ("w1_scale", "a1_scale")))],  # noqa: B905
    "fc2_input_scale": [1 / each for each in scales.GIVEN["a2_scale"]],
    "w2_alpha": [w * a for w, a in zip(*(scales.GIVEN[n] for n in ("w2_scale", "a2_scale")))],  # noqa: B905
}


def tensor(dtype, *shape, **more):
    return {"dtype": dtype, "shape": list(shape), "contiguous": True, **more}


def recorded(model=R1, **changes):
    """A call on rank 1 of 2, as it should be."""
    local, top_k = model.router.num_experts // 2, model.router.top_k
    arguments = {
        "num_experts": 2 * local,
        "top_k": top_k,
        "num_local_experts": local,
        "local_expert_offset": local,
        "hidden_size": 256,
        "intermediate_size": 512,
        "sf_vec_size": 16,
        "output_dtype": "bfloat16",
        "activation_type": 3,
        "swiglu_alpha": 1.0,
        "swiglu_beta": 0.0,
        "swiglu_limit": float("inf"),
        "quant_mode": "w4a4",
        "x": tensor("uint8", 8, 128),
        "token_selected_experts": tensor("int32", 8, top_k, **{"is": "ids"}),
        "token_final_scales": tensor("float32", 8, top_k, **{"is": "weights"}),
        "w1_weight": tensor("uint8", local, 1024, 128),
        "w1_weight_sf": tensor("uint8", 32, 4, 8, 4, 4, local),
        "w2_weight": tensor("uint8", local, 256, 256),
        "w2_weight_sf": tensor("uint8", 32, 4, 2, 4, 8, local),
        **{name: tensor("float32", local, each=each) for name, each in SCALES.items()},
    }
    record = {"function": RUN, "stored": "nvfp4", "shards": 2, "roles": {}, "has_biases": False}
    record |= {"scales": scales.GIVEN, "arguments": arguments}
    for name, value in changes.items():
        (record if name in record else arguments)[name] = value
    return record


def sentences(model=R1, **changes):
    return [sentence(f) for f in read_given(model, recorded(model, **changes), FLASHINFER)]


def test_a_right_call():
    assert sentences() == []
    assert sentences(NEMOTRON, activation_type=6) == []
    assert sentences(GEMMA, activation_type=8) == []


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"num_experts": 128}, "num_experts arrives as 128, the layer has 256"),
        ({"top_k": None}, "top_k arrives as None, the layer has 8"),
        ({"num_local_experts": None}, "num_local_experts arrives as 256, the layer has 128"),
        ({"local_expert_offset": 0}, "local_expert_offset arrives as 0, the layer has 128"),
        ({"hidden_size": 512}, "hidden_size arrives as 512, the layer has 256"),
        ({"sf_vec_size": 32}, "sf_vec_size arrives as 32, the layer has 16"),
        ({"quant_mode": "w4a16"}, "quant_mode arrives as w4a16, the layer has w4a4"),
        ({"activation_type": 4}, "activation_type arrives as Geglu, the layer has Swiglu"),
        ({"swiglu_limit": 7.0}, "swiglu_limit arrives as 7, the layer has inf"),
        ({"has_biases": True}, "CuteDslMoEWrapper.run takes no biases of experts"),
        (
            {"fc2_input_scale": None},
            "fc2_input_scale arrives as 1, the layer has 1 / a2_scale as fc2 quantization",
        ),
        (
            {"w1_alpha": tensor("bfloat16", 128)},
            "w1_alpha arrives as other values, the layer has w1_scale * a1_scale as fc1 "
            "dequantization",
        ),
        (
            {"roles": {"w1_weight_sf": ["fc2 weights"]}},
            "w1_weight_sf arrives as fc2 weights, the layer has fc1 weights",
        ),
    ],
)
def test_a_wrong_call(changes, found):
    assert sentences(**changes) == [found]


def test_the_clamp_of_a_model_is_compared():
    limited = replace(R1, experts=replace(R1.experts, activation_limit=10.0))
    assert sentences(limited) == ["swiglu_limit arrives as inf, the layer has 10"]
    assert sentences(limited, swiglu_limit=10.0) == []


def test_a_kernel_without_an_activation_is_wrong_whatever_it_is_told():
    step = replace(R1, experts=replace(R1.experts, activation="swiglustep", activation_limit=7.0))
    assert sentences(step) == ["activation_type arrives as Swiglu, the layer has SwigluStep"]


@pytest.mark.parametrize(
    ("release", "told", "found"),
    [
        ("0.6.12", {}, "Swiglu"),
        ("0.6.14", {"activation": "silu"}, "Swiglu"),
        ("0.6.14", {"activation": "relu2"}, None),
        ("0.6.14", {"activation": "gelu"}, "gelu"),
    ],
)
def test_releases_whose_activation_is_a_word(release, told, found):
    record = recorded(NEMOTRON)
    del record["arguments"]["activation_type"]
    record["arguments"] |= told
    sentences = [sentence(f) for f in read_given(NEMOTRON, record, FlashInfer.of(release))]
    wrong = [f"activation_type arrives as {found}, the layer has Relu2"]
    assert sentences == (wrong if found else [])


def test_situ_is_told_by_its_betas():
    """Whatever the other parameters are: the kernel reads none of them."""
    assert sentences(K3, situ_beta=4.0, situ_linear_beta=25.0, swiglu_limit=7.0) == []
    assert sentences(K3) == [
        "situ_beta arrives as none, the layer has 4",
        "situ_linear_beta arrives as none, the layer has 25",
    ]
    assert sentences(situ_beta=4.0) == ["situ_beta arrives as 4, the layer has none"]


def test_an_omitted_number_of_local_experts_is_that_of_all():
    every = tensor("uint8", 256, 1024, 128)
    alone = {"shards": 1, "num_local_experts": None, "local_expert_offset": 0, "w1_weight": every}
    assert sentences(**alone) == []


def test_the_dtype_of_the_output_is_that_of_its_buffer():
    function = "cute_dsl_fused_moe_nvfp4"
    for dtype, found in (
        ("bfloat16", []),
        ("float16", ["output_dtype arrives as bfloat16, the layer has float16"]),
    ):
        record = recorded(function=function, moe_output=tensor(dtype, 8, 256))
        assert [sentence(f) for f in read_given(R1, record, FLASHINFER)] == found


def test_the_scale_of_the_input_is_compared():
    record = recorded() | {"input_scale": tensor("float32", 1, all=1 / scales.GIVEN["a2_scale"][0])}
    [found] = read_given(R1, record, FLASHINFER)
    assert sentence(found) == "input_scale arrives as 1 / a2_scale, the layer has 1 / a1_scale"


def test_a_release_without_modes_has_one():
    record = recorded()
    del record["arguments"]["quant_mode"]
    assert [*read_given(R1, record, FLASHINFER)] == []


def test_every_argument_is_one_of_the_constructor_or_of_the_method():
    entry = given_experts(RUN)
    called = (RUN, RUN.partition(".")[0])
    every = [parameters(function, FLASHINFER.release) for function in called]
    known = {p.partition("=")[0] for each in every for p in each}
    single = {entry.ids, entry.weights, entry.hidden, entry.scale, entry.experts, entry.activation}
    named = {*entry.numbers, *entry.modes, *entry.parameters.values(), *entry.scales["nvfp4"]}
    named |= {*entry.situ.values()}
    assert single | named | {*entry.matrices.values()} <= known


def test_a_call_has_the_arguments_of_the_constructor():
    calls = []
    wrapper = recorder._recorded_class(
        "CuteDslMoEWrapper", FLASHINFER, lambda *call: calls.append(call)
    )
    made = wrapper(num_experts=8, top_k=2, hidden_size=256, intermediate_size=512)
    assert made.quant_mode == "w4a4"
    given = dict.fromkeys(parameters(RUN, FLASHINFER.release)[:11])
    made.run(**given)
    [(function, arguments)] = calls
    assert function == RUN
    assert (arguments["num_experts"], arguments["x"], arguments["tactic"]) == (8, None, None)
    with pytest.raises(DoesNotBind, match=r"CuteDslMoEWrapper.run of .*: missing .*'x'"):
        made.run()
    with pytest.raises(DoesNotBind, match=r"CuteDslMoEWrapper of .*'num_experts'"):
        wrapper(experts=8)


class Laid(Target):
    """A target that lays out weights on these ways, by model."""

    name = "fake"

    def __init__(self, answers):
        super().__init__(FLASHINFER)
        self.answers, self.asked = answers, []

    def version(self):
        return "1.0"

    def weight_path(self, model, scheme):
        return None

    def laid_out_elsewhere(self, model, scheme):
        self.asked.append(model.id)
        return self.answers[model.id]


def laid(switch, unanswered=""):
    return LaidOut("kernel", "method", (), (switch,), unanswered=unanswered)


def test_another_model_answers_on_the_way_that_one_cannot_be_asked_on():
    """Llama 4's experts are of DeepSeek-R1's kind, and have fewer."""
    models = [R1, MODELS["llama-4-scout"]]
    answers = {"llama-4-scout": (laid("a", "no"), laid("b")), "deepseek-r1": (laid("a"), laid("b"))}
    target = Laid(answers)
    found = wrong_layouts(target, "nvfp4", models)
    assert target.asked == ["llama-4-scout", "deepseek-r1"]
    assert (found.answered, found.unanswered) == (2, {})
    answers["deepseek-r1"] = (laid("a", "not here"), laid("b"))
    found = wrong_layouts(Laid(answers), "nvfp4", models)
    assert (found.answered, found.unanswered) == (2, {"no": 2})
    answers |= dict.fromkeys(answers, (laid("a", "no"),))
    found = wrong_layouts(Laid(answers), "nvfp4", models)
    assert (found.answered, found.unanswered) == (0, {"no": 2})


def release(allowed, rejected=(), taken="flashinfer_new"):
    """Answers of a release with these runners and rules."""

    def accepted(runner):
        if runner not in allowed:
            raise Unsupported("nothing is asserted")
        return allowed[runner]

    runners = ["auto", "triton", "flashinfer_known", "flashinfer_new", "flashinfer_other"]
    sources = SimpleNamespace(
        accepted_quantizations=accepted, source=lambda module: "SGLANG_OF_IT = EnvBool(False)"
    )
    return SimpleNamespace(
        method_numbers=dict,
        defaults=lambda: {"CHOICES": runners},
        names=SimpleNamespace(spelling=lambda key: SimpleNamespace(path="CHOICES")),
        sources=sources,
        rejection=lambda server, options: options["moe_runner_backend"] in rejected,
        layer_runner=lambda runner: taken or runner,
    )


TOLD = {
    "server": {},
    "quantization": "modelopt_fp4",
    "known": ["flashinfer_known"],
    "unjudged": {"flashinfer_known": ["--one", "SGLANG_OF_IT=1", "SGLANG_OF_NONE=1"]},
}
SETTINGS = [
    ["--moe-runner-backend flashinfer_known", f"with {setting}"]
    for setting in ("--one", "SGLANG_OF_IT=1")
]


def others(*names):
    return [[f"--moe-runner-backend flashinfer_{name}"] for name in names]


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ({"allowed": {}}, [*SETTINGS, *others("new", "other")]),
        ({"allowed": {"flashinfer_new": ["fp8"]}}, [*SETTINGS, *others("other")]),
        ({"allowed": {"flashinfer_known": [None]}}, others("new", "other")),
        ({"allowed": {}, "rejected": ["flashinfer_other"]}, [*SETTINGS, *others("new")]),
        ({"allowed": {}, "taken": "triton"}, SETTINGS),
    ],
)
def test_what_servers_accept_of_flashinfer_and_nothing_asks_about(rules, found):
    assert [*unjudged(release(**rules), TOLD)] == found


def test_scales_of_activations_in_float32_may_be_equal():
    from pytest_moe_routing.targets.marked_weights import Order, order_of_activations

    with pytest.raises(Unsupported, match="x_sf cannot be compared"):
        [*order_of_activations("x_sf", torch.ones(256, 2), Order())]
