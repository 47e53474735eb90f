"""What FlashInfer takes and the simulator does not model is named; nothing is ignored."""

import pytest
import torch
from good_calls import FLASHINFER, changed, good_call
from launcher_cases import BF16, F16, PAIR, ROUTED, Case, cast, ones, put, sharing

from pytest_moe_routing.errors import NotSimulated
from pytest_moe_routing.simulator.checks import Names
from pytest_moe_routing.simulator.simulator import Simulator

U8 = torch.uint8


def no_case(text, scheme, change, how=None):
    return Case(text, NotSimulated, scheme, change, how or {})


CASES = [
    no_case("padded by valid_hidden_size", "nvfp4", put(valid_hidden_size=250)),
    no_case("padded by valid_hidden_size", "mxint4", put(valid_intermediate_size=250)),
    no_case("gemm1_lora_delta", "bf16", ones("gemm1_lora_delta", 5, 2, 512, dtype=BF16), ROUTED),
    no_case("gemm1_lora_delta", "mxfp8", ones("gemm1_lora_delta", 5, 2, 512, dtype=BF16), ROUTED),
    no_case("per_token_scale that is not float32", "nvfp4", ones("per_token_scale", 5, 1)),
    no_case("per_token_scale that is not float32", "nvfp4", ones("per_token_scale", 5, dtype=BF16)),
    no_case("and biases, with per_token_scale", "nvfp4_per_token", ones("gemm1_alpha", 8)),
    no_case("and biases, with per_token_scale", "nvfp4_per_token", ones("gemm2_bias", 8, 256)),
    no_case("and biases, with per_token_scale", "nvfp4_per_token", put(activation_type=4)),
    no_case(
        "on a rank of expert parallelism",
        "routing",
        put(num_fused_shared_experts=1, local_num_experts=4),
        {"method": "DeepSeekV3"},
    ),
    no_case(
        "experts that the caller chose",
        "mxfp4",
        sharing(lambda a: {"topk_ids": torch.zeros(5, 3, dtype=torch.int32)}),
        {"method": "DeepSeekV3", "routed": True},
    ),
    no_case("activations other than Swiglu", "bf16", put(activation_type=10)),
    no_case("16 bits on FP8 weights", "fp8_per_tensor", cast("hidden_states", BF16)),
    no_case("launcher that are not FP8", "fp8_per_channel", cast("hidden_states", BF16)),
    *(
        no_case(f"{name} of the per-channel launcher", "fp8_per_channel", change)
        for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
        for change in (ones(name, 7), ones(name, 8, dtype=F16), put(**{name: None}))
    ),
    no_case("hidden_states_scale of the", "fp8_per_channel", ones("hidden_states_scale", 5)),
    no_case("hidden_states_scale of the", "fp8_per_channel", ones("hidden_states_scale", 1, 5)),
    *(
        no_case(f"{name} that is not", "fp8_per_channel", cast(name, BF16))
        for name in ("gemm1_per_channel_weight_scale", "gemm2_per_channel_weight_scale")
    ),
    no_case("not int32 of tokens", "fp8_per_channel", cast("topk_ids", torch.int64), ROUTED),
    no_case("drops the router", "fp8_per_channel", put(use_routing_scales_on_input=True)),
    no_case(
        "with a method other than Llama4", "fp8_per_tensor", put(use_routing_scales_on_input=True)
    ),
    no_case("biases of experts on FP8 weights", "mxfp8", ones("gemm1_bias", 8, 512)),
    no_case("biases of experts on FP8 weights", "fp8_block", ones("gemm2_bias", 8, 256)),
    no_case(
        "FP8 hidden states with one scale",
        "mxfp4",
        put(
            hidden_states_scale=None,
            output1_scale_scalar=torch.ones(8),
            output1_scale_gate_scalar=torch.ones(8),
            output2_scale_scalar=torch.ones(8),
        ),
    ),
    no_case(
        "which the launcher does not reject",
        "nvfp4",
        ones("gemm1_alpha", 8),
        {"activated": "gelu_tanh"},
    ),
    *(
        no_case(f"{name} that is not float32", scheme, ones(name, 8, dtype=F16))
        for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
        for scheme in ("nvfp4", "mxint4")
    ),
    *(
        no_case(f"{name} that is not float32", "nvfp4", ones(name, 7))
        for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar")
    ),
    no_case(
        "whose bits the launcher reads as float32", "mxfp4", ones("gemm1_bias", 8, 512, dtype=BF16)
    ),
    no_case(
        "whose bits the launcher reads as float32", "nvfp4", ones("gemm2_bias", 8, 256, dtype=BF16)
    ),
    no_case(
        "topk_ids of another shape", "mxfp4", ones("topk_ids", 5, 3, dtype=torch.int32), ROUTED
    ),
    no_case(
        "topk_weights of another shape",
        "mxfp4",
        lambda a: {"topk_ids": (a["topk_ids"][0], a["topk_ids"][1][:, :1])},
        PAIR,
    ),
    no_case(
        "a pair of ids and weights",
        "mxint4",
        lambda a: {"topk_ids": (a["topk_ids"] >> 16, torch.ones(5, 2, dtype=BF16))},
        ROUTED,
    ),
]
#: No row of checks.yaml: sizes that the launchers do not check and kernels take for granted.
MEMORY = [
    no_case(
        "gemm1_weights: found",
        "fp8_per_tensor",
        lambda a: {"gemm1_weights": a["gemm1_weights"][:, 1:]},
    ),
    no_case("gemm2_weights: found", "nvfp4", lambda a: {"gemm2_weights": a["gemm2_weights"][1:]}),
    no_case(
        "gemm2_weights_scale: found",
        "mxfp8",
        lambda a: {"gemm2_weights_scale": a["gemm2_weights_scale"][:, 1:]},
    ),
    no_case(
        "gemm2_weights_scale: found",
        "nvfp4",
        lambda a: {"gemm2_weights_scale": a["gemm2_weights_scale"][1:]},
    ),
    no_case("hidden_states_scale: found", "mxfp8", ones("hidden_states_scale", 5, 7, dtype=U8)),
]


