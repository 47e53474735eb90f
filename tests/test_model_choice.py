"""Models are chosen by their names and by patterns; what matches none is one short error."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from configs import R1

from pytest_moe_routing.errors import ModelError, MoERoutingError
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models, load_named, select
from pytest_moe_routing.session import MoESession


def test_selection():
    models = load_models(packaged_directory())
    assert [m.id for m in select(models, ["llama-4-*", "deepseek-r1"])] == [
        "deepseek-r1",
        "llama-4-maverick",
        "llama-4-scout",
    ]
    with pytest.raises(
        ModelError, match=r"none of the \d+ models matches 'llama-5-\*'; did you mean ll"
    ):
        select(models, ["deepseek-r1", "llama-5-*"])
    with pytest.raises(
        ModelError, match=r"none of the \d+ models matches 'xxxxxx'; `moe-routing models`"
    ):
        select(models, ["xxxxxx"])


@pytest.mark.parametrize(
    ("name", "id_"),
    [
        ("deepseek-r1", "deepseek-r1"),
        ("DeepSeek-R1", "deepseek-r1"),
        ("deepseek-ai/DeepSeek-R1", "deepseek-r1"),
        ("openai/gpt-oss-120b", "gpt-oss-120b"),
        ("Qwen3-VL-30B-A3B-Instruct", "qwen3-vl-30b-a3b"),
    ],
)
def test_models_are_found_by_any_of_their_names(name, id_):
    assert load_named(name, packaged_directory()).id == id_


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("deepseek-r2", "did you mean deepseek-"),
        ("someone/DeepSeek-R11", "did you mean deepseek-r1"),
        ("xxxxxx", "`moe-routing models` lists them"),
        ("x" * 5000, "xxx...' is neither a file nor one of the"),
    ],
)
def test_an_unknown_name_is_one_short_line(name, hint):
    with pytest.raises(ModelError) as caught:
        load_named(name, packaged_directory())
    assert hint in str(caught.value)
    assert len(str(caught.value)) < 200


def session(*configs, patterns=()):
    return MoESession(
        target_name="builtin",
        model_patterns=list(patterns),
        scheme_names=[],
        flashinfer_release=None,
        golden_dirs=[],
        configs=list(configs),
    )


@pytest.mark.parametrize(
    ("names", "count"), [([], 8), (["all"], 8), (["nvfp4", "all"], 8), (["nvfp4", "bf16"], 2)]
)
def test_schemes_are_all_or_those_that_are_named(names, count):
    assert len(set(replace(session(), scheme_names=names).schemes)) == count


def test_a_config_that_is_given_twice(tmp_path, monkeypatch):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(R1))
    monkeypatch.chdir(tmp_path)
    for again in (file, Path("config.json"), tmp_path):
        with pytest.raises(MoERoutingError) as caught:
            _ = session(file, again).models
        assert str(caught.value) == f"--moe-config {again}: the file was given twice"
    other = tmp_path / "other" / "config.json"
    other.parent.mkdir()
    other.write_text(file.read_text())
    assert len(session(file, other).models) == len(session().models) + 2


def test_the_header_counts_models_without_goldens(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(R1))
    one, two = tmp_path / "one", tmp_path / "two" / "config.json"
    assert ", 1 model, which has no goldens" in session(one, patterns=["one"]).describe()
    both = session(one, two, patterns=["one", "two"]).describe()
    assert ", 2 models, which have no goldens" in both


@pytest.fixture
def directory(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        text = (packaged_directory() / "mixtral-8x7b" / "model.yaml").read_text("utf-8")
        text = text.replace("Mixtral-8x7B", name.title())
        (tmp_path / name / "model.yaml").write_text(text, "utf-8")
    return tmp_path


def test_only_the_model_that_is_asked_for_is_read(directory):
    (directory / "two" / "model.yaml").write_text("nothing of a model", "utf-8")
    assert load_named("one", directory).id == "one"
    with pytest.raises(ModelError, match=r"two.model\.yaml"):
        load_named("three", directory)


def test_a_name_of_two_models_is_no_choice(directory):
    file = directory / "two" / "model.yaml"
    one = load_named("one", directory)
    lines = file.read_text("utf-8").splitlines()
    lines = [f"hf_repo: {one.hf_repo}" if n.startswith("hf_repo:") else n for n in lines]
    file.write_text("\n".join(lines), "utf-8")
    with pytest.raises(ModelError, match="is the name of several models: one, two"):
        load_named(one.hf_repo, directory)
