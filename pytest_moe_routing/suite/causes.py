"""The failures of the suite's tests: the cause of each, and its explanation."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from pytest_moe_routing.errors import TargetError
from pytest_moe_routing.failure import Failure, Rank, cause_id, few
from pytest_moe_routing.oracle.finding import Finding, Kind, are_slight, source_of, switches_of
from pytest_moe_routing.oracle.record import Reach, VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.report import brief, text

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.choice import Choice
    from pytest_moe_routing.oracle.config_sweep import Cause
    from pytest_moe_routing.oracle.enum_numbers import EnumMismatch
    from pytest_moe_routing.oracle.formats import UnlikeFormat
    from pytest_moe_routing.oracle.judgement import Judgement
    from pytest_moe_routing.oracle.layouts import WrongLayout
    from pytest_moe_routing.oracle.model_code import CodeJudgement, SplitExperts
    from pytest_moe_routing.oracle.modular import MethodRejection
    from pytest_moe_routing.oracle.other_experts import WrongCall
    from pytest_moe_routing.oracle.routers import Cause as RouterCause
    from pytest_moe_routing.oracle.target import Target

_RANKS = {Verdict.WRONG: Rank.SILENT, Verdict.MISSED: Rank.MISSED}


def of_target(error: TargetError) -> Failure:
    """Describe a target that failed when it was asked."""
    return Failure(cause_id("target", error.cause), Rank.LOUD, "", tuple(str(error).splitlines()))


def of_verdict(record: VerdictRecord) -> Failure:
    """Describe a model that a fused kernel computes wrongly, or that is lost."""
    rank = Rank.LOST if record.lost_since else _RANKS.get(record.verdict, Rank.LOUD)
    lines = tuple(text.short_story(record))
    case = f"{record.model} {record.scheme}"
    # Routing methods that gates do not accept are one defect.
    site = record.method if rank is Rank.MISSED and not record.site else record.site
    return Failure(
        record.cause,
        rank,
        case,
        lines,
        record.source,
        site,
        text.reach(record),
        text.rarity(record.reach, by_default=record.by_default),
        tuple(brief.story(record)),
        differs=_differs(record.model, record.findings),
        is_opt_in=record.reach is Reach.OPT_IN,
    )


def _differs(model: str, findings: Sequence[Finding]) -> tuple[str, ...]:
    """Name what differs of the recipe or the limits; nothing if something else is wrong as well."""
    if any(finding.kind not in (Kind.RECIPE, Kind.LIMIT) for finding in findings):
        return ()
    return tuple(f"{model} {f.field} {f.wanted} {f.got}" for f in findings)


def of_enum(target: Target, mismatch: EnumMismatch) -> Failure:
    """Describe a routing method whose number means another one to FlashInfer."""
    finding = mismatch.finding
    what = f"{target}: {text.sentence(finding)} ({target.flashinfer})"
    cause = cause_id("enum", finding.field)
    if not mismatch.cases:
        return Failure(cause, Rank.LATENT, "", (what, "no gate of a chosen model accepts it"))
    of = f"  reach    so classified: {few(mismatch.classified or ('no chosen model',))}"
    lines = (what, of, f"  gate     all accept {finding.field} for {few(mismatch.cases)}")
    return Failure(cause, Rank.SILENT, finding.field, lines)


def of_router(cause: RouterCause) -> Failure:
    """Return the failure of a function of the framework that routes otherwise than the model."""
    from pytest_moe_routing.oracle.routers import PRECISION, REACHES

    is_latent = cause.reach in REACHES[2:]
    rank = Rank.LATENT if is_latent else Rank.LOUD if cause.kind == "crash" else Rank.SILENT
    if cause.kind == PRECISION and not is_latent:
        rank = Rank.DOWNCAST
    # Of lesser precision, the worst token is enough in a terminal.
    shown = cause.lines(3 if rank is Rank.DOWNCAST else None)
    # A number in it is that of an example.
    why = re.sub(r"[^a-z]+", "-", cause.first.cause.lower()).strip("-")
    return Failure(
        cause_id("router", cause.kind, cause.function.replace("?", ""), why),
        rank,
        cause.runs[0].subject,
        tuple(cause.lines()),
        cause.source,
        why,
        brief=tuple(brief.router(shown)),
    )


def of_rejection(target: Target, scheme: str, rejection: MethodRejection) -> Failure:
    """Modular experts that reject a model because of its routing method."""
    lines = (
        f"{target}, modular experts for {scheme}: they receive experts and weights, but reject "
        f"{', '.join(rejection.methods)} at the gate {', '.join(rejection.gates)}",
        f"  accepted {', '.join(rejection.accepted)}",
        f"  models   {', '.join(rejection.models)}",
    )
    cause = cause_id("modular-rejects", "+".join(rejection.gates), scheme)
    return Failure(cause, Rank.MISSED, scheme, lines)


def of_modular_call(
    target: Target,
    model: ModelSpec,
    scheme: str,
    findings: tuple[Finding, ...],
    choice: Choice | None,
) -> Failure:
    """Return the failure of a way through modular experts."""
    from pytest_moe_routing.oracle.judgement import reach_of

    switches = () if choice is None else choice.switches
    if switches is not None:
        switches = (*switches, *switches_of(findings))
    reach = Reach.NO_MODEL if switches is None else reach_of(model, scheme, switches)
    is_default = choice is not None and switches == ()
    reached = text.reached(reach, switches or (), by_default=is_default)
    lines = (
        f"{model} on {scheme}, modular experts of {target}: the call is wrong",
        f"  reach    {reached}",
        *(f"  because  {line}" for line in text.sentences(findings)),
        f"  at       {findings[0].where}",
    )
    # These reasons name a line.
    are_placed = {finding.kind for finding in findings} & {Kind.APPLIED, Kind.RAISED}
    brief = lines[:-1] if are_placed else lines
    what = "+".join(dict.fromkeys(f.id for f in findings))
    site = cause_id(findings[0].where.partition(",")[0])
    cause = cause_id("modular-call", what, site)
    kinds = {finding.kind for finding in findings}
    ranks = {Kind.RAISED: Rank.LOUD, Kind.LIMIT: Rank.LOUD, Kind.DOWNCAST: Rank.DOWNCAST}
    rank = Rank.SILENT if len(kinds) > 1 else ranks.get(findings[0].kind, Rank.SILENT)
    if reach is Reach.NO_MODEL and choice is not None:
        rank = Rank.LATENT
        told = "; ".join(text.sentences(findings))
        lines, brief = (f"{model} on {scheme}: {told} (never chosen: {choice.instead})",), ()
    return Failure(
        cause,
        rank,
        f"{model} {scheme}",
        lines,
        source_of(findings),
        site,
        reached,
        text.rarity(reach, by_default=is_default),
        brief,
        is_opt_in=reach is Reach.OPT_IN,
    )


def of_other_experts(target: Target, scheme: str, wrong: WrongCall) -> Failure:
    """Return the failure of experts that call another kernel than TRT-LLM's."""
    from pytest_moe_routing.oracle.judgement import reach_of

    call, findings = wrong.call, wrong.findings
    published = [model for model in wrong.models if scheme in model.checkpoints]
    model = (published or list(wrong.models))[0]
    reach = reach_of(model, scheme, call.switches)
    reached = f"{text.reached(reach, call.switches, by_default=True)} on {call.device}"
    told = tuple(text.sentences(findings))
    what = "+".join(dict.fromkeys(finding.id for finding in findings))
    # One that nobody meets unasked must not hide the same one where somebody does.
    is_latent = call.requests or (bool(call.switches) and not published)
    name = "requested-experts" if is_latent else "other-experts"
    cause = cause_id(name, what, call.experts)
    ids = list(dict.fromkeys(each.id for each in (model, *wrong.models)))
    if is_latent:
        models = f"{len(ids)} models, such as {model.id}" if len(ids) > 1 else model.id
        lines: tuple[str, ...] = (f"{scheme}: {call.experts}: {'; '.join(told)}", reached)
        if_met = "" if call.requests else cause_id("other-experts", what, call.experts)
        return Failure(cause, Rank.LATENT, models, lines, site=call.experts, if_met=if_met)
    lines = (
        f"{model} on {scheme}, {call.experts} of {target}: the call is wrong",
        f"  reach    {reached}",
        *(f"  because  {line}" for line in told),
        *([f"  at       {findings[0].where}"] if findings[0].where else []),
        f"  models   {few(ids)}",
    )
    are_arguments = {finding.kind for finding in findings} == {Kind.ARGUMENT}
    ranks = {Kind.RAISED: Rank.LOUD, Kind.LIMIT: Rank.LOUD}
    rank = Rank.DOWNCAST if are_slight(findings) else ranks.get(findings[0].kind, Rank.SILENT)
    return Failure(
        cause,
        rank,
        f"{model.id} {scheme}",
        lines,
        source_of(findings),
        # Arguments that get lost are one defect, whichever of them a model needs.
        cause_id(what, call.experts) if are_arguments else call.experts,
        reached,
        rarity=text.rarity(reach, by_default=not call.switches),
        is_opt_in=reach is Reach.OPT_IN,
    )


