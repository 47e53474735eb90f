"""The sentences of findings, verdicts and counterexamples. Nothing reads them back."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.flashinfer.grammar import in_words
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.record import Reach, VerdictRecord
from pytest_moe_routing.oracle.verdict import Verdict

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.model_code import CodeJudgement

#: Stands for a space at which a line must not break.
_GLUE = "\0"
#: What each verdict means.
MEANINGS: Mapping[Verdict, str] = {
    Verdict.EXACT: "the fused kernel runs and computes exactly what the model defines",
    Verdict.WRONG: "the fused kernel runs and computes something else",
    Verdict.CRASH: "the call of the kernel, or of the experts that run instead, fails",
    Verdict.FALLBACK: "correctly rejected: no fused kernel of this release runs the model",
    Verdict.MISSED: "rejected, although a routing method computes the router exactly",
    Verdict.NOT_JUDGED: "not judged: the target cannot answer",
    Verdict.ERROR: "not judged: the target failed while answering",
}
_DOWNCASTS: Mapping[str, str] = {
    "logits": "the float32 router logits are downcast to bfloat16 before the call",
    "gate": "the router logits are computed in bfloat16 and widened to float32",
    "bias": "the float32 bias is downcast to bfloat16 before the call",
    "router weight": "the router's weight, float32 in checkpoints, is downcast to bfloat16",
    "weights": "the float32 router weights are downcast to bfloat16 before the call",
}
#: Names of the recipe's fields for readers.
_FIELDS: Mapping[str, str] = {
    "score": "scoring function",
    "weigh_by": "score of the weights",
    "bias": "correction bias",
    "group_score": "group score",
    "normalize": "renormalize",
    "scale": "routed_scaling_factor",
    "weight_on": "router weight side",
}


def sentence(finding: Finding, wanted_by: str = "the router", got_by: str = "the kernel") -> str:
    """Say what is wrong, without its explanation.

    Args:
        wanted_by, got_by: Who has the two values of a recipe's field.
    """
    field, wanted, got = finding.field, value(finding.wanted), value(finding.got)
    match finding.kind:
        case Kind.RECIPE if finding.wanted is None and finding.got is None:
            return f"{field}: {finding.fact}"
        case Kind.RECIPE:
            return f"{_FIELDS.get(field, field)}: {wanted_by} has {wanted}, {got_by} {got}"
        case Kind.NEARLY:
            return f"{field}: the experts have {wanted}, {got_by} {got}; {finding.fact}"
        case Kind.ARGUMENT:
            return f"{field} arrives as {got}, the layer has {wanted}"
        case Kind.APPLIED:
            return f"{field} is applied {got}; the layer applies it {wanted}"
        case Kind.ADDED:
            return f"{field} is added {got}; the layer adds it {wanted}"
        case Kind.CONFIG:
            return f"the layer's config has {got} as {field}; the model's code requests {wanted}"
        case Kind.CHOICE:
            return f"{field} selects the experts, although their gates reject the layer ({got})"
        case Kind.LIMIT if finding.wanted in (None, ""):
            return finding.fact
        case Kind.LIMIT:
            return f"{short(finding)}: {finding.fact}"
        case Kind.ENUM if field.isdecimal():
            return f"routing_method_type {field} is not a routing method of this FlashInfer release"
        case Kind.ENUM:
            number = "no number" if finding.wanted is None else wanted
            read_as = "no routing method" if finding.got is None else got
            return f"{field} is passed as {number}, which FlashInfer reads as {read_as}"
        case Kind.RAISED:
            at = f"{finding.where}: " if finding.where else ""
            return f"{at}{field}: {got}" if finding.got else f"{at}{field}"
        case Kind.LAYOUT if finding.wanted is not None:
            return f"{field} says {wanted}, the weights are {got}"
        case Kind.LAYOUT:
            return f"{field}: {got}"
        case Kind.DOWNCAST:
            return _DOWNCASTS.get(field, f"{field} is downcast from {wanted} to {got}")
    return finding.fact


def short(finding: Finding) -> str:
    """Return what is wrong in a few words, without its explanation: for lists."""
    if finding.kind is Kind.LIMIT and finding.wanted not in (None, ""):
        return f"{finding.field} is {value(finding.got)}, expected {in_words(str(finding.wanted))}"
    if finding.kind is Kind.RAISED:
        return sentence(replace(finding, where=finding.where.rpartition("/")[2]))
    return sentence(finding)


def value(value: object) -> str:
    """Return a value of a model or a call as a reader sees it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def sentences(findings: Iterable[Finding]) -> Iterator[str]:
    """Say what is wrong, then what explains it, each once."""
    findings = tuple(findings)
    yield from dict.fromkeys(sentence(finding) for finding in findings)
    told = (Kind.RECIPE, Kind.APPLIED)
    # A finding without values is nothing but its fact.
    facts = (f.fact for f in findings if f.kind in told and (f.wanted, f.got) != (None, None))
    yield from dict.fromkeys(filter(None, facts))


