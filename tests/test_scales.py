"""Scales, biases and the activation's parameters of a kernel call, against what they mean."""

from __future__ import annotations

from dataclasses import replace

import fused_cases
import pytest
import torch
from good_calls import FLASHINFER

from pytest_moe_routing.flashinfer.scales import Formula, factors, likely_formulas, unit
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.kernels.fused import fused_arguments
from pytest_moe_routing.kernels.weights import prepare
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.calls import PARAMETERS
from pytest_moe_routing.oracle.scales import wrong_input, wrong_parameters, wrong_scales
from pytest_moe_routing.report.text import sentence
from pytest_moe_routing.schemes import kernel_of
from pytest_moe_routing.targets.recorder import input_scale, plain
from pytest_moe_routing.targets.scales import GIVEN, note, of_part, per_expert, quantized_by

MODELS = load_models(packaged_directory())
SILU, RELU2, OSS = (MODELS[m].experts for m in ("qwen3-30b-a3b", "nemotron-3-nano", "gpt-oss-20b"))
#: Scales of a layer's first experts, as numbers that are easy to read.
LAYER = {
    "w1_scale": (3.0, 5.0, 7.0, 9.0),
    "a1_scale": (0.5,) * 4,
    "w2_scale": (11.0, 13.0, 15.0, 14.0),
    "a2_scale": (2.0**-11,) * 4,
}
PER_TENSOR = {
    "output1_scales_gate_scalar": [1.5, 2.5, 3.5, 4.5],
    "output1_scales_scalar": [3072.0, 5120.0, 7168.0, 9216.0],
    "output2_scales_scalar": [11 / 2048, 13 / 2048, 15 / 2048, 14 / 2048],
}


def tensors(kernel, **more):
    """The blocks of weights' scales that a call has."""
    argument = kernel.scale_argument
    found = {f"{gemm}_{argument}": {"is": f"{gemm} scales"} for gemm in ("gemm1", "gemm2")}
    return {**found, **more}


def vectors(**arguments):
    return {name: {"each": value} for name, value in arguments.items()}


def found_in(experts, scheme, **arguments):
    kernel = kernel_of(scheme)
    parts = wrong_scales, wrong_parameters
    return [sentence(f) for part in parts for f in part(experts, kernel, arguments, LAYER)]


@pytest.mark.parametrize(
    ("scheme", "activation"),
    [
        *(("fp8_per_tensor", activation) for activation in ("silu", "relu2")),
        *(("nvfp4", activation) for activation in ("silu", "relu2", "gelu_tanh", "swigluoai")),
    ],
)
def test_factors_and_units_are_those_of_calls_that_the_simulator_computes_right(scheme, activation):
    call, kernel = fused_cases.call(scheme), kernel_of(scheme)
    problem = fused_cases.problem(FLASHINFER, call, scheme, activation)
    act = problem.layer.activation
    prepared = prepare(problem.experts, kernel, gated=act.gated)
    arguments = fused_arguments(problem, call, prepared, FLASHINFER)
    hidden = problem.hidden
    whole = hidden.scales if hidden.global_scale is None else hidden.global_scale
    scales = {
        "w1_scale": tuple(prepared.gate.tolist()),
        "a1_scale": (whole.item(),),
        "w2_scale": tuple(prepared.down.tolist()),
        "a2_scale": tuple(prepared.intermediate.tolist()),
    }
    for name, formula in factors(kernel, gated=act.gated).items():
        assert arguments[name].tolist() == pytest.approx(formula.values(scales)), name
    numbers = {"gemm1_alpha": act.alpha, "gemm1_beta": act.beta, "gemm1_clamp_limit": act.limit}
    assert numbers.keys() == PARAMETERS.keys()
    for name, number in numbers.items():
        if arguments.get(name) is not None:
            wanted = [number / each for each in unit(name, kernel).values(scales)]
            assert arguments[name].tolist() == pytest.approx(wanted), name


def test_no_two_formulas_that_a_caller_may_compute_have_the_same_values():
    formulas = likely_formulas()
    of_one_scale = [formula.values(GIVEN) for formula in formulas if not formula.powers[1]]
    assert len(set(of_one_scale)) == len(of_one_scale) == 5**4
    of_two = {
        f"{part}_scale": tuple(of_part("w1_scale", part, 4).tolist()) for part in ("w1", "w3")
    }
    values = [formula.values({**GIVEN, **of_two}) for formula in formulas]
    assert len(set(values)) == len(values) == 5**5


@pytest.mark.parametrize("text", ["1", "1 / a2_scale", "w1_scale * a1_scale / a2_scale / a2_scale"])
def test_a_formula_is_written_as_it_is_read(text):
    assert str(Formula.of(text)) == text


