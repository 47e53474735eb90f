"""One model: what its router computes, and what a target makes of it, judged as the suite does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import find, load_model, load_models, read_config
from pytest_moe_routing.oracle.exact import exact_calls
from pytest_moe_routing.oracle.judge import as_read_by, judge, open_questions, unjudged
from pytest_moe_routing.oracle.record import VerdictRecord
from pytest_moe_routing.report import text
from pytest_moe_routing.report.models import unserved
from pytest_moe_routing.report.records import FORMAT
from pytest_moe_routing.routing import recipe_of
from pytest_moe_routing.schemes import SERVED_SCHEMES, check_scheme
from pytest_moe_routing.session import variants_of

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target
    from pytest_moe_routing.session import MoESession


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
    model = as_read_by(target, model)
    try:
        lines = list(_model(target, model))
        if not session.scheme_names:
            lines += _unserved(model)
        records = _records(session, model)
        for record in records:
            lines += ["", *_scheme(target, model, record)]
    finally:
        target.close()
    return "\n".join(lines) + "\n", any(record.fails for record in records)


def as_json(session: MoESession, name: str) -> tuple[str, bool]:
    """Return the verdicts on a model as JSON, see `oracle.record.VerdictRecord`."""
    model = find_model(name, session.golden_dirs)
    try:
        records = _records(session, model)
    finally:
        session.target.close()
    data = {"format": FORMAT, "verdicts": [record.as_dict() for record in records]}
    return json.dumps(data, indent=1) + "\n", any(record.fails for record in records)


def _records(session: MoESession, model: ModelSpec) -> list[VerdictRecord]:
    """Return the verdicts on a model and its variants in the schemes that are asked about."""
    if session.scheme_names == ["all"]:
        schemes = list(SERVED_SCHEMES)
    else:
        schemes = [check_scheme(scheme) for scheme in session.scheme_names]
        schemes = schemes or [scheme for scheme in model.checkpoints if scheme in SERVED_SCHEMES]
    return [
        _judged(session.target, variant, scheme)
        for scheme in schemes
        for variant in variants_of(model)
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
    return find(load_models(packaged_directory(), *golden_dirs), name)


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
    yield f"  judged   by {target} against {target.flashinfer}"
    if find_spec("torch") is None:
        yield "  note     without torch, wrong verdicts come without a token to check by hand"


def _unserved(model: ModelSpec) -> Iterator[str]:
    for reason in unserved(model):
        yield ""
        yield f"not judged: {reason}; --schemes NAME judges it as that scheme"


def _judged(target: Target, model: ModelSpec, scheme: str) -> VerdictRecord:
    try:
        return judge(target, model, scheme).record()
    except Unsupported as reason:
        return unjudged(target, model, scheme, reason)


def _scheme(target: Target, model: ModelSpec, record: VerdictRecord) -> Iterator[str]:
    layers = f", layers {variant}" if (variant := record.model.partition("@")[2]) else ""
    yield f"{record.scheme}{layers}: {record.verdict}"
    yield f"  {text.MEANINGS[record.verdict]}"
    if not record.verdict.is_given:
        yield f"  because  {record.reason}"
        return
    for gate in record.gates:
        reason = record.rejected_by.get(gate)
        yield f"  gate     {gate}: " + ("yes" if reason is None else f"no, {reason}")
    calls = exact_calls(model, record.scheme, target.flashinfer)
    yield f"  same     {', '.join(map(str, calls)) or 'none'}"
    yield from text.consequences(record)
