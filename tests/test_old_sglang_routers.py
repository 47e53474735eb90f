"""Routers of SGLang's releases before 0.5.18, whose MoE blocks are built among stubs.

Releases are those of which MOE_WHEELS has a wheel; without one, the tests are skipped.
"""

from __future__ import annotations

import pytest
from packaging.version import Version
from wheels import wheels_since

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.routers import NOT_JUDGED, PRECISION, WRONG, causes
from pytest_moe_routing.targets.sglang.probe.old_routers import OldRouters
from pytest_moe_routing.targets.sglang.target import SglangTarget
from pytest_moe_routing.targets.source import Source

MODELS = load_models(packaged_directory())
#: Each with the first release that has code for it.
CHOSEN = {
    "mixtral-8x7b": "0.4",
    "deepseek-r1": "0.4",
    "deepseek-v2": "0.4",
    "llama-4-scout": "0.4.6",
    "ernie-4.5-21b-a3b": "0.5",
    "step-3.5-flash": "0.5.9",
}


def release_of(wheel):
    return Version(wheel.name.split("-")[1])


WHEELS = [w for w in wheels_since("0.4", "sglang") if release_of(w) < Version("0.5.18")]


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: str(release_of(wheel)))
def test_old_functions_are_run_and_have_their_defects(wheel):
    """Experts of excluded groups took part until 0.4.3.post3, and the bias was rounded."""
    release = release_of(wheel)
    target = SglangTarget(FlashInfer.of("0.6.12"), Source.at("sglang", wheel))
    try:
        runs = [r for r in target.router_runs([MODELS[m] for m in CHOSEN]) if r.subject in CHOSEN]
        refusals = target._routers.refusals()
    finally:
        target.close()
    has = {model for model, since in CHOSEN.items() if release >= Version(since)}
    assert {model for model, text in refusals.items() if "this release has no" in text} == {
        *CHOSEN
    } - has
    judged = [run for run in runs if all(d.kind != NOT_JUDGED for d in run.deviations)]
    assert {run.subject for run in judged if run.way == "cuda"} == has
    found = {
        (run.subject, cause.kind)
        for cause in causes(judged, (*WRONG, PRECISION))
        for run in cause.runs
        if run.way == "cuda"
    }
    expected = set()
    if release < Version("0.4.3.post3"):
        expected |= {("deepseek-r1", "experts")}
    if release < Version("0.4.10"):
        expected |= {("deepseek-r1", PRECISION)}
    if release >= Version("0.5"):
        expected |= {("ernie-4.5-21b-a3b", "experts")}
    assert found == expected
    # Scaling by 2.5 is left to the experts of releases in between, whose code is not run.
    not_judged = {run.subject for run in runs if run not in judged}
    assert ("deepseek-r1" in not_judged) == (release >= Version("0.4.6"))
    assert {run.way for run in runs if run not in judged} <= {"cuda, output"}


#: What loses the routed scaling factor in each release: SGLang PRs 8333, 8364 and 12738.
LOSES = {
    "0.4.9.post3": {"Fp8MoEMethod", "ModelOptFp8MoEMethod", "ModelOptNvFp4FusedMoEMethod"},
    "0.4.10": {"Fp8MoEMethod", "ModelOptFp8MoEMethod", "UnquantizedFusedMoEMethod"},
    "0.4.10.post2": {"ModelOptFp8MoEMethod", "UnquantizedFusedMoEMethod"},
    "0.5.5": {
        *("AWQMoEMethod", "CompressedTensorsWNA16MoEMethod", "GPTQMarlinMoEMethod"),
        "Mxfp4MoEMethod",
    },
    "0.5.5.post3": {"AWQMoEMethod", "GPTQMarlinMoEMethod", "Mxfp4MoEMethod"},
    "0.5.16": set(),
}


@pytest.mark.parametrize(
    "wheel", [w for w in WHEELS if str(release_of(w)) in LOSES], ids=lambda w: str(release_of(w))
)
def test_methods_that_lose_the_factor(wheel):
    release = str(release_of(wheel))
    found = {run["function"] for run in OldRouters(str(wheel), release).lost_factors()}
    assert {name.partition(".")[0] for name in found} == LOSES[release]
