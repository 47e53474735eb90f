"""Whether a kernel is given the rank's part of experts that are split, each over several ranks.

This is what `--tensor-parallel-size` does without expert parallelism. How weights are padded for a
kernel depends on the intermediate size of a rank, as far as tiles and blocks of scales go, so one
model is asked for each remainder of that size. Experts that are whole are asked about as well, as a
split over one rank, if something is left over of their size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.exact import Gate, kernel_gates
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.judgement import Judgement
from pytest_moe_routing.oracle.laid_out import LaidOut
from pytest_moe_routing.oracle.layouts import layout_findings
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.oracle.verdict import Verdict

#: Over how many ranks people split experts, or have them whole.
_COUNTS = (1, 2, 4, 8)
#: The gate about sizes, see `kernel_gates`: a framework may pad them.
_SHAPE = "shape"


@dataclass(frozen=True)
class Split:
    """Experts of a model, split over so many ranks."""

    model: ModelSpec
    count: int

    @property
    def inner(self) -> int:
        """The intermediate size of a rank."""
        return self.model.experts.intermediate_size // self.count

    def __str__(self) -> str:
        return self.model.id if self.count == 1 else f"{self.model.id} over {self.count}"


@dataclass(frozen=True)
class WrongSplit:
    """What a kernel is not given as its rank has it.

    Attributes:
        splits: That of the model that was asked, and those with as much left over.
        methods: The files and the classes that prepare the weights.
    """

    at: LaidOut
    splits: tuple[Split, ...]
    methods: tuple[str, ...]


@dataclass(frozen=True)
class SplitsFound:
    """How a target splits experts in a scheme.

    Attributes:
        answered: How many splits were asked or have as much left over as one that was.
        unanswered: Why how many could not be asked.
    """

    wrong: tuple[WrongSplit, ...]
    answered: int
    unanswered: Counter[str]


def wrong_splits(target: Target, scheme: str, models: Iterable[ModelSpec]) -> SplitsFound:
    """Ask about a split of each kind that the target runs in the scheme's kernels."""
    unanswered, answered = Counter[str](), 0
    wrong: dict[Any, list[tuple[LaidOut, list[Split]]]] = {}
    for splits in _alike(target, scheme, models):
        try:
            asked = min(splits, key=_preference)
            is_wrong = _ask(target, scheme, asked, _asked_size(target.flashinfer, scheme, asked))
            found, concerned = _of_models(target, scheme, splits) if is_wrong else ([], [])
        except Unsupported as reason:
            unanswered[str(reason)] += len(splits)
            continue
        answered += len(splits)
        for at in (part for each in found for part in _apart(each)):
            # Sizes differ, not what is wrong.
            key = tuple(finding.cause for finding in at.findings)
            wrong.setdefault(key, []).append((at, concerned))
    mistakes = (
        WrongSplit(
            given[0][0],
            tuple(dict.fromkeys(split for _, splits in given for split in splits)),
            tuple(dict.fromkeys(at.method for at, _ in given)),
        )
        for given in wrong.values()
    )
    return SplitsFound(tuple(mistakes), answered, unanswered)


def with_sizes(target: Target, judgement: Judgement) -> Judgement:
    """Return a crash if an exact case has sizes that its kernel lacks, and nobody pads them.

    A target that refuses to make a layer of such sizes rejects the case.

    Raises:
        Unsupported: The target cannot be asked what becomes of the sizes.
    """
    model, scheme, flashinfer = judgement.model, judgement.scheme, judgement.flashinfer
    if judgement.verdict is not Verdict.EXACT or all(
        gate.ok or gate.name != _SHAPE for gate in kernel_gates(model, scheme, flashinfer)
    ):
        return judgement
    answers = target.split(model, scheme, 1, model.experts.intermediate_size)
    if findings := tuple(finding for each in answers for finding in each.findings):
        return replace(judgement, verdict=Verdict.CRASH, findings=findings)
    if refused := [each.refused for each in answers if each.refused is not None]:
        gate = Gate(_SHAPE, False, f"{refused[0].got} ({refused[0].where})")
        return replace(judgement, verdict=Verdict.FALLBACK, gates=(*judgement.gates, gate))
    return judgement


def _preference(split: Split) -> tuple[bool, int, int]:
    """Return what is least for the split to ask about: of two ranks, there is no third."""
    # A layer of few experts is made sooner.
    return split.count == 2, split.count, split.model.router.num_experts


def _of_models(
    target: Target, scheme: str, splits: Iterable[Split]
) -> tuple[list[LaidOut], list[Split]]:
    """Return what is wrong with a split as large as its model's, and the splits that it concerns.

    Those of published checkpoints are asked first. If nothing is wrong with any of them, it is a
    matter of the small size that was asked about before, and no mistake.
    """
    ordered = sorted(splits, key=lambda split: (scheme not in split.model.checkpoints, split.inner))
    for place, split in enumerate(ordered):
        found = _ask(target, scheme, split, split.model.experts.intermediate_size)
        if found:
            return found, ordered[place:]
    return [], []