def of_layout(target: Target, scheme: str, wrong: WrongLayout) -> Failure:
    """Return the failure of weights or scales that lie otherwise than their kernel reads them."""
    from pytest_moe_routing.oracle.judgement import reach_of

    call, switches = wrong.at, wrong.at.switches
    published = [model for model in wrong.models if scheme in model.checkpoints]
    model = (published or list(wrong.models))[0]
    reach, is_default = reach_of(model, scheme, switches or ()), switches == ()
    reached = "whether by default cannot be asked of this release"
    if switches is not None:
        reached = text.reached(reach, switches, by_default=is_default)
    if call.device:
        reached += f" on {call.device}"
    models = few(list(dict.fromkeys(each.id for each in (model, *wrong.models))))
    is_order = all(finding.kind is Kind.LAYOUT for finding in call.findings)
    problem = "reads other elements than it is given" if is_order else "does not fit its layer"
    lines: tuple[str, ...] = (
        f"{model} on {scheme}, {target}: {call.function} {problem}",
        f"  reach    {reached}",
        *(f"  because  {line}" for line in text.sentences(call.findings)),
        f"  at       {call.method}",
        f"  models   {models}",
    )
    rank = Rank.SILENT
    if reach in (Reach.OPT_IN, Reach.NO_MODEL):
        rank = Rank.LATENT
        lines = (f"{lines[0]}: {'; '.join(text.sentences(call.findings))}", reached)
    source, _, name = call.method.partition(" ")
    what = "+".join(dict.fromkeys(f.raised_in or f"{f.field}-{f.got}" for f in call.findings))
    return Failure(
        cause_id("layout", re.sub(r"[^\w+-]+", "-", what), name),
        rank,
        f"{model.id} {scheme}",
        lines,
        source,
        name,
        reached,
        text.rarity(reach, by_default=is_default),
    )