def test_right_factors_pass():
    assert found_in(SILU, "fp8_per_tensor", **vectors(**PER_TENSOR)) == []


@pytest.mark.parametrize(
    ("name", "value", "got"),
    [
        ("output1_scales_scalar", PER_TENSOR["output1_scales_gate_scalar"], "w1_scale * a1_scale"),
        ("output1_scales_scalar", [2048.0] * 4, "1 / a2_scale"),
        ("output1_scales_gate_scalar", [1.0] * 4, "1"),
        ("output1_scales_gate_scalar", [2 / 3, 2 / 5, 2 / 7, 2 / 9], "1 / w1_scale / a1_scale"),
        ("output2_scales_scalar", [1.0, 2.0, 3.0, 5.0], "1, 2, 3, 5"),
    ],
)
def test_a_wrong_factor_is_told_by_its_formula(name, value, got):
    formula = factors(kernel_of("fp8_per_tensor"), gated=True)[name]
    found = found_in(SILU, "fp8_per_tensor", **vectors(**{**PER_TENSOR, name: value}))
    assert found == [f"{name} arrives as {got}, the layer has {formula}"]


def test_up_rows_with_a_scale_of_their_own_are_not_dequantized_with_that_of_the_gate():
    given, right = (
        {**LAYER, "w3_scale": (1.5, 2.5, 14.0, 18.0)},
        {
            **PER_TENSOR,
            "output1_scales_scalar": [1536.0, 2560.0, 14336.0, 18432.0],
        },
    )
    kernel = kernel_of("fp8_per_tensor")
    assert [*wrong_scales(SILU, kernel, vectors(**right), given)] == []
    (found,) = wrong_scales(SILU, kernel, vectors(**PER_TENSOR), given)
    assert sentence(found) == (
        "output1_scales_scalar arrives as w1_scale * a1_scale / a2_scale, the layer has "
        "w3_scale * a1_scale / a2_scale"
    )


def test_factors_of_experts_without_a_gate_do_not_dequantize_it_twice():
    right = {**vectors(**PER_TENSOR), "output1_scales_scalar": {"all": 2048.0}}
    assert found_in(RELU2, "fp8_per_tensor", **right) == []
    assert found_in(RELU2, "fp8_per_tensor", **vectors(**PER_TENSOR)) == [
        "output1_scales_scalar arrives as w1_scale * a1_scale / a2_scale, the layer has "
        "1 / a2_scale"
    ]


@pytest.mark.parametrize("value", [None, {"all": 1.0}])
def test_a_scheme_without_factors_has_ones_or_none(value):
    given = tensors(kernel_of("mxfp4"), output2_scale_scalar=value)
    assert found_in(SILU, "mxfp4", **given) == []
    given["output2_scale_scalar"] = {"all": 0.0}
    text = "output2_scale_scalar arrives as 0, the layer has 1"
    assert found_in(SILU, "mxfp4", **given) == [text]


@pytest.mark.parametrize(
    ("value", "got"),
    [(None, "none"), ({"is": "gemm2 scales"}, "the gemm2 scales"), ({}, "another tensor")],
)
def test_scales_of_blocks(value, got):
    given = tensors(kernel_of("fp8_block"))
    assert found_in(SILU, "fp8_block", **given) == []
    text = f"gemm1_weights_scale arrives as {got}, the layer has the gemm1 scales"
    assert found_in(SILU, "fp8_block", **{**given, "gemm1_weights_scale": value}) == [text]


def test_biases():
    kernel, one = kernel_of("mxfp4"), {"gemm1_alpha": {"all": 1.702}, "gemm1_beta": {"all": 1.0}}
    one["gemm1_clamp_limit"] = {"all": 7.0}
    biases = {f"{gemm}_bias": {"is": f"{gemm} bias"} for gemm in ("gemm1", "gemm2")}
    assert found_in(OSS, "mxfp4", **tensors(kernel, **one, **biases)) == []
    assert found_in(OSS, "mxfp4", **tensors(kernel, **one, **biases | {"gemm1_bias": None})) == [
        "gemm1_bias arrives as none, the layer has the gemm1 bias"
    ]
    assert found_in(SILU, "mxfp4", **tensors(kernel, gemm2_bias={"shape": [4, 8]})) == [
        "gemm2_bias arrives as a tensor, the layer has none"
    ]


