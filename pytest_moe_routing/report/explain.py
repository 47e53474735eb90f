"""One model: what its router computes, and what a target makes of it, judged as the suite does."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_model, load_named, read_config
from pytest_moe_routing.oracle.exact import exact_calls, same_calls
from pytest_moe_routing.oracle.judge import as_read_by, open_questions, record_of
from pytest_moe_routing.oracle.record import VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import matrix, text
from pytest_moe_routing.report.models import unserved
from pytest_moe_routing.report.records import FORMAT
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.schemes import SERVED_SCHEMES
from pytest_moe_routing.session import variants_of

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target
    from pytest_moe_routing.session import MoESession

Answer = tuple["ModelSpec", VerdictRecord]


def page(session: MoESession, name: str) -> tuple[str, bool]:
    """Explain a model, and say whether anything of it would fail.

    Args:
        session: Decides target, FlashInfer release and schemes, as in a pytest run.
        name: The id of a known model, or the path of a model.yaml or config.json.

    Raises:
        MoERoutingError: There is no such model, scheme or target.
    """
    model = find_model(name, session.golden_dirs)
    target = session.target
    with suppress(TargetError):
        # A failure is also one of the verdicts.
        model = as_read_by(target, model)
    try:
        lines = list(_model(target, model))
        if not session.scheme_names:
            lines += _unserved(model)
        answers = _answers(session, model)
        if answers:
            lines += ["", *_overview([record for _, record in answers])]
        for paragraph in _paragraphs(target, answers):
            lines += ["", *paragraph]
    finally:
        target.close()
    return "\n".join(lines) + "\n", _fails(answers)


def as_json(session: MoESession, name: str) -> tuple[str, bool]:
    """Return the verdicts on a model as JSON, see `oracle.record.VerdictRecord`."""
    model = find_model(name, session.golden_dirs)
    try:
        answers = _answers(session, model)
    finally:
        session.target.close()
    data = {
        "format": FORMAT,
        "assumed": assumptions(model),
        "verdicts": [record.as_dict() for _, record in answers],
    }
    return json.dumps(data, indent=1) + "\n", _fails(answers)


def _fails(answers: Sequence[Answer]) -> bool:
    """Whether the verdicts would fail a run; cases without any verdict would as well."""
    records = [record for _, record in answers]
    is_judged = any(record.verdict.is_given for record in records)
    return not is_judged or any(record.fails for record in records)


def _answers(session: MoESession, model: ModelSpec) -> list[Answer]:
    """Return the verdicts on a model and its variants in the schemes that are asked about.

    Without any, each is judged in the schemes of its own layers.
    """
    asked = session.schemes if session.scheme_names else []
    return [
        (variant, record_of(session.target, variant, scheme))
        for variant in variants_of(model)
        for scheme in asked or [own for own in variant.checkpoints if own in SERVED_SCHEMES]
    ]


def find_model(name: str, golden_dirs: list[Path]) -> ModelSpec:
    """Return the model of an id or a path.

    Raises:
        MoERoutingError: There is none.
    """
    path = Path(name)
    if path.exists():
        is_model = path.suffix in (".yaml", ".yml") or (path / "model.yaml").is_file()
        return load_model(path) if is_model else read_config(path)
    return load_named(name, packaged_directory(), *golden_dirs)


def assumptions(model: ModelSpec) -> dict[str, Any]:
    """Return the values that the config does not state: the defaults of its config class."""
    values = {**vars(model.experts), **vars(model.router)}
    return {name: values[name] for name in model.defaulted}


def _model(target: Target, model: ModelSpec) -> Iterator[str]:
    yield f"{model.model} ({model.hf_repo}, {model.architecture})"
    yield f"  router   {recipe_of(model.router)}"
    if model.router.not_expressible:
        yield f"  but      {model.router.not_expressible}"
    yield f"  experts  {model.router.num_experts}, logits {model.router.logits_dtype}"
    yield from (f"  note     {note}" for note in model.notes)
    yield from (f"  open     {question}" for question in open_questions(model))
    try:
        yield f"  decided  {target.classify(model)}"
    except Unsupported as reason:
        yield f"  decided  not judged: {reason}"
    except TargetError as error:
        yield f"  decided  error: {error.summary}"
    yield f"  judged   by {target} against {target.flashinfer}"
    if find_spec("torch") is None:
        yield "  note     install torch to see a token that proves each wrong verdict"


def _unserved(model: ModelSpec) -> Iterator[str]:
    for reason in unserved(model):
        yield ""
        yield f"not judged: {reason}; --schemes NAME judges it as that scheme"


def _name(record: VerdictRecord) -> str:
    layers = record.model.partition("@")[2]
    return f"{record.scheme}, layers {layers}" if layers else record.scheme


def _overview(records: Sequence[VerdictRecord]) -> list[str]:
    """Return a row for each scheme: can it run, is it exact, as what."""
    runs = {Verdict.EXACT: "yes", Verdict.WRONG: "yes"}
    table = [["scheme", "runs", "verdict", "method", "who is affected"]]
    for record in records:
        answer = runs.get(record.verdict, "no") if record.verdict.is_given else "unknown"
        table.append(
            [_name(record), answer, str(record.verdict), record.method or "-", text.reach(record)]
        )
    return matrix.aligned(table)


def _paragraphs(target: Target, answers: Sequence[Answer]) -> Iterator[list[str]]:
    """Yield the explanation of each verdict; schemes that share it are named together."""
    groups: dict[tuple[object, ...], list[VerdictRecord]] = {}
    for model, record in answers:
        method = record.call["method"] if record.call else ""
        key = (record.verdict, method, *_why(target, model, record))
        groups.setdefault(key, []).append(record)
    for (verdict, _, *lines), records in groups.items():
        names = "; ".join(dict.fromkeys(_name(record) for record in records))
        title = [f"{names}: {verdict}", f"  {text.MEANINGS[records[0].verdict]}"]
        yield [*title, *text.calls(records), *map(str, lines)]


def _why(target: Target, model: ModelSpec, record: VerdictRecord) -> Iterator[str]:
    """Yield what explains a verdict besides the call: other calls, gates, reasons."""
    if not record.verdict.is_given:
        yield f"  because  {record.reason}"
        return
    if (at := text.call_of(record)) is not None:
        yield f"  at       {at}"
    if record.kernel is not None and record.verdict is not Verdict.EXACT:
        yield f"  kernel   {record.kernel}"
    calls = exact_calls(model, record.scheme, target.flashinfer)
    if record.reach_question:
        yield f"  open     {record.reach_question}"
    others = [str(c) for c in calls if record.call and c.method != record.call["method"]]
    if others:
        yield f"  exact    other calls: {', '.join(others)}"
    yield from _gates(record)
    if not calls and record.verdict is Verdict.FALLBACK:
        alone = same_calls(model.router, record.scheme, target.flashinfer)
        if alone:
            yield f"  router   alone would be exact as {alone[0]}"
    yield from text.reasons(record)


def _gates(record: VerdictRecord) -> Iterator[str]:
    """Yield the gates on one line, or those that reject on one line each."""
    for gate, reason in record.rejected_by.items():
        yield f"  gate     {gate}: no, {reason}"
    count = len(record.gates) - len(record.rejected_by)
    if record.gates:
        yield f"  gates    {count} of {len(record.gates)} accept"
