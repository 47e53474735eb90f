"""Calls of other kernels than TRT-LLM's: what is read of one, which models are asked, and the report."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.flashinfer.signatures import parameters
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.given import not_for, read_given
from pytest_moe_routing.oracle.other_experts import other_calls
from pytest_moe_routing.oracle.target import OtherCall, Target
from pytest_moe_routing.report.text import sentence
from pytest_moe_routing.suite.causes import of_other_experts
from pytest_moe_routing.suite.placements import of_lost_others

MODELS = load_models(packaged_directory())
FLASHINFER = FlashInfer.of(known_releases()[-1])
R1, SCOUT = MODELS["deepseek-r1"], MODELS["llama-4-scout"]


def tensor(dtype, *shape, **more):
    return {"dtype": dtype, "shape": list(shape), "contiguous": True, **more}


def recorded(model=R1, **changes):
    """A call on rank 1 of 2 in bf16, as it should be, without marked tokens."""
    local, top_k = model.router.num_experts // 2, model.router.top_k
    arguments = {
        "input": tensor("bfloat16", 8, 512),
        "token_selected_experts": tensor("int32", 8, top_k, **{"is": "ids"}),
        "token_final_scales": tensor("float32", 8, top_k, **{"is": "weights"}),
        "fc1_expert_weights": tensor("bfloat16", local, 512, 512),
        "output_dtype": "bfloat16",
        "tp_size": 1,
        "tp_rank": 0,
        "ep_size": 2,
        "ep_rank": 1,
        "cluster_size": 1,
        "cluster_rank": 0,
        "activation_type": 3,
    }
    record = {"function": "cutlass_fused_moe", "stored": "bf16", "shards": 2, "roles": {}}
    record |= {"has_biases": False, "arguments": arguments}
    for name, value in changes.items():
        (record if name in (*record, "unprepared", "scales", "parts") else arguments)[name] = value
    return record


def sentences(model=R1, **changes):
    return [sentence(f) for f in read_given(model, recorded(model, **changes), FLASHINFER)]


def test_every_argument_is_one_of_the_entry_point():
    """The facts about arguments name no argument that the newest release does not have."""
    entry = given_experts("cutlass_fused_moe")
    known = {p.partition("=")[0] for p in parameters(entry.function, FLASHINFER.release)}
    scales = {name for row in entry.scales.values() for name in row}
    flags = {name for row in entry.flags.values() for name in row}
    single = {entry.ids, entry.weights, entry.hidden, entry.scale, entry.tiled, entry.experts}
    roles = {role for row in entry.scales.values() for wanted in row.values() for role in wanted}
    assert set(entry.factors) <= roles
    named = single | {entry.rank, entry.activation} | {*entry.numbers, *entry.biases}
    named |= {*entry.matrices.values()}
    assert named | scales | flags | set(entry.parameters.values()) <= known
    assert {*entry.orders, *entry.ones, *entry.flags} <= {*entry.scales}
    for scheme, ones in entry.ones.items():
        assert {*ones} <= {name for row in entry.scales[scheme].values() for name in row}


def test_a_right_call():
    assert sentences() == []
    # A rank that has a part of every expert.
    every = tensor("bfloat16", 256, 512, 512)
    split = {"tp_size": 2, "tp_rank": 1, "ep_size": 1, "ep_rank": 0}
    assert sentences(**split, shards=1, parts=2, fc1_expert_weights=every) == []
    assert sentences(MODELS["minimax-m3"], unprepared=["gemm1_alpha"]) == []
    ones = tensor("float32", 8, 1)
    assert sentences(SCOUT, token_final_scales=ones) == []


@pytest.mark.parametrize(
    ("model", "changes", "found"),
    [
        (
            R1,
            {"token_final_scales": tensor("float32", 8, 8)},
            "token_final_scales arrives as other values, the layer has the router's weights",
        ),
        (
            SCOUT,
            {},
            "token_final_scales arrives as the router's weights, the layer has ones: the expert "
            "input has the weights",
        ),
        (
            R1,
            {"token_selected_experts": tensor("int64", 8, 8, **{"is": "ids"})},
            "token_selected_experts arrives as int64, the layer has int32",
        ),
        (
            R1,
            {"fc1_expert_weights": tensor("bfloat16", 256, 512, 512)},
            "fc1_expert_weights arrives as 256 experts, the layer has 128 experts",
        ),
        (
            R1,
            {"input": {**tensor("bfloat16", 8, 512), "contiguous": False}},
            "input arrives as not contiguous, the layer has contiguous",
        ),
        (
            R1,
            {"swiglu_limit": tensor("float32", 128)},
            "swiglu_limit arrives as values that differ, the layer has inf",
        ),
        (
            R1,
            {"use_mxfp8_act_scaling": True},
            "use_mxfp8_act_scaling arrives as yes, the layer has no",
        ),
    ],
)
def test_a_wrong_call(model, changes, found):
    assert sentences(model, **changes) == [found]


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (tensor("float32", 4, all=7.0), []),
        # What the kernel clamps to if it is not told.
        (None, []),
        (tensor("float32", 4, all=10.0), ["swiglu_limit arrives as 10, the layer has 7"]),
    ],
)
def test_the_limit_of_what_is_clamped_after_its_activation(limit, found):
    clamped = replace(R1.experts, activation="swiglustep", activation_limit=7.0)
    model = replace(R1, experts=clamped)
    assert sentences(model, activation_type=7, swiglu_limit=limit) == found


def of_mxfp4(global_scale):
    """Changes to a call that make it one with weights in MXFP4 and activations in MXFP8."""
    scales = [tensor("int32", 128, 512, 2), global_scale] * 2
    flags = {"use_mxfp8_act_scaling": True, "quant_scales": scales}
    return {"stored": "mxfp4", "roles": {"quant_scales": [None] * 4}, **flags}


@pytest.mark.parametrize(
    ("scale", "got"),
    [
        (tensor("float32", 128, all=1.0), None),
        (tensor("float32", 128, all=2.0), "2 of shape [128]"),
        (tensor("float32", 256, all=1.0), "1 of shape [256]"),
        (tensor("float32", 128), "values that differ"),
        (None, "none"),
    ],
)
def test_scales_that_must_be_one(scale, got):
    found = [
        f"quant_scales[{at}] arrives as {got}, the layer has 1 for 128 experts" for at in (1, 3)
    ]
    assert sentences(**of_mxfp4(scale)) == (found if got else [])


#: Scales of a checkpoint, and what its NVFP4 kernel is given for its first two experts.
WHOLE = {"w1_scale": (3.0, 5.0), "a1_scale": (0.5,), "w2_scale": (9.0, 7.0), "a2_scale": (0.25,)}
NVFP4 = {
    "fc1 quantization": tensor("float32", all=2.0),
    "fc1 weights": tensor("int32", 128, 4, 4),
    "fc1 dequantization": tensor("float32", 128, each=[1.5, 2.5]),
    "fc2 quantization": tensor("float32", all=4.0),
    "fc2 weights": tensor("int32", 128, 4, 4),
    "fc2 dequantization": tensor("float32", 128, each=[2.25, 1.75]),
}


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({}, []),
        ({"fc2 quantization": tensor("float32", 128, all=4.0)}, []),
        (
            {"fc2 quantization": tensor("float32", all=0.25)},
            ["a2_scale, the layer has 1 / a2_scale as fc2 quantization"],
        ),
        (
            {"fc1 dequantization": tensor("float32", 128, each=[0.75, 1.25])},
            ["w1_scale * a2_scale, the layer has w1_scale * a1_scale as fc1 dequantization"],
        ),
        ({"fc2 weights": None}, ["none, the layer has fc2 weights"]),
        (
            {"fc2 dequantization": tensor("float32", 128)},
            ["other values, the layer has w2_scale * a2_scale as fc2 dequantization"],
        ),
    ],
)
def test_scales_that_are_computed_for_a_call(changed, found):
    """They are no tensors of the layer, so their values tell what they are."""
    roles = {"quant_scales": [None] * len(NVFP4)}
    values = [*{**NVFP4, **changed}.values()]
    about = {"stored": "nvfp4", "scales": WHOLE, "roles": roles, "quant_scales": values}
    assert sentences(**about) == [f"quant_scales arrives as {text}" for text in found]


def test_an_entry_point_whose_arguments_are_not_known():
    for changes in ({"function": "other_fused_moe"}, {"stored": "mxint4"}):
        with pytest.raises(Unsupported, match=r"arguments of .* are not known"):
            sentences(**changes)


class Experts(Target):
    """A target whose experts give these calls, by model; it remembers who was asked."""

    name = "fake"

    def __init__(self, calls, unknown=(), elsewhere=(), runs=()):
        super().__init__(FLASHINFER)
        self.calls, self.unknown, self.elsewhere, self.asked = calls, unknown, elsewhere, []
        self.runs = runs

    def version(self):
        return "1.0"

    def runs_others(self, model, scheme):
        return model.id in self.runs

    def other_experts(self, model, scheme):
        self.asked.append(model.id)
        if model.id in self.unknown:
            raise Unsupported("no code")
        return () if model.id in self.elsewhere else self.calls


def call(*switches, requests=False, findings=()):
    return OtherCall("Experts", "Hopper", switches, requests, tuple(findings))


RANK = Finding(Kind.ARGUMENT, "ep_rank", 1, 0, "there, rank 1 of 2")
SIZE = Finding(Kind.ARGUMENT, "ep_size", 2, 1, "there, rank 1 of 2")


def test_one_model_of_each_kind_is_asked():
    """Kimi-K2's experts differ from DeepSeek-R1's in their number alone; Llama 4's do not."""
    target = Experts([call()])
    models = [R1, MODELS["kimi-k2"], SCOUT]
    found = other_calls(target, "bf16", models)
    assert (target.asked, found.answered, found.wrong) == (["deepseek-r1", "llama-4-scout"], 3, ())


