"""docs/report.schema.json describes every report that is written, and nothing else."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from enum import StrEnum
from pathlib import Path

import jsonschema
import pages
import pytest

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.calls import arguments_of
from pytest_moe_routing.oracle.exact import kernel_call
from pytest_moe_routing.oracle.finding import Kind
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.record import KINDS, Reach, UnansweredRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import files, records, text
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.session import variants_of
from pytest_moe_routing.targets import load_target

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "report.schema.json").read_text())
MODELS = list(load_models(packaged_directory()).values())[::3]


@pytest.fixture(scope="module")
def validate():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return lambda data: [error.message[:300] for error in validator.iter_errors(data)]


@pytest.fixture(scope="module")
def judged():
    """Every kind of router and layer, as a good and as a bad target decide."""
    targets = [load_target(n, FlashInfer.of("0.6.12")) for n in ("builtin", "miniatures:Vllm022")]
    return [
        judge(target, model, scheme).record()
        for target in targets
        for each in MODELS
        for model in variants_of(each)
        for scheme in (SERVED_SCHEMES if target.name == "builtin" else ("nvfp4", "fp8_per_tensor"))
        if not model.router.not_expressible or target.name == "builtin"
    ]


def test_reports_are_as_the_schema_says(validate, judged, tmp_path):
    assert {record.verdict for record in judged} >= {"exact", "wrong", "fallback", "missed"}
    assert any(record.counterexample for record in judged)
    unanswered = UnansweredRecord("vllm", "1.0", "FlashInfer", "case", "what", "reason", 3)
    found = [*judged, *pages.records(models=20), unanswered]
    for suffix in (".json", ".jsonl"):
        files.write_report(tmp_path / f"r{suffix}", found)
    assert validate(json.loads((tmp_path / "r.json").read_text())) == []
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert len(lines) == len(found)
    files.write_report(tmp_path / "none.jsonl", [])
    for line in dict.fromkeys([*lines, (tmp_path / "none.jsonl").read_text()]):
        assert validate(json.loads(line)) == []


def test_failures_come_first(tmp_path):
    found = pages.records(models=20)
    files.write_report(tmp_path / "r.jsonl", found)
    outcomes = [record.outcome for record in records.load(tmp_path / "r.jsonl")]
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome != "failed")
    assert outcomes.count("failed") > 3


@pytest.mark.parametrize(("name", "cls"), [(cls.KIND, cls) for cls in KINDS.values()])
def test_the_schema_has_every_field(name, cls):
    described = SCHEMA["$defs"][name]
    names = {f.name for f in fields(cls)} | {"kind"}
    assert set(described["properties"]) == names | {"format"}
    assert set(described["required"]) == names


@pytest.mark.parametrize(
    ("where", "enum"),
    [(("verdict", "verdict"), Verdict), (("verdict", "reach"), Reach), (("finding", "kind"), Kind)],
)
def test_the_schema_has_every_value(where, enum: type[StrEnum]):
    name, key = where
    assert SCHEMA["$defs"][name]["properties"][key]["enum"] == [v.value for v in enum]


@pytest.mark.parametrize(
    "change",
    [{"verdict": "good"}, {"extra": 1}, {"format": 1}, {"path": "x"}, {"call": {"function": "f"}}],
)
def test_what_is_no_record_is_rejected(validate, change):
    record = pages.records(models=1)[0]
    line = {"format": records.FORMAT, **replace(record).as_dict()}
    assert validate(line) == []
    assert validate({**line, **change})


def test_a_factor_on_the_output_is_said_after_the_call(validate, tmp_path):
    [model] = [model for model in load_models(packaged_directory()).values() if model.id == "glm-5"]
    flashinfer = FlashInfer.of("0.6.12")
    record = judge(load_target("builtin", flashinfer), model, "fp8_block").record()
    call = kernel_call(model.router, "fp8_block", "DeepSeekV3", flashinfer)
    later = replace(call, routed_scaling_factor=1.0, scale_after=2.5)
    record = replace(record, call=arguments_of(model, later, flashinfer))
    files.write_report(tmp_path / "r.jsonl", [record])
    assert validate(json.loads((tmp_path / "r.jsonl").read_text())) == []
    assert "           and the framework multiplies the output by 2.5" in text.calls([record])
