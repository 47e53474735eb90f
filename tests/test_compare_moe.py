"""Error bars: right kernels never lie outside them, wrong ones always do, and are told apart.

`MOE_CASES=1000 pytest tests/test_compare_moe.py` runs the full count of random right kernels.
"""

import os
import re
from dataclasses import replace
from functools import cache

import pytest
import torch
from fingerprints import FingerprintExperts
from toy_kernel import STORED, Toy

from pytest_moe_routing.compare import (
    Arithmetic,
    admissible_routings,
    assert_moe,
    compare_moe,
)
from pytest_moe_routing.errors import LayerError, RecipeError
from pytest_moe_routing.logits import bell, integers
from pytest_moe_routing.reference.activation import activation
from pytest_moe_routing.reference.moe import MoELayer, moe
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.quantization import quantize
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.weights import GeneratedExperts
from pytest_moe_routing.routing.recipe import Recipe
from pytest_moe_routing.schemes import storage_of

CASES = int(os.environ.get("MOE_CASES", "12"))
QUANTIZED = sorted(STORED)
ACTIVATED = [
    ("silu", None),
    ("swigluoai", 7.0),
    ("gelu", None),
    ("gelu_tanh", None),
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
        storage_of(scheme).weight,
        gated=act != "relu2",
        biases=biases,
        intermediate_scale=SCALES.get(scheme),
        seed=seed,
    )
    # Blocks of other sizes, so that their scales differ.
    sizes = 2.0 ** (integers(tokens, size // 32, seed=seed + 4, bits=2) - 2).to(torch.float32)
    hidden = louder * bell(tokens, size, seed=seed + 1) * sizes.repeat_interleave(32, 1)
    hidden = quantize(hidden, storage_of(scheme).input)
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
    layer = MoELayer(scheme, activation(act, limit=limit))
    problem = MoEProblem.of(hidden, experts, layer, recipe=recipe, logits=logits, bias=bias)
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
        {"num_experts": 64, "tokens": 16},
    ),
    "no clamp": ("the activation's clamp is missing", {"act": "swigluoai", "limit": 2.0}),
    "no expert bias": ("the experts' biases are ignored", {"biases": True}),
    "scale row": ("block scales of the first GEMM are one row off", {"size": 256}),
    "transposed scales": ("scales of the hidden states are read transposed", {"size": 256}),
}
WITHOUT_BLOCKS = {"bf16", "fp8_per_tensor"}
WITHOUT_INPUT_BLOCKS = {"bf16", "fp8_per_channel", "fp8_per_tensor", "mxfp4_bf16", "mxint4"}


def narrow(problem):
    """The same problem with a bias that bfloat16 cannot hold: a band of 1/4 at 7."""
    bias = 6.8125 + problem.bias / 4
    return MoEProblem.of(
        problem.hidden,
        problem.experts,
        problem.layer,
        recipe=problem.recipe,
        logits=problem.logits - 4,
        bias=bias,
    )


@cache
def judged_right(scheme, is_narrow, how):
    """A problem and its toy kernel, which is judged once for all mutants of that kernel."""
    problem, toy = make(scheme, seed=5, **dict(how))
    if is_narrow:
        problem = narrow(problem)
    right = compare_moe(run(toy, problem), problem)
    assert right.ok, right.message()
    return problem, toy


@pytest.mark.parametrize("defect", MUTANTS)
@pytest.mark.parametrize("scheme", QUANTIZED)
def test_mutants_are_caught_and_diagnosed(scheme, defect):
    said, how = MUTANTS[defect]
    if defect == "scale row" and scheme in WITHOUT_BLOCKS:
        pytest.skip(f"{scheme} has no block scales")
    if defect == "transposed scales" and scheme in WITHOUT_INPUT_BLOCKS:
        pytest.skip(f"hidden states of {scheme} have no scales, or one each")
    problem, toy = judged_right(scheme, defect == "rounded bias", tuple(how.items()))
    wrong = compare_moe(run(mutant(toy, defect), problem), problem)
    assert wrong.diagnosis == (said,), wrong.message()
    assert said in wrong.message()


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_a_weight_on_the_output_instead_of_the_input_is_diagnosed(scheme):
    problem, toy = make(scheme, seed=8, on_input=True)
    assert_moe(run(toy, problem), problem)
    wrong = compare_moe(run(mutant(toy, "wrong side"), problem), problem)
    assert wrong.diagnosis == (MUTANTS["wrong side"][0],), wrong.message()


def test_a_message_says_what_where_and_why():
    problem, toy = make("nvfp4", seed=5)
    output = run(mutant(toy, "no scale"), problem)
    with pytest.raises(AssertionError) as error:
        assert_moe(output, problem)
    text = str(error.value)
    assert text.startswith("6/6 tokens are wrong: ")
    assert "/768 elements exceed their error budget, by a factor of up to " in text
    assert "diagnosis  the routed scaling factor is missing" in text
    assert "token 0, element " in text
    first = ", ".join(map(str, problem.routing.topk_ids[0].tolist()))
    assert f"(experts {first})" in text


def test_one_element_is_enough_and_is_named():
    problem, toy = make("mxfp8", seed=5)
    output = run(toy, problem)
    output[3, 77] += 1.0
    result = compare_moe(output, problem)
    assert (result.wrong_tokens, result.wrong_elements, result.diagnosis) == (1, 1, ())
    assert (result.worst[0].token, result.worst[0].column) == (3, 77)
    assert "none of the known defects explains it" in result.message()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_wrong(poison):
    problem, toy = make("bf16", seed=5)
    output = run(toy, problem)
    output[0, 0] = poison
    assert compare_moe(output, problem, diagnose=False).wrong_elements == 1