def test_another_model_answers_for_one_that_cannot_be_asked():
    target = Experts([call()], unknown=["deepseek-r1"])
    found = other_calls(target, "bf16", [R1, MODELS["kimi-k2"]])
    assert (target.asked, found.answered) == (["deepseek-r1", "kimi-k2"], 2)
    assert found.unanswered == {"no code": 1}


def test_a_model_that_is_known_to_run_and_cannot_be_asked_is_lost():
    models = [R1, MODELS["kimi-k2"], SCOUT]
    target = Experts([call()], unknown=["deepseek-r1", "llama-4-scout"], runs=["deepseek-r1"])
    found = other_calls(target, "bf16", models)
    # Another one of its kind answers, but the release is known to run this one as well.
    assert (found.answered, found.unanswered) == (2, {"no code": 2})
    assert found.lost == {"no code": [R1]}
    failure = of_lost_others(target, "bf16", "no code", found.lost["no code"])
    assert (failure.cause, failure.rank) == ("lost-experts:cutlass", Rank.LOST)
    assert failure.lines == (
        "fake 1.0, bf16: experts no longer call CUTLASS's kernels where they did",
        "  reach    a checkpoint that anyone could produce",
        "  models   asked about: deepseek-r1",
        "  expected a call on each GPU that fake is known to run them on",
        "  now      no code",
    )


