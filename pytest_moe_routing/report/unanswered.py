"""Questions inside a test that have no answer: a test counts them, and the run shows the counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

PROPERTY = "moe_unanswered"
#: What is counted; each is the sentence that shows the count, for one and for several.
CONFIGS = "config sweep: {n} config{s} {are} not judged"
CONCERNED = "config sweep: {n} model{s} {are} not compared"
ROUTERS = "the framework's own routers: {n} run{s} {are} not judged"
MODELS = "the framework's own routers: {n} model{s} {are} not judged"
REQUESTS = "model code: {n} model{s} {are} not judged"
WEIGHTS = "model code: {n} name{s} of weights {are} not judged"
FILES = "model code: {n} file{s} with experts {are} run for no packaged model"
SPLIT = "model code: {n} model{s} {are} not judged on ranks with other tokens"
OTHERS = "experts of other kernels: {n} case{s} {are} not judged"
METHODS = "quantization methods: {n} hand-over{s} {are} not judged"
PLACES = "placements of experts: {n} question{s} {are} not judged"
TAKEN = "experts that call no kernel of FlashInfer's: {n} case{s} {are} not judged"
KEYS = "quantization keys of experts: {n} question{s} {are} not judged"
CHECKPOINTS = "formats of checkpoints: {n} format{s} {are} not judged"
AROUND = "around kernel calls: {n} case{s} {are} not judged"
LAYOUTS = "layouts of weights: {n} case{s} {are} not judged"
SPLITS = "experts split over ranks: {n} split{s} {are} not judged"
NAMED = "runners that are named: {n} case{s} {are} not judged"
FORMATS = "checkpoints of other formats: {n} case{s} {are} not judged"
#: Tests that are skipped as a whole; pytest counts and lists these itself.
TESTS = "whole tests: {n} test{s} {are} not judged"


def note(
    record_property: Callable[[str, Any], None], reasons: Mapping[str, Mapping[str, int]]
) -> None:
    """Tell a test's reports how many questions have no answer, by sentence and reason."""
    given = {sentence: dict(counts) for sentence, counts in reasons.items() if counts}
    if given:
        record_property(PROPERTY, given)


def questions_of(properties: Mapping[str, Any]) -> Iterator[tuple[str, str, int]]:
    """Yield what a test could not ask, by its properties: a sentence, the reason and a count."""
    for sentence, counts in properties.get(PROPERTY, {}).items():
        for reason, count in counts.items():
            yield sentence, reason, count
    # A verdict that is not given is a record of its own.
    is_told = PROPERTY in properties or "moe_verdict" in properties
    if "moe_not_judged" in properties and not is_told:
        yield TESTS, properties["moe_not_judged"]["reason"], 1


def without_count(sentence: str) -> str:
    """Return what is not judged, for a count that stands elsewhere."""
    return " ".join(sentence.format(n="", s="s", are="are").split())


def told(sentence: str, count: int) -> str:
    """Return a sentence with its count."""
    is_one = count == 1
    return sentence.format(n=count, s="" if is_one else "s", are="is" if is_one else "are")


class Unanswered:
    """The counts of a run, over all tests."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = {}

    def __len__(self) -> int:
        return sum(counts.total() for counts in self._counts.values())

    def add(self, properties: Mapping[str, Any]) -> None:
        """Add the counts of a test, by its properties."""
        for sentence, counts in properties.get(PROPERTY, {}).items():
            self._counts.setdefault(sentence, Counter()).update(counts)

    def lines(self, *, every: bool) -> Iterator[str]:
        """Yield a line for each sentence and reason; or for each area, if not all are asked for."""
        if every:
            for sentence, counts in self._counts.items():
                yield told(sentence, counts.total())
                yield from (f"  {count} x {reason}" for reason, count in counts.most_common())
            return
        areas: dict[str, list[str]] = {}
        for sentence, counts in self._counts.items():
            area, _, what = told(sentence, counts.total()).partition(": ")
            areas.setdefault(area, []).append(what)
        lines = [f"{area}: {'; '.join(found)}" for area, found in areas.items()]
        yield from (*lines[:-1], *(f"{line}; -v lists the reasons" for line in lines[-1:]))
