"""Each family's router, run from transformers on a CPU, against our reference driven by its config.

Any release from 5.19.0 on is asked for the families that it has; 5.19.0 and 5.24.0 were tried.

The family's config class makes a small config, which is saved as config.json and imported. The
router's own class then gets hidden states, and its experts and weights must be those of `route`
given nothing but the imported recipe. With the identity as its weight, a router sees the very
logits that we want it to see.

torch.topk, which all of these routers use, leaves the order of ties open: an expert may differ
where the reference's own keys are as close as the router's rounding. So the patterns made of ties
(`ties-at-k`, `ties-at-groups`) say nothing here. Neither do `not-finite`, for which no router has a
meaning, and `below-minus-100`, where scores underflow and routers without an epsilon give NaN.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pytest_moe_routing.logits import bell, make_case
from pytest_moe_routing.models import read_config
from pytest_moe_routing.models.huggingface.families import table
from pytest_moe_routing.reference import routing as reference
from pytest_moe_routing.routing import recipe_of

pytest.importorskip("transformers", reason="the oracle is the transformers library")

import transformers_routers
from transformers_routers import (
    EXPERTS_INEXPRESSIBLE,
    GROUPED,
    LOGITS,
    NOT_COMPARED,
    VOID,
    Case,
    E,
    is_there,
    make_config,
    make_router,
)

CASES = [case for case in transformers_routers.CASES if is_there(case.family)]
INEXPRESSIBLE = [case for case in transformers_routers.INEXPRESSIBLE if is_there(case.family)]

pytestmark = pytest.mark.filterwarnings("ignore")  # the library's own

TOKENS = 48
PATTERNS = (
    "plain",
    "all-negative",
    "deep-negative-high-bias",
    "saturated",
    "near-ties",
    "hot-expert",
    "bias-below-minus-1",
    "narrow-bias",
)
#: Random hidden states and a random gate, instead of chosen logits.
HIDDEN_STATES = "hidden states"

MUTATIONS = {
    "bias ignored": lambda r: replace(r, correction_bias=None),
    "groups ignored": lambda r: replace(r, n_group=None, topk_group=None, group_score=None),
    "other group score": lambda r: replace(
        r, group_score={"max": "top2_sum", "top2_sum": "max"}.get(r.group_score)
    ),
    "renormalize flipped": lambda r: replace(r, renormalize=not r.renormalize),
    "scale ignored": lambda r: replace(r, routed_scaling_factor=1.0),
    "other score": lambda r: replace(
        r, scoring_func="sigmoid" if r.scoring_func == "softmax" else "softmax"
    ),
}


def imported(case, folder):
    make_config(case).save_pretrained(folder)
    return read_config(folder).router


@torch.no_grad()
def fill(router, bias, gate):
    """Set the gate's weight, the correction bias, and anything else that is learned."""
    gates = 0
    for seed, (name, tensor) in enumerate([*router.named_parameters(), *router.named_buffers()]):
        if name.endswith("e_score_correction_bias") and bias is not None and tensor.numel() == E:
            tensor.copy_(bias.view_as(tensor))
        elif tensor.shape == (E, E):
            tensor.copy_(gate)
            gates += 1
        elif tensor.is_floating_point():
            tensor.copy_(bell(*tensor.shape, seed=seed))
    return gates


def run(case, router, recipe, pattern, dtype=torch.float32):
    """Feed one pattern to the router: (experts, weights, the logits it saw, the bias it added)."""
    name = "plain" if pattern == HIDDEN_STATES else pattern
    inputs = make_case(name, recipe, num_tokens=TOKENS, num_experts=E)
    bias = None if inputs.bias is None else inputs.bias.to(dtype)
    gate = bell(E, E, seed=5) / 4 if pattern == HIDDEN_STATES else torch.eye(E)
    fill(router.to(dtype), bias, gate)
    with torch.no_grad():
        ids, weights, logits = case.call(router, inputs.logits.to(dtype), bias)
    return ids, weights.to(torch.float64), logits, bias


def tolerances(dtype, rounds_scores):
    """Largest relative errors of a key and of a weight.

    float32 has steps of 2**-23 and a softmax sums 32 of them. bfloat16 has steps of 2**-7, by half
    of which a key is wrong twice (score, sum with the bias), and a weight twice (itself, and scaled
    by the block); or four times, where scores are rounded (score, sum, quotient, scale).
    """
    if dtype == torch.float32:
        return 2e-6, 4e-6
    return (2.0**-7, 2.0**-6) if rounds_scores else (2e-6, 2.0**-7 + 4e-6)


