"""Goldens in runs: a difference fails exactly its test, and no update ever loses one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pytest_moe_routing import goldens

MODEL = "minimax-m2"


@pytest.fixture
def own_goldens(host):
    """A golden directory of the host's own, with one model."""
    directory = host.path / "moe"
    shutil.copytree(goldens.packaged_directory() / MODEL, directory / MODEL)
    return directory


def run(host, *args):
    return host.runpytest_subprocess("--moe-models", MODEL, "-p", "no:cacheprovider", *args)


def files(directory):
    return {p.name: p.read_text() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_a_digit_in_a_model_fails_exactly_that_model(host, own_goldens):
    path = own_goldens / MODEL / "model.yaml"
    path.write_text(path.read_text().replace("hidden_size: 3072", "hidden_size: 3584"))
    result = host.runpytest_subprocess("--moe-golden", "-m", "not gpu", "--moe-golden-dir", "moe")
    assert re.findall(r"^FAILED .*::(\S+)", result.stdout.str(), re.M) == [
        "test_router[minimax-m2]"
    ]
    result.stdout.fnmatch_lines(
        [
            "*router.golden.json disagrees in 1 place:",
            "  spec.experts.hidden_size: golden 3072, now 3584",
            "  pytest --moe-golden --moe-golden-dir moe -m 'not gpu' --moe-models minimax-m2 "
            "--snapshot-update",
        ]
    )


def test_a_digit_that_moves_many_places_is_one_line(host, own_goldens):
    """A scaling factor is in every weight; other differences are still listed."""
    path = own_goldens / MODEL / "model.yaml"
    path.write_text(
        path.read_text().replace(
            "renormalize: true", "renormalize: true\n  routed_scaling_factor: 1.04"
        )
    )
    run = ("--moe-golden", "--moe-golden-dir", "moe", "-k", "test_routing")
    result = host.runpytest_subprocess(*run, "--moe-models", MODEL)
    text = re.sub(r"\d+ places", "N places", result.stdout.str())
    assert "routing.golden.json disagrees in N places:" in text
    assert "\n  weights x 1.04 in all N places, such as patterns." in text
    assert text.count(": golden ") == 1
    result.stdout.fnmatch_lines(
        ["  pytest --moe-golden --moe-golden-dir moe --moe-models minimax-m2 --snapshot-update"]
    )


def test_numbers_of_several_factors_are_listed():
    golden = {"weights": [0.5, 0.25, 0.125], "scale": [1.0, 2.0, 3.0]}
    now = {"weights": [0.55, 0.25, 0.25], "scale": [2.0, 4.0, 6.0]}
    found = list(goldens.differences(golden, now))
    assert goldens.disagreement(Path("x"), found, "again").splitlines() == [
        "x disagrees in 5 places:",
        "  scale x 2 in all 3 places, such as scale[0]: golden 1.0, now 2.0",
        "  weights[0]: golden 0.5, now 0.55",
        "  weights[2]: golden 0.125, now 0.25",
        "If the change is meant, review it and accept it with:",
        "  again",
    ]


@pytest.mark.parametrize(
    ("name", "pattern", "test"),
    [
        ("routing", r"0\.(\d{7})(\d)\b", "test_routing"),
        ("router", r'"top_k": 8', "test_router"),
        ("nvfp4", r'"method": "MiniMax2"', "test_scheme"),
    ],
)
def test_any_change_of_a_golden_fails_exactly_its_test(host, own_goldens, name, pattern, test):
    path = own_goldens / MODEL / f"{name}.golden.json"
    changes = {
        "routing": lambda m: f"0.{m[1]}{(int(m[2]) + 5) % 10}",
        "router": lambda m: '"top_k": 7',
    }
    text, count = re.subn(
        pattern, changes.get(name, lambda m: '"method": "Sigmoid"'), path.read_text(), count=1
    )
    assert count == 1
    path.write_text(text)
    result = run(host, "--moe-golden", "-m", "not gpu", "--moe-golden-dir", "moe")
    failed = re.findall(r"^FAILED .*::(\w+)", result.stdout.str(), re.M)
    assert failed == [test]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such golden file"),
        ("{", "not valid JSON"),
        ('{"format": 99}', "format: found 99, expected 1"),
        ("[1]", "format: found None, expected 1"),
    ],
)
def test_a_golden_that_cannot_be_read(host, own_goldens, text, message):
    path = own_goldens / MODEL / "router.golden.json"
    path.unlink() if text is None else path.write_text(text)
    result = run(
        host, "--moe-golden", "-m", "not gpu", "--moe-golden-dir", "moe", "-k", "test_router"
    )
    advice = "Write it with:" if text is None else "If the change is meant, *"
    result.stdout.fnmatch_lines([f"*{message}*", f"*{advice}", "*--snapshot-update"])
    assert result.ret == 1


def test_a_model_that_is_not_judged_is_one_line(host, own_goldens):
    path = own_goldens / MODEL / "model.yaml"
    path.write_text(f"{path.read_text()}\nunproven: [no source of the groups]\n")
    options = ("--moe-golden", "--moe-golden-dir", "moe", "-k", "test_scheme and fp8")
    text = run(host, *options).stdout.str()
    told = f"{MODEL} is not judged: no source of the groups; without a verdict, the scheme has no"
    assert f"\n{told} golden\n" in text
    assert "Unsupported" not in text


