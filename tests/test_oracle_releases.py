"""Releases that were reported to route wrongly, and those that put it right, against the oracle.

The routers come out of wheels (`pip download --no-deps transformers==5.0.0`) in the folders that
MOE_WHEELS names. An affected release must fail on the patterns that are for its defect and on no
other, and a fixed one on none. That the reported defect is what fails is computed as well: with that
one mistake, the reference comes to the same experts and weights. So these releases are the oracle of
`compare.mistakes` too.

All of these routers use torch.topk, which leaves the order of ties open, so patterns made of exact
ties are left out.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import pytest
import torch
from old_releases import call_function, load_function, run_blocks, small_config
from wheels import find_wheel

from pytest_moe_routing.compare import assert_routing, mistakes
from pytest_moe_routing.compare.mistakes import Mistake
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.logits import PATTERNS, make_case
from pytest_moe_routing.models import load_models
from pytest_moe_routing.routing import recipe_of

MODELS = load_models(packaged_directory())
TOKENS = 48
#: `saturated` scores are all 1 in float32, and `not-finite` has rows of equal logits.
TIES = {"ties-at-k", "ties-at-groups", "saturated", "not-finite"}
BFLOAT16_TIES = {*TIES, "near-ties"}
#: Patterns with a bias, where no score underflows.
BIAS = {
    "plain",
    "all-negative",
    "deep-negative-high-bias",
    "hot-expert",
    "bias-below-minus-1",
    "narrow-bias",
}


def says(problem, unit, wanted=r"\S+", got=r"\S+"):
    """What a failure says of a token: the problem, and both routings with a number per expert."""
    ends = rf"  \(expert: {unit}\)"
    wanted, got = (rf"\d+: {number}(  \d+: {number})*{ends}" for number in (wanted, got))
    return rf"token \d+: {problem}\n +wanted {wanted}\n +got +{got}\n"


@dataclass(frozen=True)
class Fault:
    """What a router does wrong, which patterns show it, and what a failure says of it.

    The message tells of a token, the diagnosis of all tokens of a pattern. It is the mistake's name,
    or its plainer part (`also`) where that explains them; `undiagnosed` patterns have none, as the
    router does one thing more there.
    """

    mistake: Mistake
    patterns: set
    message: str
    also: tuple = ()
    undiagnosed: frozenset = frozenset()


@dataclass(frozen=True)
class Report:
    """A defect that was reported of a router.

    Attributes:
        router: A function in a file of the wheel, and constants that it reads; or the folder, block
            and config class of a model of transformers.
        model: Model of the zoo, whose recipe the router should compute.
        changes: Of that recipe.
        affected, fixed: Releases that have the defect, and do not, if any could be had.
    """

    name: str
    router: tuple
    model: str
    changes: dict
    affected: str | None
    fixed: str | None
    fault: Fault
    dtype: torch.dtype = torch.float32

    @property
    def recipe(self):
        return replace(recipe_of(MODELS[self.model].router), **self.changes)

    @property
    def num_experts(self):
        return MODELS[self.model].router.num_experts

    def inputs(self):
        """Logits and bias by pattern."""
        found = {}
        for name in PATTERNS:
            if name not in (BFLOAT16_TIES if self.dtype == torch.bfloat16 else TIES):
                case = make_case(name, self.recipe, num_tokens=TOKENS, num_experts=self.num_experts)
                found[name] = case.logits.to(self.dtype), case.bias
        return found


NUMBERS = r"[-\d.e]+(?: [-\d.e]+)*"
EXPERTS = (
    r"experts \[.+\] instead of \[.+\]\n"
    rf" +because experts {NUMBERS} lie in groups? {NUMBERS}, which (?:is|are) not kept; "
    rf"the kept groups? (?:is|are) {NUMBERS} \(scores {NUMBERS}\), and groups? {NUMBERS} (?:has|have) {NUMBERS}"
)
HIGHER = "; their selection scores are higher, but count only within kept groups"
WEIGHT = r"expert \d+ weighs \S+, allowed \d\S* to \d\S*"

#: All that remains has negative keys, so 0 wins.
MASK_ZERO = Fault(
    mistakes.MASKED_WITH_0, {"bias-below-minus-1"}, says(EXPERTS, "selection score", wanted=r"-\S+")
)
MAX = Fault(
    mistakes.RANKED_BY_MAX_AND_MASKED,
    {*BIAS, "near-ties"},
    says(f"{EXPERTS}({HIGHER})?", "selection score"),
    also=(mistakes.RANKED_BY_MAX.name,),
)
BIASED = Fault(mistakes.BIASED_WEIGHTS, {*BIAS, "below-minus-100"}, says(WEIGHT, "weight"))
#: It divides by no less than `moe_norm_min`, as well where the sum is negative.
ERNIES = replace(BIASED, undiagnosed=frozenset({"bias-below-minus-1"}))
BFLOAT16 = Fault(mistakes.BFLOAT16_ROUTER, BIAS, says(WEIGHT, "weight"))
NO_EPSILON = Fault(mistakes.NO_EPSILON, {"below-minus-100"}, says(WEIGHT, "weight", got="nan"))

VLLM = "vllm/model_executor/layers/fused_moe"
VLLM_0_7 = (f"{VLLM}/fused_moe.py", "grouped_topk")
VLLM_0_33 = (f"{VLLM}/router/grouped_topk_router.py", "grouped_topk")
VLLM_CPU = (f"{VLLM}/cpu_fused_moe.py", "grouped_topk")
SGLANG_0_4, SGLANG_GROUPED, SGLANG_BIASED = (
    ("sglang/srt/layers/moe/topk.py", name, "_RENORMALIZE_SUM_EPSILON")
    for name in ("biased_grouped_topk", "biased_grouped_topk_impl", "biased_topk_impl")
)
DEEPSEEK = ("deepseek_v3", "DeepseekV3MoE", "DeepseekV3Config")
GLM = ("glm4_moe", "Glm4MoeMoE", "Glm4MoeConfig")
DOTS = ("dots1", "Dots1MoE", "Dots1Config")
ERNIE = ("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock", "Ernie4_5_MoeConfig")

# Functions leave the scale to their callers, and vLLM's have no epsilon.
UNSCALED = {"scale": 1.0}
BARE = {"scale": 1.0, "epsilon": 0.0}

# fmt: off
REPORTS = [
    # transformers issue 45440, PR 45441. GLM-4.5 itself has no groups.
    Report("mask-zero", DEEPSEEK, "deepseek-r1", {}, "transformers 5.0.0", "transformers 5.6.2", MASK_ZERO),
    Report("mask-zero", GLM, "glm-4.5", {"n_group": 8, "topk_group": 4}, "transformers 5.0.0", "transformers 5.6.2", MASK_ZERO),
    # transformers PR 41663, 42546
    Report("biased-weights", DOTS, "dots.llm1", {}, "transformers 5.0.0rc0", "transformers 5.0.0", BIASED),
    # transformers PR 39581 was in before Ernie 4.5's first release, 4.54.0, and was lost once.
    Report("biased-weights", ERNIE, "ernie-4.5-21b-a3b", {}, "transformers 5.0.0rc0", "transformers 5.0.0", ERNIES),
    # vLLM PR 13474, of two defects
    Report("group-max", VLLM_0_7, "deepseek-r1", BARE, "vllm 0.7.2", "vllm 0.7.3", MAX),
    Report("mask-zero", VLLM_0_7, "deepseek-r1", {**BARE, "group_score": "max"}, "vllm 0.7.2", None, MASK_ZERO),
    # SGLang PR 3705
    Report("mask-zero", SGLANG_0_4, "deepseek-r1", BARE, "sglang 0.4.3.post2", "sglang 0.4.3.post3", MASK_ZERO),
    # vLLM PR 14027, never merged: bfloat16 logits are scored in bfloat16, but not by the CPU's router.
    Report("bfloat16", VLLM_0_7, "deepseek-r1", BARE, "vllm 0.7.3", None, BFLOAT16, torch.bfloat16),
    Report("bfloat16", VLLM_0_33, "deepseek-r1", BARE, "vllm 0.33.0", None, BFLOAT16, torch.bfloat16),
    Report("bfloat16", VLLM_CPU, "deepseek-r1", BARE, None, "vllm_cpu 0.15.0", BFLOAT16, torch.bfloat16),
    # SGLang PR 31017
    Report("no-epsilon", SGLANG_GROUPED, "deepseek-r1", UNSCALED, "sglang 0.5.16", "sglang 0.5.17", NO_EPSILON),
    Report("no-epsilon", SGLANG_BIASED, "glm-4.5", UNSCALED, "sglang 0.5.16", "sglang 0.5.17", NO_EPSILON),
]
# fmt: on


def each(attribute):
    """Reports with such a release, and the release."""
    cases = {}
    for report in REPORTS:
        if release := getattr(report, attribute):
            cases[f"{report.name}-{release.replace(' ', '-')}-{report.router[1]}"] = report, release
    return pytest.mark.parametrize(("report", "release"), list(cases.values()), ids=list(cases))


@functools.cache
def blocks_of(release):
    """Outputs by router of all reports about a release of transformers, from one process."""
    reports = [report for report in REPORTS if release in (report.affected, report.fixed)]
    jobs = [
        (*r.router, small_config(r.recipe, r.num_experts), list(r.inputs().values()))
        for r in reports
    ]
    found = run_blocks(find_wheel(release), jobs)
    return {report.router: outputs for report, outputs in zip(reports, found, strict=True)}


def outputs_of(report, release):
    """Experts and weights by pattern, as the release's router gives them."""
    wheel, inputs = find_wheel(release), report.inputs()
    if wheel is None:
        pytest.skip(f"MOE_WHEELS has no {release}")
    if release.startswith("transformers "):
        return dict(zip(inputs, blocks_of(release)[report.router], strict=True))
    function = load_function(wheel, *report.router)
    return {
        pattern: call_function(function, logits, report.recipe, bias)
        for pattern, (logits, bias) in inputs.items()
    }


def failures_of(report, outputs):
    """What the oracle says, by pattern."""
    messages = {}
    for pattern, (logits, bias) in report.inputs().items():
        try:
            assert_routing(*outputs[pattern], logits, report.recipe, bias)
        except AssertionError as error:
            messages[pattern] = str(error)
    return messages


@each("affected")
def test_affected(report, release):
    fault, outputs, inputs = report.fault, outputs_of(report, release), report.inputs()
    failures = failures_of(report, outputs)
    assert set(failures) == fault.patterns
    for pattern, message in failures.items():
        assert re.search(fault.message, message), message
        diagnoses = re.findall(r"^  diagnosis  (.*)$", message, re.MULTILINE)
        if pattern in fault.undiagnosed:
            assert diagnoses == []
            continue
        assert diagnoses in ([fault.mistake.name], *([name] for name in fault.also)), message
        logits, bias = inputs[pattern]
        made = fault.mistake.made(mistakes.Inputs(logits, report.recipe, bias))
        assert_routing(*outputs[pattern], made.logits, made.recipe, made.bias)


@each("fixed")
def test_fixed(report, release):
    assert failures_of(report, outputs_of(report, release)) == {}