def test_nan_is_right_where_the_reference_has_it():
    problem, toy = make("bf16", seed=5)
    problem.hidden.data[2] = torch.nan
    output = run(toy, problem)
    assert output[2].isnan().all()
    assert compare_moe(output, problem).ok


def ambiguous(error):
    """A problem whose tokens' third and fourth experts are closer than a sigmoid's error."""
    problem, toy = make("nvfp4", seed=5)
    logits = problem.logits.clone()
    keys = logits.sigmoid() + problem.bias
    order = keys.argsort(1, descending=True)
    rows = torch.arange(len(logits))
    third, fourth = order[:, 2], order[:, 3]
    key = keys[rows, third] - error - problem.bias[fourth]
    logits[rows, fourth] = key.clamp(0.001, 0.999).logit()
    return (
        replace(
            MoEProblem.of(
                problem.hidden,
                problem.experts,
                problem.layer,
                recipe=problem.recipe,
                logits=logits,
                bias=problem.bias,
            )
        ),
        toy,
        fourth,
        third,
    )


def test_an_ambiguous_token_may_have_either_expert():
    problem, toy, fourth, third = ambiguous(1e-4)
    swapped = problem.routing.topk_ids.clone()
    swapped[swapped == third.unsqueeze(1)] = fourth
    logits = problem.logits.clone()
    rows = torch.arange(len(logits))
    logits[rows, fourth] += 2e-3
    output = toy(problem.hidden, problem.experts, logits, problem.bias)
    alone = compare_moe(output, problem, diagnose=False)
    assert alone.wrong_tokens >= 3
    others = list(admissible_routings(problem.logits, problem.recipe, problem.bias))
    result = compare_moe(output, problem, alternatives=others, arithmetic=Arithmetic(weights=2e-3))
    assert result.ok, result.message()
    assert result.ambiguous >= 3


def test_an_ambiguous_token_must_fit_one_choice_in_all_of_its_elements():
    problem, toy, fourth, _ = ambiguous(1e-4)
    logits = problem.logits.clone()
    logits[torch.arange(len(logits)), fourth] += 2e-3
    output = toy(problem.hidden, problem.experts, logits, problem.bias)
    output[:, 77] += 100.0
    others = list(admissible_routings(problem.logits, problem.recipe, problem.bias))
    arithmetic = Arithmetic(weights=2e-3)
    found = compare_moe(output, problem, alternatives=others, arithmetic=arithmetic, diagnose=False)
    assert found.wrong_tokens == len(output)
    assert found.ambiguous == 0


def test_a_clear_token_may_not():
    problem, *_ = ambiguous(1e-2)
    assert list(admissible_routings(problem.logits, problem.recipe, problem.bias)) == []


def test_admissible_choices_are_found_within_groups():
    recipe = Recipe(2, "sigmoid", n_group=2, topk_group=1)
    logits = torch.tensor([[2.0, 1.0, 2.0, 0.9999, -3.0, -3.0, -3.0, -3.0]])
    logits = logits[:, [0, 1, 4, 5, 2, 3, 6, 7]]
    found = [r.topk_ids.tolist() for r in admissible_routings(logits, recipe)]
    assert found == [[[4, 5]]]


def test_too_much_ambiguity_is_refused():
    with pytest.raises(RecipeError, match=r"found 16 experts of one token within 0\.00025"):
        list(admissible_routings(torch.zeros(1, 16), Recipe(2, "sigmoid")))


@pytest.mark.parametrize("scheme", QUANTIZED)
def test_fingerprints_tell_which_experts_were_used(scheme):
    layer = MoELayer.of(scheme)
    experts = FingerprintExperts(6, 128, 128, layer, SCALES.get(scheme))
    ids = torch.tensor([[0, 1], [5, 2], [3, 4]])
    right = Routing(ids, torch.tensor([[0.75, 0.25], [0.5, 0.5], [1.5, 1.0]]))
    output = moe(experts.hidden(3), experts, right, layer)
    assert experts.read(output) == pytest.approx(right.dense(6), abs=0.02)
    assert experts.explain(output, right) == []
    wrong = Routing(torch.tensor([[0, 1], [5, 2], [3, 5]]), right.topk_weights)
    output = moe(experts.hidden(3), experts, wrong, layer)
    (line,) = experts.explain(output, right)
    used = r"3: 1\.[45]\d*  5: (1|1\.0\d|0\.99\d*)  \(expert: weight\)"
    assert re.fullmatch(rf"token 2: wanted 3: 1.5  4: 1, used {used}", line)


def test_mistakes_are_named():
    problem, toy = make("nvfp4", seed=5)
    output = run(toy, problem)
    with pytest.raises(LayerError, match=r"output: found torch.bfloat16 \[5, 128\], expected"):
        compare_moe(output[:5], problem)
    unscaled = replace(problem, experts=replace(problem.experts, intermediate_scale=None))
    with pytest.raises(LayerError, match="nvfp4: found no intermediate_scale"):
        compare_moe(output, unscaled)
    with pytest.raises(LayerError, match="neither a routing nor a recipe"):
        MoEProblem.of(problem.hidden, problem.experts, problem.layer)
    with pytest.raises(LayerError, match="hidden_size 4, which is too small to tell 6 experts"):
        FingerprintExperts(6, 4, 128, MoELayer.of("bf16"))
