"""`moe-routing check` and what `init` writes."""

from __future__ import annotations

import shutil

import pytest

from pytest_moe_routing.cli import main
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.ledger import load_ledger
from pytest_moe_routing.models import load_models


@pytest.fixture
def folder(tmp_path):
    for name in ("minimax-m2", "deepseek-r1"):
        shutil.copytree(packaged_directory() / name, tmp_path / name)
    return tmp_path


def checked(folder, capsys):
    status = main(["check", str(folder)])
    return status, capsys.readouterr().out.splitlines()


def test_valid_folders(folder, capsys):
    lines = ["deepseek-r1: valid", "minimax-m2: valid", "2 valid, 0 wrong"]
    assert checked(folder, capsys) == (0, lines)


def test_every_wrong_folder_is_named(folder, capsys):
    model = folder / "minimax-m2" / "model.yaml"
    model.write_text(model.read_text().replace("top_k: 8", "top_k: 800"))
    (folder / "deepseek-r1" / "mxfp8.golden.json").write_text('{"format": 1}')
    status, lines = checked(folder, capsys)
    assert status == 1
    assert lines[0] == "deepseek-r1: no test reads mxfp8.golden.json; delete them"
    assert "router.top_k: found 800, expected at most num_experts (256)" in lines[1]
    assert lines[2] == "0 valid, 2 wrong"


def test_links_that_lead_nowhere(folder, capsys):
    """They are models of which nothing can be read, and not no models."""
    for name, to in (("dangling", "nowhere"), ("loop", "model.yaml")):
        (folder / name).mkdir()
        (folder / name / "model.yaml").symlink_to(to)
    status, lines = checked(folder, capsys)
    assert status == 1
    assert "dangling/model.yaml: cannot be read: No such file" in lines[0]
    assert "loop/model.yaml: cannot be read: Too many levels" in lines[2]
    assert lines[-1] == "2 valid, 2 wrong"


def test_a_model_file_of_another_name_is_named(folder, capsys):
    (folder / "deepseek-r1" / "model.yaml").rename(folder / "deepseek-r1" / "model.yml")
    status, lines = checked(folder, capsys)
    assert status == 1
    assert lines[0] == "deepseek-r1: found the name model.yml, expected model.yaml"
    assert lines[-1] == "1 valid, 1 wrong"
    with pytest.raises(MoERoutingError, match=r"model\.yml: found the name model\.yml, expected"):
        load_models(folder)


def test_goldens_that_are_broken_or_not_written_yet(folder, capsys):
    (folder / "deepseek-r1" / "router.golden.json").write_text("{")
    (folder / "minimax-m2" / "routing.golden.json").unlink()
    status, lines = checked(folder, capsys)
    assert status == 1
    assert "router.golden.json: not valid JSON" in lines[0]
    command = (
        f"pytest --moe-golden --moe-golden-dir {folder} --moe-models minimax-m2 --snapshot-update"
    )
    assert lines[1] == f"minimax-m2: valid; routing.golden.json not written yet: {command}"


def test_two_models_of_one_name(folder, capsys):
    (folder / "deepseek-r1").rename(folder / "r1")
    shutil.copytree(folder / "r1", folder / "r2")
    status, lines = checked(folder, capsys)
    assert status == 1
    assert "r2: the model's name 'DeepSeek-R1' is also that of r1" in lines


def test_no_folder_is_misuse(tmp_path, capsys):
    assert main(["check", str(tmp_path)]) == 2
    assert "found no */model.yaml, expected a golden directory" in capsys.readouterr().err


def test_what_init_writes_is_valid_and_names_the_directory(tmp_path, capsys):
    folder = tmp_path / "moe"
    assert main(["init", str(folder), "--from", "minimax-m2"]) == 0
    assert {path.name for path in folder.iterdir()} == {
        "minimax-m2", "README.md", "ci-step.yml", "known-failures.yaml",
    }  # fmt: skip
    assert load_ledger(folder / "known-failures.yaml") == []
    for name in ("README.md", "ci-step.yml"):
        text = (folder / name).read_text()
        assert f"--moe-golden-dir {folder}" in text
        assert "{" not in text.replace("{{", "")
    capsys.readouterr()
    assert checked(folder, capsys)[0] == 0