def of_format(unlike: UnlikeFormat) -> Failure:
    """Return the failure of a checkpoint that is served otherwise than the scheme's usual one."""
    failure = of_verdict(unlike.record)
    cause = unlike.record.cause or ":".join((unlike.record.verdict, *unlike.record.rejected_by))
    title, *lines = failure.lines
    usual = f"in the scheme's usual checkpoint, the verdict is {unlike.usual}"
    told = f"  format   {unlike.format}; {usual}"
    return replace(
        failure,
        cause=cause_id("format", cause),
        lines=(title, told, *lines),
        brief=(failure.brief[0], told, *failure.brief[1:]),
        differs=(),
    )


def of_downcast(judgement: Judgement, downcast: Finding) -> Failure:
    """Describe a downcast that the kernel does not need."""
    from pytest_moe_routing.oracle.downcasts import PATTERNS, share_of_tokens

    share = share_of_tokens(judgement, downcast.field)
    record, switches = judgement.record(), switches_of([downcast])
    reached = text.reached(Reach.OPT_IN, switches, by_default=False)
    reach = [f"  reach    {reached}"] if switches else []
    at = f"; called at {record.source}" if record.source else ""
    lines = (
        f"{record.model} on {record.scheme}, decided by {text.decider(record)}: less precise than "
        "the kernel allows",
        *reach,
        f"  because  {text.sentence(downcast)}",
        f"  kernel   {record.method} accepts float32 without loss{at}",
        f"  shown by {share:.1%} of the tokens of the logits pattern '{PATTERNS[downcast.field]}', "
        "which get other experts",
    )
    cause = cause_id("downcast", downcast.field, judgement.site)
    case = f"{record.model} {record.scheme}"
    is_opt_in = bool(switches)
    return Failure(
        cause, Rank.DOWNCAST, case, lines, record.source, judgement.site, is_opt_in=is_opt_in
    )