@pytest.mark.parametrize(
    ("limit", "problem"),
    [
        ({"each": [14 / 3, 14 / 5, 2.0, 14 / 9]}, None),
        (None, "arrives as inf, the layer has 7"),
        ({"all": 7.0}, "arrives as 7, the layer has 7 / (w1_scale * a1_scale)"),
        ({"each": [10.5, 17.5, 24.5, 31.5]},
         "arrives as 7 * w1_scale * a1_scale, the layer has 7 / (w1_scale * a1_scale)"),
        ({"each": [2 * x for x in (14 / 3, 14 / 5, 2.0, 14 / 9)]}, "arrives as 14, the layer has 7"),
    ],
)  # fmt: skip
def test_a_clamp_is_in_units_of_accumulators(limit, problem):
    experts = replace(SILU, activation_limit=7.0)
    right = {name.replace("scales", "scale"): value for name, value in PER_TENSOR.items()}
    given = tensors(kernel_of("nvfp4"), **vectors(**right), gemm1_clamp_limit=limit)
    text = [] if problem is None else [f"gemm1_clamp_limit {problem}"]
    assert found_in(experts, "nvfp4", **given) == text


@pytest.mark.parametrize(
    ("scheme", "right", "inverted", "formula"),
    [
        ("fp8_per_tensor", 0.5, 2.0, ("a1_scale", "1 / a1_scale")),
        ("nvfp4", 2.0, 0.5, ("1 / a1_scale", "a1_scale")),
    ],
)
def test_the_input_is_quantized_with_the_scale_that_dequantizes_it(
    scheme, right, inverted, formula
):
    assert [*wrong_input(scheme, {"input_scale": {"all": right}}, LAYER)] == []
    [found] = wrong_input(scheme, {"input_scale": {"all": inverted}}, LAYER)
    wanted, got = formula
    assert sentence(found) == f"input_scale arrives as {got}, the layer has {wanted}"
    # A step that the probe replaces, or a scheme without such a scale.
    assert [*wrong_input(scheme, {}, LAYER)] == []
    assert [*wrong_input("mxfp8", {"input_scale": {"all": inverted}}, LAYER)] == []


def test_what_flashinfer_does_not_document_is_not_compared():
    situ = replace(SILU, activation="situ")
    assert found_in(situ, "nvfp4", **tensors(kernel_of("nvfp4"), output2_scale_scalar=None)) == []


@pytest.mark.parametrize(
    ("alpha", "beta", "problems"),
    [
        (4.0, 25.0, []),
        (None, 25.0, ["gemm1_alpha arrives as 1, the layer has 4"]),
        (4.0, None, ["gemm1_beta arrives as 1, the layer has 25"]),
        (4.0, 7.0, ["gemm1_beta arrives as 7, the layer has 25"]),
    ],
)
def test_parameters_of_situ_where_no_tensor_has_a_scale(alpha, beta, problems):
    situ = replace(SILU, activation="situ", activation_alpha=4.0, activation_beta=25.0)
    stated = {"gemm1_alpha": alpha, "gemm1_beta": beta}
    given = {name: value and {"all": value} for name, value in stated.items()}
    assert found_in(situ, "mxfp4", **tensors(kernel_of("mxfp4"), **given)) == problems
    # FlashInfer does not document their units where tensors have scales.
    assert found_in(situ, "nvfp4", **tensors(kernel_of("nvfp4"), **given)) == []


@pytest.mark.parametrize("experts", [4, 6, 128])
def test_a_vector_is_recorded_by_its_first_experts(experts):
    value = per_expert("w1_scale", experts)
    assert plain(value, {})["each"] == list(GIVEN["w1_scale"])
    assert "each" not in plain(torch.arange(experts + 4).float(), {})


@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_of_the_scale_of_a_whole_tensor_shows(name, dtype):
    values = per_expert(name, 4)
    cast = values.to(dtype).float()
    assert not any(abs(x / y - 1) < 1e-4 for x, y in zip(cast, values, strict=True))


def test_scales_of_eight_bits_are_recognized_by_their_bytes():
    scales = per_expert("w1_scale", 8).to(torch.float8_e4m3fn)
    named = {"gemm1 scales": scales, "gemm2 scales": per_expert("w2_scale", 8).to(torch.uint8)}
    assert plain(scales.view(torch.uint8), named)["is"] == "gemm1 scales"
    assert plain(named["gemm2 scales"].view(torch.float8_e4m3fn), named)["is"] == "gemm2 scales"
    assert "is" not in plain(torch.zeros(8, dtype=torch.uint8), named)


@pytest.mark.parametrize(
    ("scale", "got"),
    [(None, "none"), (torch.ones(()), "1"), (1 / torch.tensor(GIVEN["a1_scale"]), None)],
)
def test_a_quantizer_that_is_given_no_scale_of_the_input(scale, got):
    quantized_by.clear()
    note(scale)
    found = [*wrong_input("nvfp4", input_scale(), GIVEN)]
    assert [(each.field, each.wanted, each.got) for each in found] == (
        [("input_scale", "1 / a1_scale", got)] if got else []
    )
    quantized_by.clear()
    assert input_scale() == {}
