"""Recorded arguments of a kernel call: what routes is read, everything else must be the layer's."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.arguments import (
    RecordedLayer,
    misscaled,
    read,
    read_routed,
    rounded_weights,
)
from pytest_moe_routing.oracle.exact import kernel_call
from pytest_moe_routing.report.text import sentence

MODELS = load_models(packaged_directory())
FLASHINFER = FlashInfer.of(known_releases()[-1])
FUNCTION = "trtllm_fp8_block_scale_moe"
R1 = MODELS["deepseek-r1"]
LAYER = RecordedLayer(rank=1, shards=2, intermediate_size=256)


def tensor(dtype="float32", shape=(256,), **more):
    return {"dtype": dtype, "shape": list(shape), "contiguous": True, **more}


def recorded(**changes):
    """A call for DeepSeek-R1 on rank 1 of 2, as it should be."""
    base = {
        "routing_logits": tensor(shape=(8, 256), **{"is": "router logits"}),
        "routing_bias": tensor(**{"is": "bias"}),
        "hidden_states_scale": tensor(shape=(4, 8)),
        "num_experts": 256,
        "top_k": 8,
        "n_group": 8,
        "topk_group": 4,
        "intermediate_size": 256,
        "local_expert_offset": 128,
        "local_num_experts": 128,
        "routed_scaling_factor": 2.5,
        "routing_method_type": 2,
        "activation_type": 3,
        "norm_topk_prob": True,
        "gemm1_alpha": None,
        "gemm1_beta": None,
        "gemm1_clamp_limit": None,
    }
    return {**base, **changes}


def reading(
    model=R1, layer=LAYER, flashinfer=FLASHINFER, function=FUNCTION, scheme="fp8_block", **changes
):
    record = {"function": function, "arguments": recorded(**changes)}
    return read(model, scheme, record, layer, flashinfer)


def problems(found):
    return [sentence(finding) for finding in found.wrong]


def test_shared_experts_among_the_routed_ones_are_experts_and_slots_of_a_rank():
    """SGLang gives each rank a copy of them, which every token selects besides."""
    layer = replace(LAYER, fused=1)
    fused = {"num_experts": 257, "top_k": 9, "local_num_experts": 129, "local_expert_offset": 129}
    assert problems(reading(layer=layer, **fused)) == []
    found = problems(reading(layer=layer, **{**fused, "top_k": 8, "num_experts": 256}))
    assert found == [
        "num_experts arrives as 256, the layer has 257",
        "top_k arrives as 8, the layer has 9",
    ]


@pytest.mark.parametrize(
    ("layer", "problem"),
    [
        ({"scale_after": None}, "the layer's output arrives as values that no factor explains, "),
        ({"shared": 0.0, "reduced": (1, 0)}, "the output of the shared experts is added nowhere; "),
        ({"shared": 0.4}, "the output of the shared experts is added with a factor of 0.4; "),
        ({"reduced": (0, 1)}, "other ranks' output of the routed experts is added nowhere; "),
        (
            {"told_otherwise": (("swiglu_limit", "10.0", "none"),)},
            "the layer's config has none as swiglu_limit; the model's code requests 10.0",
        ),
    ],
)
def test_what_a_layer_does_with_the_output_of_its_experts_is_judged(layer, problem):
    right = {"scale_after": 1.0, "shared": 1.0, "reduced": (1, 1), "are_summed": 1}
    assert not problems(reading(layer=replace(LAYER, **right)))
    [found] = problems(reading(layer=replace(LAYER, **right | layer)))
    assert found.startswith(problem)


@pytest.mark.parametrize(
    ("router_factor", "after", "times"),
    [(1.0, 2.5, None), (2.5, 1.0, None), (1.0, 1.0, "nowhere"), (2.5, 2.5, "twice"),
     (1.0, 2.0, "with a factor of 2")],
)  # fmt: skip
def test_the_factor_is_applied_once_by_router_and_layer(router_factor, after, times):
    layer = replace(LAYER, scale_after=after)
    found = [sentence(finding) for finding in misscaled(R1, router_factor, layer)]
    text = f"routed_scaling_factor is applied {times}; the layer applies it once"
    assert found == ([text] if times else [])


def test_a_right_call_is_the_one_that_the_router_needs():
    found = reading()
    assert found.call == kernel_call(R1.router, "fp8_block", "DeepSeekV3", FLASHINFER)
    assert found.findings == ()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"num_experts": 128}, "num_experts arrives as 128, the layer has 256"),
        ({"top_k": 6}, "top_k arrives as 6, the layer has 8"),
        ({"intermediate_size": 512}, "intermediate_size arrives as 512, the layer has 256"),
        ({"local_expert_offset": 0}, "local_expert_offset arrives as 0, the layer has 128"),
        ({"local_num_experts": 256}, "local_num_experts arrives as 256, the layer has 128"),
        ({"norm_topk_prob": False}, "norm_topk_prob arrives as no, the layer has yes"),
        (
            {"routing_logits": tensor(shape=(8, 256))},
            "routing_logits arrives as another tensor (float32, 8x256), the layer has the router's logits",
        ),
        (
            {"routing_bias": tensor()},
            "routing_bias arrives as another tensor (float32, 256), the layer has the router's bias",
        ),
        (
            {"hidden_states_scale": tensor(contiguous=False)},
            "hidden_states_scale arrives as not contiguous",
        ),
        ({"activation_type": 6}, "activation_type arrives as Relu2, the layer has Swiglu"),
        ({"activation_type": 99}, "activation_type arrives as 99, the layer has Swiglu"),
        (
            {"gemm1_clamp_limit": tensor(all=7.0)},
            "gemm1_clamp_limit arrives as 7, the layer has inf",
        ),
        ({"gemm1_alpha": tensor()}, "gemm1_alpha arrives as"),
    ],
)
def test_what_is_not_the_layers_is_a_problem(changes, problem):
    found = reading(**changes)
    [told] = problems(found)
    assert told.startswith(problem)
    assert found.wrong[0].where == FUNCTION


@pytest.mark.parametrize(
    ("changes", "field", "value"),
    [
        ({"n_group": None}, "n_group", 0),
        ({"topk_group": 0}, "topk_group", 0),
        ({"routed_scaling_factor": None}, "routed_scaling_factor", 1.0),
        ({"routing_bias": None}, "bias", "none"),
        ({"routing_bias": tensor("bfloat16", all=0.0)}, "bias", "zeros"),
        ({"routing_method_type": 7}, "method", "MiniMax2"),
        ({"use_routing_scales_on_input": True}, "weight_on", "input"),
    ],
)
def test_what_routes_is_left_to_be_judged_by_its_meaning(changes, field, value):
    found = reading(**changes)
    assert getattr(found.call, field) == value
    assert found.wrong == ()


def test_numbers_are_read_as_the_release_reads_them():
    assert reading(routing_method_type=8).call.method == "Sigmoid"
    older = reading(routing_method_type=8, flashinfer=FlashInfer.of("0.6.8")).call
    assert older.method == "Unspecified"
    found = reading(routing_method_type=101)
    assert found.call is None
    assert problems(found) == [
        "routing_method_type 101 is not a routing method of this FlashInfer release"
    ]


@pytest.mark.parametrize("name", ["top_k", "local_expert_offset", "routing_method_type"])
def test_an_integer_that_is_none_reaches_no_kernel(name):
    found = reading(**{name: None})
    assert found.call is None
    assert problems(found) == [f"{name} arrives as None, the layer has an integer"]


def test_rounding_before_the_call_is_no_problem_but_said():
    found = reading(
        routing_logits=tensor("bfloat16", (8, 256), **{"is": "router logits"}),
        routing_bias=tensor("bfloat16", **{"is": "bias"}),
    )
    assert (found.call.logits_dtype, found.call.bias_dtype) == ("bfloat16", "bfloat16")
    assert [finding.field for finding in found.downcasts] == ["logits", "bias"]
    assert found.wrong == ()
    # Zeros are the same in every dtype.
    zeros = reading(routing_bias=tensor("bfloat16", **{"is": "bias", "all": 0}))
    assert zeros.downcasts == ()


def test_a_factor_of_the_layer_multiplies_the_kernels():
    call = reading(layer=replace(LAYER, scale_after=2.5), routed_scaling_factor=1.0).call
    assert FLASHINFER.recipe(call).scale == 2.5
    twice = reading(layer=replace(LAYER, scale_after=2.5)).call
    assert FLASHINFER.recipe(twice).scale == 6.25


def test_another_entry_point_is_a_problem():
    assert problems(reading(function="trtllm_bf16_moe")) == [
        f"function arrives as trtllm_bf16_moe, the layer has {FUNCTION}"
    ]


def test_the_parameters_of_an_activation_must_arrive():
    model = replace(R1, experts=MODELS["gpt-oss-20b"].experts)
    right = {
        "gemm1_alpha": tensor(all=1.7020000219345093),
        "gemm1_beta": tensor(all=1.0),
        "gemm1_clamp_limit": tensor(all=7.0),
    }
    assert reading(model, **right).wrong == ()
    assert problems(reading(model, **{**right, "gemm1_clamp_limit": None})) == [
        "gemm1_clamp_limit arrives as inf, the layer has 7"
    ]
    squared = replace(R1, experts=replace(R1.experts, activation="relu2", gated=False))
    assert reading(squared, scheme="mxfp8", activation_type=6).wrong == ()


def test_an_activation_that_the_kernel_does_not_have():
    """Its launcher throws: trtllm_fused_moe_kernel_launcher.cu of 0.7.2.post1, line 5837."""
    squared = replace(R1, experts=replace(R1.experts, activation="relu2", gated=False))
    assert problems(reading(squared, activation_type=6)) == [
        "no trtllm_fp8_block_scale_moe kernel for relu2, not gated, in FlashInfer 0.7.2.post1"
    ]
    # If the kernel is told another one, that is what is wrong.
    assert problems(reading(squared, activation_type=3)) == [
        "activation_type arrives as Swiglu, the layer has Relu2"
    ]
    almost = replace(R1, experts=replace(R1.experts, activation="gelu"))
    assert problems(reading(almost, activation_type=4)) == [
        "no trtllm_fp8_block_scale_moe kernel for gelu_tanh, gated, in FlashInfer 0.7.2.post1"
    ]
    clamped = replace(R1, experts=MODELS["gpt-oss-20b"].experts)
    parameters = {"gemm1_alpha": 1.7020000219345093, "gemm1_beta": 1.0, "gemm1_clamp_limit": 7.0}
    given = {name: tensor(all=value) for name, value in parameters.items()}
    old = FlashInfer.of("0.6.16")
    told = [
        "no trtllm_fp8_block_scale_moe kernel for swigluoai, gated, in FlashInfer 0.6.16",
        "trtllm_fp8_block_scale_moe does not accept a clamp of swigluoai in FlashInfer 0.6.16",
    ]
    assert problems(reading(clamped, flashinfer=old, **given)) == told


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
def test_trtllms_kernels_have_one_gelu(activation):
    """It has another name than that of CUTLASS' kernels, which trtllm_fused_moe_runner.cu refuses."""
    model = replace(R1, experts=replace(R1.experts, activation=activation))
    right = reading(model, scheme="mxfp8", activation_type=4)
    assert right.wrong == ()
    told = "the kernel computes gelu_tanh for gelu; the two differ by at most 0.0005"
    assert [note.fact for note in right.notes] == [told] * (activation == "gelu")
    assert problems(reading(model, scheme="mxfp8", activation_type=8)) == [
        "activation_type arrives as GegluTanh, the layer has Geglu"
    ]
    assert problems(reading(model, scheme="mxfp8", activation_type=3)) == [
        "activation_type arrives as Swiglu, the layer has Geglu"
    ]


