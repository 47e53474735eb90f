"""The files around the code: workflows, hooks, templates, changelog."""

from __future__ import annotations

import re
import shlex
import tomllib
from configparser import ConfigParser
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def environments():
    """The sections of tox.ini, `gpu-{vllm,sglang}` spelt out."""
    parser = ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    for section in parser.sections():
        name = section.removeprefix("testenv:")
        start, _, choices = name.partition("{")
        yield from [start + c for c in choices.rstrip("}").split(",")] if choices else [name]


def test_the_workflow_runs_what_ci_runs_and_environments_that_exist():
    jobs = WORKFLOW["jobs"]
    assert [step["run"] for step in jobs["ci"]["steps"] if "run" in step] == [".ci/run"]
    ran = {row["env"] for row in jobs["tox"]["strategy"]["matrix"]["include"]}
    supported = {
        f"py{c.rpartition(' ')[2].replace('.', '')}"
        for c in PROJECT["project"]["classifiers"]
        if re.search(r"Python :: 3\.\d", c)
    }
    assert supported <= ran
    assert ran - supported <= set(environments())
    assert {"docs", "coverage", "min", "latest", "golden", "build"} <= ran


def test_actions_are_pinned_by_hash():
    texts = [p.read_text("utf-8") for p in (ROOT / ".github").rglob("*.yml")]
    texts.append((ROOT / "docs/ci.md").read_text("utf-8"))
    uses = [use for text in texts for use in re.findall(r"- uses: (.*)", text)]
    assert len(uses) >= 4
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", use) for use in uses)


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", ".pre-commit-hooks.yaml"])
def test_hooks_run_programs_that_exist(name):
    content = yaml.safe_load((ROOT / name).read_text("utf-8"))
    hooks = content["repos"][0]["hooks"] if isinstance(content, dict) else content
    extras = PROJECT["project"]["optional-dependencies"]
    known = {"pytest", "moe-routing", "bash"} | {
        re.split("[<>=\\[ ]", requirement)[0] for requirement in extras["dev"]
    }
    for hook in hooks:
        program, *arguments = shlex.split(hook["entry"])
        assert program in known
        for argument in arguments:
            assert not argument.startswith("tests/") or (ROOT / argument).exists()
        for needed in hook.get("additional_dependencies", ()):
            assert re.fullmatch(r"\.\[(\w+)\]", needed)[1] in extras


def test_issue_templates_have_unique_ids():
    for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"):
        body = yaml.safe_load(path.read_text("utf-8")).get("body", [])
        ids = [field["id"] for field in body]
        assert len(ids) == len(set(ids))
        assert path.name == "config.yml" or ids


def test_the_changelog_says_what_is_not_released():
    """Keep a Changelog: the first section is of the next release, and sections are newest first."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    heads = re.findall(r"^## (.*)$", text, re.M)
    assert re.fullmatch(r"(\d+\.\d+\.\d+ \()?unreleased\)?", heads[0], re.IGNORECASE)
    released = [re.fullmatch(r"(\d+\.\d+\.\d+) \(\d{4}-\d\d-\d\d\)", head) for head in heads[1:]]
    assert all(released)
    first = text.partition(f"## {heads[0]}")[2].partition("\n## ")[0]
    assert re.search(r"^- .", first, re.M), "no line says what changed"


def test_coverage_has_a_floor():
    assert PROJECT["tool"]["coverage"]["report"]["fail_under"] >= 65