def decider(record: VerdictRecord) -> str:
    """Who decided, for which kernels."""
    target = f"{record.target} {record.release}".rstrip()
    return f"{target}, {flashinfer(record)}"


def flashinfer(record: VerdictRecord) -> str:
    """Name the FlashInfer release, and whose facts were used if they are not its own."""
    known = record.flashinfer == record.judged_as
    return f"FlashInfer {record.flashinfer}" + ("" if known else f" (judged as {record.judged_as})")


def title(record: VerdictRecord) -> str:
    """Name the model, the scheme, who decided, and the verdict."""
    who = f"{record.target} {record.release}".rstrip()
    ending = str(record.verdict)
    if record.lost_since:
        by_default = " by default" if record.verdict is Verdict.EXACT else ""
        ending += f", no longer fused{by_default}"
    return f"{record.model} on {record.scheme}, decided by {who}: {ending}"


def story(record: VerdictRecord) -> list[str]:
    """Everything that led to a verdict, from the router to a token that a person can check."""
    lines = [title(record), f"  {MEANINGS[record.verdict]} ({flashinfer(record)})"]
    if record.by_default or record.reach_question or record.reach is not Reach.PUBLISHED:
        lines.append(f"  reach    {reach(record)}")
    if record.reach_question:
        lines.append(f"  open     {record.reach_question}")
    lines += loss(record)
    if not record.verdict.is_given:
        return [*lines, f"  because  {record.reason}"]
    lines.append(f"  router   {record.router}")
    lines.append(f"  decided  {' -> '.join((*record.path, record.method))}")
    rejections = [f"{gate}: no, {reason}" for gate, reason in record.rejected_by.items()]
    accepted = [f"all accept: {', '.join(record.gates)}"]
    lines += [f"  gate     {text}" for text in rejections or accepted]
    if (at := call_of(record)) is not None:
        lines.append(f"  at       {at}")
    lines += consequences(record)
    if not record.verdict.is_good:
        lines += [f"  exact    would be {call}" for call in record.exact]
        if record.obstacles:
            lines.append(f"  exact    none: {'; '.join(record.obstacles)}")
    return lines


def call_of(record: VerdictRecord) -> str | None:
    """Return where the target calls a kernel that is wrong or fails, and with which arguments.

    None if it calls none, or if the line is not known.
    """
    is_called = record.verdict in (Verdict.WRONG, Verdict.CRASH) and record.received
    return f"{record.source} with {record.received}" if is_called and record.source else None


def loss(record: VerdictRecord) -> Iterator[str]:
    """Say which release still runs a lost kernel, and which code of the target keeps it away."""
    if not record.lost_since:
        return
    by_default = " by default" if record.verdict is Verdict.EXACT else ""
    known = f"{record.target} {record.lost_since}"
    yield f"  expected the fused kernel{by_default}, as known of {known}"
    if record.instead:
        yield f"  now      {record.instead}"
    if record.rule:
        place = f" ({record.source})" if record.source else ""
        yield f"  rule     {record.rule} turns it away{place}"


def short_story(record: VerdictRecord) -> Iterator[str]:
    """Return what a person needs to see what is wrong: `story`, without what says little."""
    title, _, *lines = story(record)
    several = len(record.rejected_by) > 1
    exact = 0
    yield title
    for line in lines:
        what, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        # A gate that accepts says nothing, and the last gate is all of the others at once.
        if what == "gate" and rest.startswith("all accept"):
            continue
        if what == "gate" and several and rest.startswith("is_supported_config"):
            continue
        if what in ("logits", "bias") and rest == "all 0":
            continue
        exact += what == "exact"
        if exact > 1:
            continue
        more = len(record.exact) - 1 if what == "exact" else 0
        yield f"{line} (or {more} more)" if more > 0 else line


def consequences(record: VerdictRecord) -> Iterator[str]:
    """Say what the kernel computes, what is wrong with it, and how precise it is."""
    if record.kernel is not None:
        yield f"  kernel   {record.kernel}"
    yield from reasons(record)


def reasons(record: VerdictRecord) -> Iterator[str]:
    """Yield what is wrong or in the kernel's way, with a token that shows it; then notes."""
    said = {f"{gate}: {reason}" for gate, reason in record.rejected_by.items()}
    obstacles = record.obstacles if record.verdict is Verdict.FALLBACK else ()
    for line in (*sentences(record.findings), *(o for o in obstacles if o not in said)):
        yield f"  because  {line}"
    if record.counterexample is not None:
        yield from (f"    {line}" for line in token(record.counterexample))
    for note in record.notes:
        yield f"  note     {sentence(note)}"