def test_an_entry_point_without_the_argument_has_swiglu_alone():
    arguments = recorded()
    del arguments["activation_type"]
    squared = replace(R1, experts=replace(R1.experts, activation="relu2", gated=False))
    record = {"function": FUNCTION, "arguments": arguments}
    assert problems(read(squared, "fp8_block", record, LAYER, FLASHINFER)) == [
        "activation_type arrives as Swiglu, the layer has Relu2"
    ]
    assert read(R1, "fp8_block", record, LAYER, FLASHINFER).wrong == ()


def test_a_models_own_limit_must_arrive():
    """GLM-5.3-Flash and Hy4 clamp silu at 10; vLLM 0.32.0 drops the limit on bf16."""
    model = replace(R1, experts=replace(R1.experts, activation_limit=10.0))
    assert reading(model, gemm1_clamp_limit=tensor(all=10.0)).wrong == ()
    for lost in (None, tensor(all=7.0)):
        [finding] = reading(model, gemm1_clamp_limit=lost).wrong
        assert (finding.field, finding.wanted) == ("gemm1_clamp_limit", 10.0)


IDS = tensor("int32", (8, 8), **{"is": "ids"})
WEIGHTS = tensor("float32", (8, 8), **{"is": "weights"})
PACKED = tensor("int32", (8, 8), **{"is": "packed"})