def test_another_model_answers_for_one_that_runs_in_no_such_experts():
    target = Experts([call()], elsewhere=["deepseek-r1"])
    found = other_calls(target, "bf16", [R1, MODELS["kimi-k2"]])
    assert (target.asked, found.answered) == (["deepseek-r1", "kimi-k2"], 2)


def test_a_mistake_is_told_once_on_the_way_that_needs_least():
    ways = [
        call("--moe-backend x", requests=True, findings=[RANK, SIZE]),
        call("--ep", findings=[RANK]),
    ]
    found = other_calls(Experts(ways), "bf16", [R1, SCOUT]).wrong
    assert [(each.call.switches, each.findings) for each in found] == [
        (("--ep",), (RANK,)),
        (("--moe-backend x",), (SIZE,)),
    ]
    assert [model.id for model in found[0].models] == ["deepseek-r1", "llama-4-scout"]


def test_mistakes_of_two_methods_are_two():
    """The models are the same, but what one method does says nothing about the other."""
    ways = [call(findings=[RANK]), call(findings=[replace(SIZE, where="elsewhere")])]
    found = other_calls(Experts(ways), "bf16", [R1]).wrong
    assert [each.findings for each in found] == [(RANK,), (replace(SIZE, where="elsewhere"),)]


def test_a_mistake_that_needs_a_backend_is_one_line():
    target = Experts([call("--moe-backend x", requests=True, findings=[RANK])])
    models = [R1, MODELS["kimi-k2"]]
    [wrong] = other_calls(target, "bf16", models).wrong
    failure = of_other_experts(target, "bf16", wrong)
    assert (failure.rank, failure.if_met) == (Rank.LATENT, "")
    assert failure.block(width=None) == [
        "bf16: Experts: ep_rank arrives as 0, the layer has 1 (2 models, such as deepseek-r1; only "
        "with an opt-in switch: --moe-backend x on Hopper)  "
        "[requested-experts:argument-ep_rank:Experts]"
    ]