def calls(records: Sequence[VerdictRecord]) -> list[str]:
    """Return the lines of the exact calls: the arguments in common, then each entry point."""
    made = [(record.scheme, record.call) for record in records if record.call is not None]
    if not made:
        return []
    method, first = made[0][1]["method"], made[0][1]["arguments"]
    common = {
        name: value
        for name, value in first.items()
        if all(call["arguments"].get(name, ...) == value for _, call in made)
    }
    label = "call" if records[0].verdict is Verdict.EXACT else "exact"
    shown = f"{label:8} as {method}: {_listed(common, glue=_GLUE)}"
    lines = [
        line.replace(_GLUE, " ") for line in textwrap.wrap(shown, 78, subsequent_indent=" " * 9)
    ]
    for scheme, call in made:
        own = {n: v for n, v in call["arguments"].items() if n not in common}
        extra = f", with {_listed(own)}" if own else ""
        lines.append(f"         to {call['function']} for {scheme}{extra}")
        if "scale_after" in call:
            factor = call["scale_after"]
            lines.append(f"         and the framework multiplies the output by {factor:g}")
    return [f"  {line}" for line in lines]


def _listed(arguments: Mapping[str, Any], glue: str = " ") -> str:
    shown = (f"{name}={_argument(value)}" for name, value in arguments.items())
    return ", ".join(text.replace(" ", glue) for text in shown)


def _argument(value: object) -> str:
    if not isinstance(value, Mapping):
        return str(value)
    text = f"{value['dtype']}[{', '.join(map(str, value['shape']))}]"
    if "value" in value:
        text = f"{value['value']:g} ({text})"
    return text + (f" / {value['divided_by']}" if "divided_by" in value else "")


def reach(record: VerdictRecord) -> str:
    """Who can meet the verdict."""
    known = reached(record.reach, record.opt_in, by_default=record.by_default)
    return f"{known}; it is not known whether by default" if record.reach_question else known


def reached(reach: Reach, opt_in: Iterable[str], *, by_default: bool) -> str:
    """Who can meet something, and what has to be switched on for that."""
    switches = ", ".join(opt_in)
    if switches:
        return f"{reach}: {switches}"
    return f"{reach}, by default" if by_default else str(reach)


def rarity(reach: Reach, *, by_default: bool) -> int:
    """Return how few people can meet something: 0 for a published checkpoint by default."""
    return 2 * list(Reach).index(reach) + (not by_default)


def token(example: Mapping[str, Any]) -> list[str]:
    """Write a counterexample as lines that a person can follow."""
    sides = [f"  on the expert {side}" for side in example["sides"]]
    if sides[0] == sides[1]:
        sides = ["", ""]
    pairs = example["wanted"], example["got"]
    wanted, got = (_sparse(values) for values in pairs)
    if (wanted, sides[0]) == (got, sides[1]):
        wanted, got = (_sparse(values, digits=9) for values in pairs)
    count, bias = len(example["logits"]), example["bias"]
    return [
        f"a token of {count} expert{'s' * (count > 1)}",
        f"logits   {_all(example['logits'])}",
        *([f"bias     {_all(bias)}"] if bias else []),
        f"wanted   {wanted}{sides[0]}",
        f"got      {got}{sides[1]}",
    ]


def _sparse(pairs: Iterable[Sequence[float]], digits: int = 6) -> str:
    """Values by expert, equal ones together: `0-2 5: 0.25  3: 0.125`."""
    experts: dict[str, list[int]] = {}
    for expert, value in pairs:
        experts.setdefault(f"{value:.{digits}g}", []).append(int(expert))
    return "  ".join(f"{_ranges(ids)}: {text}" for text, ids in experts.items())


def _all(values: Sequence[float]) -> str:
    """As `_sparse`, zeros left out."""
    others = [(expert, value) for expert, value in enumerate(values) if value]
    return f"{_sparse(others)}  others 0" if others else "all 0"


def _ranges(ids: list[int]) -> str:
    """Ascending numbers, runs as `first-last`."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    return " ".join("-".join(map(str, run)) for run in runs)


#: Who has what in a sentence about model code.
CODE = "the model", "the model code asks for"


def model_code(judgement: CodeJudgement) -> list[str]:
    """Where a model's code asks its MoE layer for another routing than the model has."""
    from pytest_moe_routing.routing import recipe_of

    lines = [f"{judgement.model}: {judgement.request.block} and the model disagree"]
    for finding in judgement.findings:
        passed = f" ({finding.where})" if finding.where else ""
        lines.append(f"  problem  {sentence(finding, *CODE)}{passed}")
    if judgement.request.when:
        lines.append(f"  when     {judgement.request.when}")
    if judgement.request.switch:
        lines.append(f"  reach    only with an opt-in switch: {judgement.request.switch}")
    config_class = judgement.request.config_class
    if config_class and any(finding.kind is Kind.RECIPE for finding in judgement.findings):
        lines.append(f"  config   read by {config_class}")
    if judgement.counterexample is not None:
        lines += [
            f"  router   {recipe_of(judgement.model.router)}",
            f"  asked    {judgement.asked}",
            *[f"    {line}" for line in token(judgement.counterexample.as_dict())],
        ]
    notes = (": ".join(filter(None, (sentence(note), note.fact))) for note in judgement.notes)
    return lines + [f"  note     {note}" for note in notes]
