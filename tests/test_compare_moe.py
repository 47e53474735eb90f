"""Error bars: right kernels never lie outside them, wrong ones always do, and are told apart.

`MOE_CASES=1000 pytest tests/test_compare_moe.py` runs the full count of random right kernels.
"""

import os
from dataclasses import replace

import pytest
import torch
from toy_kernel import STORED, Toy

from pytest_moe_routing.compare.defects import Problem
from pytest_moe_routing.compare.moe import assert_moe, compare_moe
from pytest_moe_routing.errors import LayerError
from pytest_moe_routing.logits import bell, integers
from pytest_moe_routing.reference.activation import activation
from pytest_moe_routing.reference.moe import SCHEMES, Layer, moe
from pytest_moe_routing.reference.quantization import quantize
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.weights import GeneratedExperts
from pytest_moe_routing.routing.recipe import Recipe

CASES = int(os.environ.get("MOE_CASES", "12"))
QUANTIZED = sorted(STORED)
ACTIVATED = [
    ("silu", None),
    ("swigluoai", 7.0),
    ("gelu", None),
    ("relu2", None),
    ("swiglustep", 7.0),
]
ROUNDINGS = [("order",), ("bf16",), ("tanh",), ("order", "bf16", "tanh")]
SCALES = {"fp8_per_tensor": 100 / 448, "nvfp4": 100 / 2688}


def make(
    scheme,
    *,
    seed=0,
    tokens=6,
    num_experts=8,
    size=128,
    act="silu",
    limit=None,
    louder=1.0,
    top_k=3,
    on_input=False,
    biases=False,
    scale=2.5,
):
    """A problem with its own right answer, and the toy kernel that solves it."""
    experts = GeneratedExperts(
        num_experts,
        size,
        size,
        SCHEMES[scheme].weight,
        gated=act != "relu2",
        biases=biases,
        intermediate_scale=SCALES.get(scheme),
        seed=seed,
    )
    hidden = quantize(louder * bell(tokens, size, seed=seed + 1), SCHEMES[scheme].input)
    logits = bell(tokens, num_experts, seed=seed + 2)
    bias = integers(num_experts, seed=seed + 3, bits=20).to(torch.float32) / 2**20
    recipe = Recipe(
        top_k,
        "sigmoid",
        bias=True,
        normalize="sum",
        scale=scale,
        weight_on="input" if on_input else "output",
    )
    layer = Layer(SCHEMES[scheme], activation(act, limit=limit))
    problem = Problem.of(hidden, experts, layer, recipe=recipe, logits=logits, bias=bias)
    toy = Toy(scheme, act, top_k, scale, on_input, limit)
    return problem, toy


def run(toy, problem):
    return toy(problem.hidden, problem.experts, problem.logits, problem.bias)


def mutant(toy, defect):
    return replace(toy, defect=defect, cache={})


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_right_kernels_are_never_flagged(scheme):
    for seed in range(CASES):
        act, limit = ACTIVATED[seed % 5]
        problem, toy = make(
            scheme,
            seed=31 * seed,
            tokens=2,
            act=act,
            limit=limit,
            louder=(1.0, 6.0)[seed // 5 % 2],
            on_input=seed % 7 == 6,
            biases=seed % 3 == 2,
        )
        toy.rounding = frozenset(ROUNDINGS[seed % 4])
        result = compare_moe(run(toy, problem), problem)
        assert result.ok, f"seed {seed}, {act}: {result.message()}"


#: What is wrong with the toy kernel, what must be said about it, and the case that can show it.
MUTANTS = {
    "no scale": ("the routed scaling factor is missing", {}),
    "scale twice": ("the routed scaling factor is applied twice", {}),
    "wrong side": ("the router weight is on the wrong side of the expert", {}),
    "swapped": ("gate and up are swapped", {}),
    "next expert": ("experts are off by one: each token's next one is used", {}),
    "truncated": ("the last of the top_k experts is left out", {}),
    "no bias": ("the router's correction bias is ignored", {}),
    "rounded bias": (
        "the router's correction bias is rounded to bfloat16",
        {"num_experts": 32, "tokens": 8},
    ),
    "no clamp": ("the activation's clamp is missing", {"act": "swigluoai", "limit": 2.0}),
    "no expert bias": ("the experts' biases are ignored", {"biases": True}),
    "scale row": ("block scales of the first GEMM are one row off", {"size": 256}),
    "transposed scales": ("scales of the hidden states are read transposed", {}),
}
WITHOUT_BLOCKS = {"bf16", "fp8_per_tensor"}
WITHOUT_INPUT_BLOCKS = {"bf16", "fp8_per_tensor", "mxfp4_bf16", "mxint4", "fp8_block"}


def narrow(problem):
    """The same problem with a bias that bfloat16 cannot hold: a band of 1/4 at 7."""
    bias = 6.8125 + problem.bias / 4
    return Problem.of(
        problem.hidden,
        problem.experts,
        problem.layer,
        recipe=problem.recipe,
        logits=problem.logits - 4,
        bias=bias,
    )


@pytest.mark.parametrize("defect", MUTANTS)
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_mutants_are_caught_and_diagnosed(scheme, defect):
    said, how = MUTANTS[defect]
    if defect == "scale row" and scheme in WITHOUT_BLOCKS:
        pytest.skip(f"{scheme} has no block scales")
    if defect == "transposed scales" and scheme in WITHOUT_INPUT_BLOCKS:
        pytest.skip(f"hidden states of {scheme} have no scales, or one each")
    problem, toy = make(scheme, seed=5, **how)
    if defect == "rounded bias":
        problem = narrow(problem)
    right = compare_moe(run(toy, problem), problem)
    assert right.ok, right.message()
    wrong = compare_moe(run(mutant(toy, defect), problem), problem)
    assert wrong.diagnosis == (said,), wrong.message()
    assert said in wrong.message()


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_weight_on_the_output_instead_of_the_input_is_diagnosed(scheme):
    problem, toy = make(scheme, seed=8, on_input=True)
    assert_moe(run(toy, problem), problem)
    wrong = compare_moe(run(mutant(toy, "wrong side"), problem), problem)
    assert wrong.diagnosis == (MUTANTS["wrong side"][0],), wrong.message()