def differences(recipe, outputs, key_error, weight_error):
    """Tokens routed otherwise than the recipe says, and how many experts differ within rounding."""
    ids, weights, logits, bias = outputs
    logits = logits.to(torch.float64)
    bias = bias if recipe.bias else None
    keys = reference.choosing_keys(reference.score(logits, recipe.score), recipe, bias)
    nothing = torch.zeros_like(keys, dtype=torch.bool)
    wanted = nothing.scatter(1, reference.choose(keys, recipe), True)
    chosen = nothing.scatter(1, ids, True)
    other = (chosen != wanted).any(1)
    # Scores near 1 have an error even where the key, with a bias, is near 0.
    slack = 2 * key_error * keys.abs().amax(1).clamp_min(1.0)
    taken = keys.masked_fill(~(chosen & ~wanted), torch.inf).amin(1)
    passed_over = keys.masked_fill(~(wanted & ~chosen), -torch.inf).amax(1)
    ambiguous = passed_over - taken <= slack
    if recipe.grouped:
        ranked = reference.group_scores(keys, recipe).sort(1, descending=True).values
        ambiguous |= ranked[:, recipe.topk_group - 1] - ranked[:, recipe.topk_group] <= 2 * slack
    ambiguous &= other & (chosen.sum(1) == recipe.top_k)
    exact = reference.weigh(logits, recipe, ids)
    off = (weights - exact).abs() > weight_error * exact.abs() + 2.0**-126
    wrong = (other & ~ambiguous) | off.any(1)
    return wrong.nonzero().flatten().tolist(), int(ambiguous.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_router(case, dtype, tmp_path):
    spec = imported(case, tmp_path)
    assert spec.not_expressible is None
    recipe = recipe_of(spec)
    router, found = make_router(case), {}
    for pattern in (*PATTERNS, HIDDEN_STATES):
        outputs = run(case, router, recipe, pattern, dtype)
        wrong, ambiguous = differences(recipe, outputs, *tolerances(dtype, case.rounds_scores))
        if wrong:
            found[pattern] = f"{len(wrong)} of {TOKENS} tokens, first {wrong[0]}"
        if pattern == "plain" and dtype == torch.float32:
            assert ambiguous == 0, "these logits are far enough apart to tell"
    assert not found, f"{recipe}: {found}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_mutations_are_seen(case, tmp_path):
    """Every step of every router counts: a recipe without it, or with another, does not pass."""
    spec = imported(case, tmp_path)
    recipe = recipe_of(spec)
    router = make_router(case)
    outputs = [run(case, router, recipe, pattern) for pattern in PATTERNS]
    within = tolerances(torch.float32, False)
    void, unseen = set(), set()
    for name, mutate in MUTATIONS.items():
        mutated = recipe_of(mutate(spec))
        if mutated.as_dict() == recipe.as_dict():
            void.add(name)
        elif not any(differences(mutated, output, *within)[0] for output in outputs):
            unseen.add(name)
    assert not unseen
    assert void == {*VOID[table().families[case.family].router], *case.void}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gate_is_found(case):
    assert fill(make_router(case), None, torch.eye(E)) == 1


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_dtype_of_the_logits(case, tmp_path):
    """The family's `logits_dtype`, or what is recorded of transformers where that is another."""
    spec = imported(case, tmp_path)
    logits = run(case, make_router(case), recipe_of(spec), "plain", torch.bfloat16)[2]
    stated = getattr(torch, spec.logits_dtype)
    assert LOGITS.get(case.family) != stated
    assert logits.dtype == LOGITS.get(case.family, stated)


@pytest.mark.parametrize("case", INEXPRESSIBLE, ids=str)
def test_what_no_recipe_expresses(case, tmp_path):
    """The import says so, and is right: the nearest recipe routes tokens otherwise."""
    spec = imported(case, tmp_path)
    assert spec.not_expressible
    recipe = recipe_of(spec)
    outputs = run(case, make_router(case), recipe, "plain")
    # Zero experts have ids from num_experts on.
    no_experts = bool((outputs[0] >= spec.num_experts).any())
    assert no_experts or differences(recipe, outputs, *tolerances(torch.float32, False))[0]


def test_a_x_k2_fills_excluded_groups_with_0(tmp_path):
    """A defect of the library, if of none but it: its own comment says that it copies an original.

    A biased score can be negative, and then 0 wins: experts of the excluded groups are chosen. No
    published config of the family has groups, so the import takes them to mean what they mean in
    all other families (-inf).
    """
    case = Case("axk2", "AXK2TopkRouter", GROUPED)
    recipe = recipe_of(imported(case, tmp_path))
    within = tolerances(torch.float32, False)
    positive = run(case, make_router(case), recipe, "deep-negative-high-bias")
    assert differences(recipe, positive, *within)[0] == []
    negative = run(case, make_router(case), recipe, "bias-below-minus-1")
    assert len(differences(recipe, negative, *within)[0]) == TOKENS


@pytest.mark.parametrize(
    "case", [case for case in EXPERTS_INEXPRESSIBLE if is_there(case.family)], ids=str
)
def test_routers_of_experts_that_no_recipe_describes(case, tmp_path):
    spec = imported(case, tmp_path)
    assert "expert" in spec.not_expressible
    recipe = recipe_of(spec)
    outputs = run(case, make_router(case), recipe, "plain")
    assert differences(recipe, outputs, *tolerances(torch.float32, False)) == ([], 0)


def test_every_family_is_compared_or_listed():
    """In some release: families that are newer than the installed one count as well."""
    compared = {case.family for case in transformers_routers.CASES}
    others = (*transformers_routers.INEXPRESSIBLE, *EXPERTS_INEXPRESSIBLE)
    listed = {case.family for case in others} | NOT_COMPARED.keys()
    assert compared | listed == table().families.keys()
    assert not compared & NOT_COMPARED.keys()
    assert len(compared) >= 50
