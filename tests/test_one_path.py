"""The suite, `explain` and `history` decide target, release and FlashInfer in one way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from test_history import wheel
from wheels import find_wheel

from pytest_moe_routing.cli import main
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.record import VerdictRecord
from pytest_moe_routing.report import records

MODELS = load_models(packaged_directory())


def deciding(record):
    names = (
        "model",
        "scheme",
        "target",
        "release",
        "flashinfer",
        "judged_as",
        "verdict",
        "findings",
    )
    return tuple(str(record[name]) for name in names)


def explained(target, model, capsys):
    capsys.readouterr()
    status = main(["explain", model, "--target", target, "--json"])
    found = capsys.readouterr()
    assert status in (0, 1), found.err
    return {deciding(record) for record in json.loads(found.out)["verdicts"]}


def by_history(target, path, models, tmp_path):
    out = tmp_path / "h.json"
    main(["history", target, str(path), "--models", models, "--all", "-o", str(out)])
    [release] = json.loads(out.read_text())["releases"]
    return {deciding(record) for record in release["verdicts"]}


def by_suite(pytester, target, models, *args):
    run = ("--moe-golden", "-m", "not gpu", "-k", "test_verdict[", "-p", "no:cacheprovider", "-n0")
    pytester.runpytest_subprocess(
        *run, "--moe-target", target, "--moe-models", models, "--moe-report", "r.jsonl", *args
    )
    found = records.load(pytester.path / "r.jsonl")
    return {deciding(r.as_dict()) for r in found if isinstance(r, VerdictRecord)}


def published(found):
    return {r for r in found if "@" not in r[0] and r[1] in MODELS[r[0]].checkpoints}


def test_a_wheels_own_flashinfer_is_what_all_three_judge_against(
    pytester, tmp_path, monkeypatch, capsys
):
    """Every model, on a framework that pins another release than the newest."""
    info = tmp_path / "site" / "faketarget-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: faketarget\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moe_routing.targets]\nfake = test_history:Fake\n")
    for place in (Path(__file__).parent, tmp_path / "site"):
        monkeypatch.syspath_prepend(str(place))
        monkeypatch.setenv("PYTHONPATH", str(place), prepend=os.pathsep)
    path = wheel(tmp_path, "0.22.1", "0.6.12")
    suite = published(by_suite(pytester, f"fake@{path}", "*"))
    assert {record[4] for record in suite} == {"0.6.12"}
    assert by_history("fake", path, "*", tmp_path) == suite
    judged = [model for model in MODELS if any(record[0] == model for record in suite)]
    assert len(judged) > 50
    assert {r for m in judged for r in published(explained(f"fake@{path}", m, capsys))} == suite


@pytest.mark.parametrize("release", ["vllm 0.22.1", "vllm 0.32.0", "sglang 0.5.18"])
def test_real_wheels_too(pytester, tmp_path, capsys, release):
    name, _, version = release.partition(" ")
    path = find_wheel(release) or find_wheel(f"{name}_cpu {version}")
    if path is None:
        pytest.skip(f"MOE_WHEELS has no {release}")
    models = ["step-3.7-flash", "deepseek-r1", "llama-4-scout"]
    suite = published(by_suite(pytester, f"{name}@{path}", ",".join(models)))
    assert by_history(name, path, ",".join(models), tmp_path) == suite
    assert {r for m in models for r in published(explained(f"{name}@{path}", m, capsys))} == suite
