"""`moe-routing history` and `moe-routing init`."""

from __future__ import annotations

import json
import sys
import zipfile

import pytest
from miniatures import Vllm022

from pytest_moe_routing.cli import main
from pytest_moe_routing.errors import TargetImportError, Unsupported
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_model
from pytest_moe_routing.targets.builtin.target import BuiltinTarget
from pytest_moe_routing.targets.framework import FrameworkTarget

MODELS = "step-3.7-flash,minimax-m2"
closed = []


class Fake(FrameworkTarget):
    """A framework whose releases are wheels: vLLM's old tree until 0.23."""

    name = "fake"
    package = "fakeframework"
    distributions = ("fakeframework",)

    def close(self):
        closed.append(self.source.version)

    def method_numbers(self):
        return self._tree.method_numbers()

    def classify(self, model):
        if self.source.version == "0.9.1":
            raise TargetImportError("fakeframework 0.9.1 fails to import: ImportError: no torch <2")
        return self._tree.classify(model)

    def gates(self, model, scheme, method):
        if self.source.version == "0.10.0" and scheme == "nvfp4":
            raise Unsupported("fakeframework 0.10.0 has no nvfp4")
        return self._tree.gates(model, scheme, method)

    @property
    def _tree(self):
        old = self.source.version in ("0.10.0", "0.22.1")
        return (Vllm022 if old else BuiltinTarget)(self.flashinfer)


def wheel(path, version, flashinfer="0.6.12"):
    with zipfile.ZipFile(path / f"{version}.whl", "w") as file:
        file.writestr("fakeframework/__init__.py", "")
        file.writestr(
            f"fakeframework-{version}.dist-info/METADATA",
            f"Name: fakeframework\nVersion: {version}\n"
            f"Requires-Dist: flashinfer-python=={flashinfer}\n",
        )
    return str(path / f"{version}.whl")


@pytest.fixture
def releases(tmp_path, monkeypatch):
    """Wheels of five releases, given newest first, of a target that is registered."""
    info = tmp_path / "site" / "faketarget-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: faketarget\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moe_routing.targets]\nfake = test_history:Fake\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(sys.modules, "test_history", sys.modules[__name__])
    closed.clear()
    return [
        wheel(tmp_path, "0.24.0", "0.6.13"),
        *(wheel(tmp_path, v) for v in ("0.23.0", "0.22.1", "0.10.0", "0.9.1")),
    ]


def test_the_history_of_a_target(releases, capsys):
    """Oldest first, each against its own FlashInfer; what cannot be asked does not end it."""
    assert main(["history", "fake", *releases, "--models", MODELS]) == 0
    lines = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    lines = [[cell.strip() for cell in line if cell] for line in lines]
    assert lines == [
        ["fake, 5 releases"],
        [],
        ["model", "scheme", "0.9.1 [1]", "0.10.0", "0.22.1", "0.23.0", "0.24.0"],
        ["step-3.7-flash", "fp8_block", "-", *["wrong (MiniMax2)"] * 2, "missed (Unspecified)", "exact (MiniMax2)"],
        ["step-3.7-flash", "nvfp4", "-", "not judged", "wrong (MiniMax2)", "missed (Unspecified)", "exact (MiniMax2)"],
        ["[1] fakeframework 0.9.1 fails to import: ImportError: no torch <2"],
        [],
        ["changes"],
        ["step-3.7-flash fp8_block: 0.22.1 wrong -> 0.23.0 missed"],
        ["step-3.7-flash fp8_block: 0.23.0 missed -> 0.24.0 exact"],
        ["step-3.7-flash nvfp4: 0.22.1 wrong -> 0.23.0 missed"],
        ["step-3.7-flash nvfp4: 0.23.0 missed -> 0.24.0 exact"],
        [],
        ["totals"],
        ["0.10.0, FlashInfer 0.6.12: 1 exact, 2 not judged, 1 wrong"],
        ["2 x fakeframework 0.10.0 has no nvfp4"],
        ["0.22.1, FlashInfer 0.6.12: 2 exact, 2 wrong"],
        ["0.23.0, FlashInfer 0.6.12: 2 exact, 2 missed"],
        ["0.24.0, FlashInfer 0.6.13: 4 exact"],
    ]  # fmt: skip
    assert sorted(closed) == ["0.10.0", "0.22.1", "0.23.0", "0.24.0", "0.9.1"]


