"""The failures of the suite's tests: the cause of each, and its explanation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pytest_moe_routing.errors import TargetError
from pytest_moe_routing.failure import Failure, Rank
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.record import Reach, VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import text

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.config_sweep import Cause
    from pytest_moe_routing.oracle.enum_numbers import EnumMismatch
    from pytest_moe_routing.oracle.ignored import Ignored
    from pytest_moe_routing.oracle.judge import Judgement
    from pytest_moe_routing.oracle.model_code import CodeJudgement
    from pytest_moe_routing.oracle.modular import MethodRejection
    from pytest_moe_routing.oracle.target import Choice, Target

_RANKS = {Verdict.WRONG: Rank.SILENT, Verdict.MISSED: Rank.MISSED}


def _id(*parts: str) -> str:
    """A cause's id: stable, and one word."""
    return ":".join(part.replace(" ", "-") for part in parts if part)


def of_target(error: TargetError) -> Failure:
    """A target that failed when it was asked."""
    return Failure(_id("target", error.cause), Rank.LOUD, "", tuple(str(error).splitlines()))


def of_verdict(record: VerdictRecord) -> Failure:
    """A model that a fused kernel computes wrongly, or that is lost."""
    # A gate that accepts says nothing about what is wrong.
    lines = [line for line in text.story(record) if not line.startswith("  gate     all accept")]
    rank = _RANKS.get(record.verdict, Rank.LOUD)
    return Failure(record.cause, rank, f"{record.model} {record.scheme}", tuple(lines))


def of_enum(target: Target, mismatch: EnumMismatch) -> Failure:
    """A routing method that travels under a number of another meaning."""
    finding = mismatch.finding
    cases = mismatch.cases
    shown = ", ".join(cases[:3]) + (f" and {len(cases) - 3} others" if len(cases) > 3 else "")
    lines = (
        f"{target}: {text.sentence(finding)} ({target.flashinfer})",
        f"  gate     all accept {finding.field} for {shown}",
    )
    return Failure(_id("enum", finding.field), Rank.SILENT, finding.field, lines)


def of_rejection(target: Target, scheme: str, rejection: MethodRejection) -> Failure:
    """Modular experts that reject a model because of its routing method."""
    lines = (
        f"{target}, modular experts for {scheme}: they are given experts and weights, and reject "
        f"{', '.join(rejection.methods)} at the gate {', '.join(rejection.gates)}",
        f"  accepted {', '.join(rejection.accepted)}",
        f"  models   {', '.join(rejection.models)}",
    )
    cause = _id("modular-rejects", "+".join(rejection.gates), scheme)
    return Failure(cause, Rank.MISSED, scheme, lines)


def of_modular_call(
    target: Target,
    model: ModelSpec,
    scheme: str,
    findings: tuple[Finding, ...],
    choice: Choice | None,
) -> Failure:
    """Ids, weights or arguments that go wrong on the way through modular experts."""
    from pytest_moe_routing.oracle.judge import reach_of

    switches = () if choice is None else choice.switches
    reach = Reach.NO_MODEL if switches is None else reach_of(model, scheme, switches)
    is_default = choice is not None and switches == ()
    lines = (
        f"{model} on {scheme}, modular experts of {target}: the call is wrong",
        f"  reach    {text.reached(reach, switches or (), by_default=is_default)}",
        *(f"  because  {line}" for line in text.sentences(findings)),
        f"  at       {findings[0].where}",
    )
    what = "+".join(dict.fromkeys(f"{f.kind}-{f.field}" for f in findings))
    cause = _id("modular-call", what, findings[0].where.partition(",")[0])
    rank = Rank.LOUD if all(f.kind is Kind.RAISED for f in findings) else Rank.SILENT
    if reach is Reach.NO_MODEL and choice is not None:
        rank = Rank.LATENT
        told = "; ".join(text.sentences(findings))
        lines = (f"{model} on {scheme}: {told} (never taken: {choice.instead})",)
    return Failure(cause, rank, f"{model} {scheme}", lines)


def of_ignored(target: Target, scheme: str, ignored: Ignored) -> Failure:
    """A request besides routing that fused experts ignore."""
    from pytest_moe_routing.oracle.around import Request

    request, response = ignored.request, ignored.response
    reach = text.reached(Reach.OPT_IN, response.switches, by_default=False)
    lines: tuple[str, ...] = (
        f"{target}, experts for {scheme}: {request} ignored",
        f"  reach    {reach}",
        f"  because  {response.why}",
        f"  models   {', '.join(ignored.models)}",
    )
    rank = Rank.SILENT
    if request is Request.PADDING:
        # What such rows compute is dropped: they cost time.
        rank = Rank.LATENT
        lines = (f"{scheme}: {request} ignored, as {response.why} ({reach})",)
    return Failure(_id("ignored", request), rank, scheme, lines)


def of_downcast(judgement: Judgement, downcast: Finding) -> Failure:
    """A downcast that the kernel does not need."""
    from pytest_moe_routing.oracle.downcasts import PATTERNS, share_of_tokens

    share = share_of_tokens(judgement, downcast.field)
    record = judgement.record()
    lines = (
        f"{record.model} on {record.scheme}, decided by {text.decider(record)}: less precise than "
        "the kernel",
        f"  because  {text.sentence(downcast)}",
        f"  kernel   {record.method} computes with it in float32",
        f"  shown by {share:.1%} of the tokens of the logits pattern '{PATTERNS[downcast.field]}', "
        "which get other experts",
    )
    cause = _id("downcast", downcast.field, judgement.site)
    return Failure(cause, Rank.DOWNCAST, f"{record.model} {record.scheme}", lines)


def of_model_code(judgement: CodeJudgement) -> Failure:
    """Model code that asks its layer for another router than the model has."""
    fields = "+".join(dict.fromkeys(finding.field for finding in judgement.findings))
    cause = _id("model-code", fields, judgement.request.block)
    lines = tuple(text.model_code(judgement))
    return Failure(cause, Rank.SILENT, judgement.model.id, lines)


def of_sweep(cause: Cause) -> Failure:
    """A cause of the config sweep: one line if no model has such a router."""
    record = cause.example.record()
    rejections = (f"{gate}: {reason}" for gate, reason in record.rejected_by.items())
    what = "; ".join((*text.sentences(record.findings), *rejections))
    routers = "1 router" if cause.count == 1 else f"{cause.count} routers"
    settings = ", ".join(f"{name}: {value}" for name, value in cause.settings.items())
    line = (
        f"{cause.verdict}: {cause.method} on {cause.scheme}: {what} ({routers}, such as {settings})"
    )
    rank, case = Rank.LATENT, cause.scheme
    if cause.models:
        rank = _RANKS.get(cause.verdict, Rank.LOUD)
        line += f"; concerns {', '.join(cause.models)}"
    fields = "+".join(dict.fromkeys(f"{kind}-{field}" for kind, field, _ in cause.why))
    return Failure(
        _id("sweep", cause.verdict, cause.method, fields, record.site), rank, case, (line,)
    )