def routed(function="trtllm_fp8_block_scale_routed_moe", **changes):
    arguments = {**recorded(routing_method_type=1, n_group=None, topk_group=None), **changes}
    record = {"function": function, "arguments": arguments}
    return read_routed(R1, "fp8_block", record, LAYER, FLASHINFER)


@pytest.mark.parametrize("given", [PACKED, [IDS, WEIGHTS]], ids=["packed", "apart"])
def test_experts_and_weights_that_arrive(given):
    assert routed(topk_ids=given) == ()


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"topk_ids": [WEIGHTS, IDS]}, "topk_ids arrives as "),
        ({"topk_ids": IDS}, "topk_ids arrives as "),
        ({"topk_ids": None}, "topk_ids arrives as "),
        ({"function": FUNCTION}, "the layer has trtllm_fp8_block_scale_routed_moe"),
        ({"local_expert_offset": 0}, "local_expert_offset arrives as 0, the layer has 128"),
        ({"activation_type": 4}, "activation_type arrives as"),
        ({"num_experts": None}, "num_experts arrives as None, the layer has an integer"),
        ({"hidden_states_scale": {**PACKED, "contiguous": False}}, "arrives as not contiguous"),
    ],
)
def test_experts_and_weights_that_do_not(changes, problem):
    [found] = routed(**{"topk_ids": PACKED, **changes})
    assert problem in sentence(found)


@pytest.mark.parametrize(
    ("given", "release", "is_rounded"),
    [
        (PACKED, "0.6.18", True),
        ([IDS, {**WEIGHTS, "dtype": "bfloat16"}], "0.6.18", True),
        ([IDS, WEIGHTS], "0.6.18", False),
        # Its entry point takes them packed only.
        (PACKED, "0.6.17", False),
        (None, "0.6.18", False),
    ],
)
def test_weights_have_16_bits_where_the_kernel_would_take_32(given, release, is_rounded):
    record = {"function": "trtllm_fp8_block_scale_routed_moe", "arguments": {"topk_ids": given}}
    found = [*rounded_weights("fp8_block", record, FlashInfer.of(release))]
    texts = ["the float32 router weights are downcast to bfloat16 before the call"]
    assert [sentence(finding) for finding in found] == texts * is_rounded