@pytest.mark.parametrize("case", [*CASES, *MEMORY], ids=str)
def test_not_simulated_is_named(case):
    function, given = changed(case)
    with pytest.raises(NotSimulated, match=case.at):
        getattr(Simulator(FLASHINFER), function)(**given)


def test_entry_points_that_are_not_simulated():
    with pytest.raises(NotSimulated, match="does not model trtllm_fp6_block_scale_moe"):
        Names("trtllm_fp6_block_scale_moe", {}, FLASHINFER)


def run(function, given):
    output = getattr(Simulator(FLASHINFER), function)(**given)
    return output[0] if isinstance(output, list) else output


@pytest.mark.parametrize(
    ("scheme", "argument"),
    [
        ("mxfp8", "gemm1_weights_scale"),
        ("mxfp8", "hidden_states_scale"),
        ("mxint4", "gemm1_weights_scale"),
        ("mxint4", "gemm2_weights_scale"),
        ("mxint4", "gemm2_weights"),
    ],
)
def test_only_the_bytes_of_a_tensor_count(scheme, argument):
    """Scales and MXINT4 weights of any shape: launcher 4354, 4381, 4834 and 4836 check dtypes alone."""
    function, given = good_call(scheme)
    expected = run(function, given)
    tensor = given[argument]
    flat = (tensor.flatten(),) if argument.startswith("hidden") else (tensor.flatten(1),)
    if argument == "gemm2_weights":
        flat = (tensor.reshape(8, 256, 128),)
    assert torch.equal(run(function, {**given, argument: flat[0]}), expected)


@pytest.mark.parametrize(("scheme", "width"), [("bf16", 256), ("nvfp4", 256), ("mxfp8", 128)])
def test_output_is_written_and_may_be_narrow(scheme, width):
    function, given = good_call(scheme)
    expected = run(function, given)
    output = torch.full((5, width), torch.nan, dtype=torch.bfloat16)
    assert run(function, {**given, "output": output}).data_ptr() == output.data_ptr()
    assert torch.equal(output, expected[:, :width])


@pytest.mark.parametrize("release", ["0.6.12", "0.6.18"])
def test_arguments_that_a_release_does_not_have_are_not_given(release):
    from pytest_moe_routing.flashinfer import FlashInfer

    function, given = good_call("bf16")
    older = FlashInfer.of(release)
    known = older.signature(function).parameters
    given = {name: value for name, value in given.items() if name in known}
    assert torch.equal(
        getattr(Simulator(older), function)(**given),
        getattr(Simulator(FLASHINFER), function)(**given),
    )