def _ask(target: Target, scheme: str, split: Split, whole: int) -> list[LaidOut]:
    """Return what is wrong with a split, as if experts had the intermediate size `whole`."""
    answers = target.split(split.model, scheme, split.count, whole)
    judged = (_judged(target.flashinfer, scheme, split, each) for each in answers)
    return [each for each in judged if each.findings]


def _apart(at: LaidOut) -> Iterator[LaidOut]:
    """Yield one mistake at a time: a method may make several."""
    kinds: dict[Kind, list[Finding]] = {}
    for finding in at.findings:
        kinds.setdefault(finding.kind, []).append(finding)
    yield from (replace(at, findings=tuple(findings)) for findings in kinds.values())


def _asked_size(flashinfer: FlashInfer, scheme: str, split: Split) -> int:
    """Return a small intermediate size, with as much left over as that of a split's model.

    The third rank, or the second of two, has something of it even if those before it have whole
    tiles.
    """
    period = _period(flashinfer, scheme)
    inner = split.inner % period or period
    before = min(split.count - 1, 2) * period
    return split.count * (inner if split.count * inner > before else inner + period)


def _period(flashinfer: FlashInfer, scheme: str) -> int:
    return max(flashinfer.tile_rows, _block(flashinfer, scheme))


def _block(flashinfer: FlashInfer, scheme: str) -> int:
    entry = flashinfer.entry_point(scheme)
    return 1 if entry is None else entry.multiple_of


def _alike(target: Target, scheme: str, models: Iterable[ModelSpec]) -> Iterable[list[Split]]:
    """Return the splits of models, those together that a target prepares alike."""
    block, period = (f(target.flashinfer, scheme) for f in (_block, _period))
    kinds: dict[Any, list[Split]] = {}
    for model in models:
        try:
            way = target.weight_path(model, scheme)
        except Unsupported:
            # It is counted where the layouts of its weights are asked about.
            continue
        experts = model.experts
        whole = experts.intermediate_size
        for split in (Split(model, count) for count in _COUNTS if way and whole % count == 0):
            is_whole = split.count == 1
            if is_whole and whole % period == 0:
                # Every layout is asked with such a size.
                continue
            left_over = split.inner % period, whole % block
            key = way, experts.gated, experts.bias, is_whole, left_over
            kinds.setdefault(key, []).append(split)
    return kinds.values()


def _judged(flashinfer: FlashInfer, scheme: str, split: Split, at: LaidOut) -> LaidOut:
    """Return how weights lie, and what else is wrong.

    A target may refuse to split blocks: those that share a scale, or that a layout is made of.
    """
    if at.refused is None or split.inner % _block(flashinfer, scheme) == 0:
        refused = () if at.refused is None else (at.refused,)
        return replace(at, findings=(*refused, *at.findings))
    return at


def split_findings(
    flashinfer: FlashInfer, scheme: str, answer: Mapping[str, Any]
) -> Iterator[Finding]:
    """Yield what is wrong with the call of a rank's kernel.

    Args:
        answer: The `function`; the `orders` of the call's tensors, as in `layout_findings`; whether
            a block of scales `is_torn`; the `rows` of the first weights and the `inner` size of the
            weights; and the size that the call is `told`.
    """
    where = answer["function"]
    if answer["is_torn"]:
        what = "those of a rank are not those of its weights, which end inside a block"
        yield Finding(Kind.LAYOUT, "block scales", None, what, where)
    else:
        yield from layout_findings(answer["orders"], where)
    inner, told = answer["inner"], answer["told"]
    if told != inner:
        yield Finding(Kind.ARGUMENT, "intermediate_size", inner, told, where)
    for name, size, of in (
        ("number of rows", answer["rows"], flashinfer.tile_rows),
        ("intermediate_size", inner, _block(flashinfer, scheme)),
    ):
        if size % of:
            fact = "FlashInfer has no kernel for other sizes"
            yield Finding(Kind.LIMIT, name, f"%{of}", size, where, fact)


def told_of(splits: Sequence[Split]) -> list[str]:
    """Return the models of splits, each with the numbers of ranks."""
    counts: dict[str, set[int]] = {}
    for split in splits:
        counts.setdefault(split.model.id, set()).add(split.count)
    return [_told(name, sorted(each)) for name, each in counts.items()]


def _told(name: str, counts: Sequence[int]) -> str:
    over = " or ".join(str(count) for count in counts if count > 1)
    if not over:
        return name
    return f"{name}, also {name} over {over}" if 1 in counts else f"{name} over {over}"