def test_a_stray_golden_is_reported(host, own_goldens):
    shutil.copy(
        own_goldens / MODEL / "nvfp4.golden.json", own_goldens / MODEL / "mxfp8.golden.json"
    )
    result = run(host, "--moe-golden", "-m", "not gpu", "--moe-golden-dir", "moe")
    result.stdout.fnmatch_lines(["*no test reads mxfp8.golden.json; delete them"])


def test_update_writes_what_is_then_read(host, own_goldens):
    before = files(own_goldens)
    for path in own_goldens.glob("*/*.golden.json"):
        path.unlink()
    run(
        host,
        "--moe-golden",
        "-m",
        "not gpu",
        "--moe-golden-dir",
        "moe",
        "--snapshot-update",
        "-n",
        "2",
    )
    assert files(own_goldens) == before
    assert run(host, "--moe-golden", "-m", "not gpu", "--moe-golden-dir", "moe").ret == 0


WAYS = {
    "one test": ("-k", "test_router"),
    "not gpu": ("-m", "not gpu"),
    "only gpu": ("-m", "gpu"),
    "collect only": ("--collect-only",),
    "first failure": ("-x",),
    "workers": ("-n", "2"),
    "no workers": ("-n0",),
    "without xdist": ("-p", "no:xdist"),
    "one scheme": ("--moe-schemes", "nvfp4"),
}


@pytest.mark.parametrize("way", WAYS)
def test_no_update_ever_loses_a_golden(host, own_goldens, way):
    (own_goldens / MODEL / "README.md").write_text("mine")
    (own_goldens / "notes.json").write_text("mine too")
    before = files(own_goldens)
    run(host, "--moe-golden", "--moe-golden-dir", "moe", "--snapshot-update", *WAYS[way])
    assert files(own_goldens) == before


@pytest.mark.parametrize(
    "disaster",
    ["raise RuntimeError('target broke')", "raise KeyboardInterrupt", "import os; os._exit(1)"],
    ids=["error", "interrupt", "crash"],
)
@pytest.mark.parametrize("workers", [("-n", "2"), ("-p", "no:xdist", "-x")], ids=["n2", "serial"])
def test_no_disaster_during_an_update_loses_a_golden(host, own_goldens, disaster, workers):
    before = files(own_goldens)
    host.makepyfile(
        disaster=f"""
        def pytest_runtest_call(item):
            if item.name.startswith("test_routing"):
                {disaster}
        """
    )
    result = run(
        host,
        *("-p", "disaster", "--moe-golden", "-m", "not gpu"),
        *("--moe-golden-dir", "moe", "--snapshot-update", *workers),
    )
    assert result.ret != 0
    assert files(own_goldens) == before


def test_a_golden_is_replaced_in_one_step(tmp_path, monkeypatch):
    from syrupy.data import Snapshot, SnapshotCollection

    from pytest_moe_routing.snapshot import GoldenExtension

    path = tmp_path / "router.golden.json"
    path.write_text("old")
    collection = SnapshotCollection(location=str(path))
    collection.add(Snapshot(name="router", data="new"))
    monkeypatch.setattr(
        Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("disk full"))
    )
    with pytest.raises(OSError, match="disk full"):
        GoldenExtension.write_snapshot_collection(snapshot_collection=collection)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"router.golden.json": "old"}


def test_goldens_hold_plain_data_only():
    with pytest.raises(TypeError, match="plain data"):
        goldens.serialize({"x": object()})
    with pytest.raises(TypeError, match="keys must be text"):
        goldens.serialize({"x": {1: 2}})
    text = goldens.serialize({"x": [float("nan"), float("inf"), 1 / 3, True, None, "a"]})
    assert json.loads(text)["x"] == ["nan", "inf", 0.33333333, True, None, "a"]


def test_a_number_one_unit_off_in_its_last_digit_is_a_difference():
    assert list(goldens.differences({"x": 0.33333333}, {"x": 1 / 3})) == []
    assert list(goldens.differences({"x": 0.33333333}, {"x": 1 / 3 * (1 + 1e-13)})) == []
    assert list(map(str, goldens.differences({"x": 0.33333334}, {"x": 1 / 3}))) == [
        "x: golden 0.33333334, now 0.33333333"
    ]
    assert len(list(goldens.differences({"a": 1, "b": [1, 2]}, {"b": [1, 3], "c": 0}))) == 3
    assert len(list(goldens.differences({"x": True}, {"x": 1}))) == 1


def test_garbage_collection_is_given_back():
    """A process that goes on after `pytest.main` collects what the run kept out of collection."""
    program = """
import gc, sys, pytest
class Watch:
    def pytest_sessionfinish(self):
        self.frozen, self.threshold = gc.get_freeze_count(), gc.get_threshold()
watch, before = Watch(), gc.get_threshold()
arguments = ["--moe-golden", "--moe-models", "minimax-m2", "-k", "test_method_numbers"]
assert pytest.main([*arguments, "-q", "-p", "no:cacheprovider"], plugins=[watch]) == 0
assert watch.frozen and not gc.get_freeze_count()
assert watch.threshold > before == gc.get_threshold()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
