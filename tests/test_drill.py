"""A renamed name of a framework makes what depends on it not judged, or changes nothing.

`tox -e drill` drills every name of both contracts; here are those that once went unnoticed, and a
few others, chosen by the commit.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import drilling
import pytest

PACKAGES = [package for package in drilling.RELEASES if drilling.wheel_of(package)]
#: In vLLM what was renamed when nobody noticed: the experts, their call, a gate, the layer and the
#: router. In SGLang what stands for them.
NAMED = {
    "vllm": (
        "experts-fp8",
        "experts-nvfp4",
        "kernel.apply_monolithic",
        "gates-fp8._supports_router_logits_dtype",
        "layer-factory",
        "router-factory",
    ),
    "sglang": (
        "layer",
        "topk.forward_cuda",
        "runners.FLASHINFER_TRTLLM",
        "config-modelopt-fp4",
        "layer-class",
        "stand-ins.context.get_parallel",
    ),
}
#: So many others of each contract.
CHOSEN = 10


def commit():
    """The commit's hash, or where there is none, something else that stays for a while."""
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return done.stdout.strip() or "no repository"


@pytest.fixture(scope="module", params=PACKAGES)
def drilled(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tree = drilling.Tree(request.param, drilling.wheel_of(request.param), folder)
    return tree, drilling.answers(tree)


def test_the_baseline_is_judged(drilled):
    tree, before = drilled
    own = [f"{m}-{s}" for m in drilling.models() for s in m.checkpoints]
    assert {before[case][0] for case in own if case in before} == {"judged"}
    if tree.package == "vllm":
        assert {before[case][1]["verdict"] for case in own if case in before} == {"exact"}


@pytest.mark.parametrize("way", drilling.WAYS)
@pytest.mark.parametrize("number", range(6 + CHOSEN))
def test_no_rename_goes_unnoticed(drilled, number, way):
    tree, before = drilled
    named = NAMED[tree.package]
    others = sorted(set(tree.keys()) - set(named))
    chosen = [*named, *random.Random(commit()).sample(others, CHOSEN)]
    key = chosen[number]
    kind, text = drilling.drill(tree, before, key, way)
    assert drilling.is_seen(kind, way), f"{key}: {kind}: {text}"
    if key in named:
        assert kind == drilling.NOT_JUDGED, text
        assert "contract row" in text or "does not import" in text


@pytest.mark.parametrize("way", drilling.WAYS)
def test_a_run_with_a_renamed_name_is_red(drilled, way, pytester, monkeypatch):
    """Through pytest and a child process: exit code 1, and the summary names the contract's row."""
    tree, _ = drilled
    key = NAMED[tree.package][0]
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    options = ["--moe-golden", "--moe-target", f"{tree.package}@{tree.root}", "-p", "no:xdist"]
    verdict = "test_verdict["
    chosen = ["--moe-models", "deepseek-r1", "--moe-schemes", "nvfp4,fp8_block", "-k", verdict]
    assert pytester.runpytest_subprocess(*options, *chosen).ret == 0
    with tree.renamed(key, way):
        result = pytester.runpytest_subprocess(*options, *chosen)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        ["moe-routing: * not judged, although this framework release*", f"*{key}*"]
    )


def test_a_run_with_a_name_lost_in_a_part_is_red(drilled, pytester, monkeypatch):
    """One that a test needs for some of its questions, although it passes for the others."""
    tree, _ = drilled
    if tree.package != "vllm":
        pytest.skip("the name is one of vLLM")
    key = "modular-cutedsl"
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    options = ["--moe-golden", "--moe-target", f"vllm@{tree.root}", "-p", "no:xdist"]
    chosen = ["--moe-models", "deepseek-r1", "--moe-schemes", "nvfp4", "-k", "test_layouts["]
    assert pytester.runpytest_subprocess(*options, *chosen).ret == 0
    with tree.renamed(key, "everywhere"):
        result = pytester.runpytest_subprocess(*options, *chosen)
    assert result.ret == 1
    result.assert_outcomes(passed=1)
    result.stdout.fnmatch_lines(
        ["moe-routing: 1 case is not judged, although this framework release*", f"*{key}*"]
    )


def test_a_crash_of_another_cause_is_seen():
    def crash(kind, field):
        findings = [{"kind": kind, "field": field, "got": 0}]
        return ("judged", {"verdict": "crash", "findings": findings})

    def became(*answer):
        return drilling.outcome({"a": crash("limit", "n_group")}, {"a": answer}, "x")[0]

    assert became(*crash("limit", "n_group")) == drilling.IDENTICAL
    assert became(*crash("raised", "forward")) == drilling.RED
    other = crash("limit", "n_group")
    other[1]["notes"] = ["changed"]
    assert became(*other) == drilling.SILENT
    assert became("judged", {"verdict": "exact"}) == drilling.SILENT