def test_history_files_and_choices(releases, tmp_path, capsys):
    few = ["history", "fake", *releases[1:3], "--models", MODELS, "--schemes", "nvfp4"]
    assert main([*few, "--flashinfer", "0.6.13", "--all", "-o", str(tmp_path / "h.md")]) == 0
    text = (tmp_path / "h.md").read_text()
    assert "| minimax-m2 | nvfp4 | exact (MiniMax2) | exact (MiniMax2) |\n" in text
    assert "## Changes\n\nNone.\n" in text
    assert "- 0.22.1, FlashInfer 0.6.13: 2 exact\n" in text
    assert main([*few, "-o", str(tmp_path / "h.json")]) == 0
    data = json.loads((tmp_path / "h.json").read_text())
    assert [r["release"] for r in data["releases"]] == ["0.22.1", "0.23.0"]
    assert data["changes"] == ["step-3.7-flash nvfp4: 0.22.1 wrong -> 0.23.0 missed"]
    wrong = data["releases"][0]["verdicts"][1]
    assert (wrong["model"], wrong["verdict"]) == ("step-3.7-flash", "wrong")
    assert wrong["counterexample"]
    written = [f"history {tmp_path / name}" for name in ("h.md", "h.json")]
    assert capsys.readouterr().out.splitlines() == written


def test_two_places_with_one_release_are_two_columns(releases, tmp_path, capsys):
    (tmp_path / "again").mkdir()
    again = wheel(tmp_path / "again", "0.22.1", "0.6.13")
    assert main(["history", "fake", releases[2], again, "--models", "step-3.7-flash"]) == 0
    text = capsys.readouterr().out
    assert f"step-3.7-flash nvfp4: 0.22.1 {releases[2]} wrong -> 0.22.1 {again} exact" in text


def test_a_history_without_any_verdict_is_no_success(releases, capsys):
    assert main(["history", "fake", releases[-1], "--models", MODELS]) == 1
    text = capsys.readouterr().out
    assert "no verdict differs\n[1] fakeframework 0.9.1 fails to import" in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["vlm", "x"], "unknown target 'vlm'"),
        (["a:B", "x"], "found target 'a:B', expected a registered name"),
        (["fake", "nowhere.whl"], "no such file or directory"),
        (["fake", "WHEEL", "--models", "nope"], "models matches 'nope'"),
        (["fake", "WHEEL", "-o", "h.html"], "report h.html: found '.html', expected a name that ends in .md or .json"),
        (["fake", "WHEEL", "--flashinfer", "x"], "found 'x', expected a release"),
    ],
)  # fmt: skip
def test_misuse_of_history_is_one_line(releases, capsys, args, message):
    assert main(["history", *(releases[0] if a == "WHEEL" else a for a in args)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("model", ["deepseek-r1", "deepseek-v3.2"])
def test_init_begins_a_golden_directory(tmp_path, capsys, model):
    """One model, on its own feet even where the original is like another; never over a file."""
    directory = tmp_path / "moe"
    original = load_model(packaged_directory() / model)
    assert main(["init", str(directory), "--from", model]) == 0
    files = list(directory.rglob("model.yaml"))
    assert files == [directory / model / "model.yaml"]
    copied = load_model(directory / model)
    assert (copied.router, copied.experts) == (original.router, original.experts)
    commands = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  pytest")
    ]
    assert len(commands) == 2
    assert "--snapshot-update" in commands[0]
    assert all(f"--moe-golden-dir {directory}" in command for command in commands)
    (directory / model / "model.yaml").write_text("mine")
    assert main(["init", str(directory), "--from", model]) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
    assert (directory / model / "model.yaml").read_text() == "mine"


def test_init_from_nothing(tmp_path, capsys):
    assert main(["init", str(tmp_path / "moe"), "--from", "nope"]) == 2
    assert "no model 'nope'; models: " in capsys.readouterr().err
    assert not (tmp_path / "moe").exists()