def of_model_code(judgement: CodeJudgement) -> Failure:
    """Model code that asks its layer for another router than the model has."""
    is_slight = are_slight(judgement.findings)
    fields = "+".join(dict.fromkeys(f.id if is_slight else f.field for f in judgement.findings))
    site = cause_id(judgement.request.block)
    cause = cause_id("model-code", fields, site)
    return Failure(
        cause,
        Rank.DOWNCAST if is_slight else Rank.SILENT,
        judgement.model.id,
        tuple(text.model_code(judgement)),
        source_of(judgement.findings),
        site,
        brief=tuple(brief.model_code(judgement)),
        differs=_differs(str(judgement.model), judgement.findings),
        is_opt_in=bool(judgement.request.switch),
    )


def of_split_experts(model: ModelSpec, split: SplitExperts) -> Failure:
    """Return the failure of a block whose shared experts give each token a part of their output."""
    lines = (
        f"{model}: under sequence parallelism, its shared experts are split over ranks that have "
        "other tokens",
        f"  reach    {text.reached(Reach.OPT_IN, split.switches, by_default=False)}",
        f"  because  each rank has a part of {', '.join(split.layers)}, and nobody sums the parts",
        f"  at       {split.block}",
    )
    cause = cause_id("split-shared-experts", split.block)
    return Failure(cause, Rank.SILENT, model.id, lines, is_opt_in=True)


def of_left_out_key(key: str, judgement: CodeJudgement, findings: tuple[Finding, ...]) -> Failure:
    """Return the failure of a config class that fills in another value than transformers' does."""
    place, _, name = judgement.request.config_class.partition(" ")
    told = "; ".join(text.sentence(finding, *text.CODE) for finding in findings)
    lines = (f"{name} without {key}: {told}", place)
    model, site = judgement.model.id, cause_id(name, key)
    return Failure(cause_id("left-out-key", site), Rank.LATENT, model, lines, place, site)


def of_sweep(cause: Cause, *, behind_gates: bool = False) -> list[Failure]:
    """Describe a cause of the config sweep: as that of the models it concerns, or in one line.

    Args:
        behind_gates: Whether a gate keeps everybody from meeting it; then it is latent.
    """
    if cause.concerned and not behind_gates:
        failures = [of_verdict(found.record()) for found in cause.concerned]
        return list({failure.cause: failure for failure in reversed(failures)}.values())
    record = cause.example.record()
    configs = f"{cause.count} config{'s' * (cause.count > 1)}"
    settings = ", ".join(f"{name}: {value}" for name, value in cause.settings.items())
    if cause.verdict is Verdict.MISSED:
        what = ": ".join(next(iter(record.rejected_by.items()), ()))
    else:
        what = "; ".join(dict.fromkeys(map(text.short, record.findings)))
    place = " if its gate did not reject it" if behind_gates else ""
    lines = (
        f"{cause.verdict}{place}: {what}",
        f"{', '.join(cause.methods)}; {configs}, such as {settings}",
    )
    parts = [f"{kind}-{field}" for kind, field in cause.fields]
    # A method that is lost is a cause of its own; what is wrong or crashes is one for all methods.
    lost = cause.methods[0] if cause.verdict is Verdict.MISSED else ""
    name = "behind-gates" if behind_gates else "sweep"
    fields = "+".join(parts)
    identity = cause_id(name, cause.verdict, lost, fields)
    differs = tuple(cause_id(name, cause.verdict, lost, part) for part in parts)
    # Whatever rejects a method that is lost, the method is the defect.
    site = fields if lost else ""
    return [Failure(identity, Rank.LATENT, cause.scheme, lines, site=site, differs=differs)]