def test_a_flag_makes_a_block_where_a_checkpoint_is_published():
    """R1 is published in FP8 blocks, and not in bfloat16."""
    target = Experts([call("--ep", findings=[RANK])])
    found = {}
    for scheme in ("fp8_block", "bf16"):
        [wrong] = other_calls(target, scheme, [R1]).wrong
        found[scheme] = of_other_experts(target, scheme, wrong)
    ranks = {scheme: failure.rank for scheme, failure in found.items()}
    assert ranks == {"fp8_block": Rank.SILENT, "bf16": Rank.LATENT}
    # A ledger of a run that has a published checkpoint names the cause so.
    assert found["bf16"].if_met == found["fp8_block"].cause != found["bf16"].cause


def test_a_mistake_by_default_is_a_block():
    target = Experts([call(findings=[RANK])])
    [wrong] = other_calls(target, "bf16", [R1]).wrong
    failure = of_other_experts(target, "bf16", wrong)
    assert failure.rank is Rank.SILENT
    assert failure.lines == (
        "deepseek-r1 on bf16, Experts of fake 1.0: the call is wrong",
        "  reach    a checkpoint that anyone could produce, by default on Hopper",
        "  because  ep_rank arrives as 0, the layer has 1",
        "  at       there, rank 1 of 2",
        "  models   deepseek-r1",
    )


class Elsewhere(Experts):
    """A target that takes experts for checkpoints that it serves in kernels of its own."""

    def served_elsewhere(self, scheme):
        return {"": Experts(self.calls), "GPTQ": Experts(self.calls)}

    def choice_of_others(self, model, scheme):
        return model.id


def test_experts_that_are_taken_for_other_checkpoints_are_named():
    found = other_calls(Elsewhere([call(findings=[RANK])]), "fp8_block", [R1])
    assert found.answered == 3
    causes = [of_other_experts(Experts([]), "fp8_block", wrong).cause for wrong in found.wrong]
    kind = "other-experts:argument-ep_rank:Experts"
    assert causes == [kind, kind, f"{kind}-for-GPTQ"]
    # R1 is published in the scheme's usual format.
    assert [bool(wrong.models[0].checkpoints) for wrong in found.wrong] == [True, True, False]


def test_models_that_other_experts_are_chosen_for_are_of_another_kind():
    target = Elsewhere([call()])
    other_calls(target, "bf16", [R1, MODELS["kimi-k2"]])
    assert target.asked == ["deepseek-r1", "kimi-k2"]


@pytest.mark.parametrize(
    ("function", "scheme", "fact"),
    [
        ("cutlass_fused_moe", "fp8_block", None),
        ("trtllm_fp8_per_tensor_scale_moe", "fp8_per_tensor", None),
        ("trtllm_fp8_per_tensor_scale_routed_moe", "fp8_per_tensor", None),
        ("cutlass_fused_moe", "fp8_per_channel", "cutlass_fused_moe does not serve"),
        ("trtllm_fp8_per_tensor_scale_moe", "fp8_per_channel", "trtllm_fp8_per_tensor_scale_moe"),
        (None, "fp8_per_channel", "no kernel of FlashInfer's that they call serves"),
    ],
)
def test_kernels_of_other_schemes(function, scheme, fact):
    found = not_for(function, scheme)
    assert (found is None) is (fact is None)
    assert found is None or (found.fact.startswith(fact) and found.fact.endswith(scheme))
