"""Which experts a module pattern of a quantization config covers. Patterns are others': bounded.

A pattern is tried on the names that the experts' projections have in published checkpoints:
`model.layers.3.mlp.experts.0.gate_proj`. It may be

- `re:` and a regular expression that matches from the start (compressed-tensors, auto-round),
- a wildcard pattern with `*` (ModelOpt), or
- a path of modules, or the end or middle of one: `mlp.experts` (fp8, AWQ, GPTQ).

Sources: vllm 0.33.0 quantization/compressed_tensors/utils.py, modelopt.py is_layer_excluded,
utils/quant_utils.py is_layer_skipped.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from fnmatch import translate
from itertools import product
from re import _constants as opcodes  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_PREFIXES = (
    *("model.layers", "layers", "model.language_model.layers", "language_model.model.layers"),
    *("backbone.layers", "model.decoder.layers"),
)
#: Modules that hold a layer's routed experts.
BLOCKS = ("mlp", "block_sparse_moe", "ffn", "mixer", "feed_forward", "moe")
_PROJECTIONS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))
#: More unbounded repeats than this, or one within another, can take forever on a short name.
_MAX_REPEATS = 5
_MAX_LENGTH = 500
#: Seconds for all patterns of one config; real ones take milliseconds.
_TIME = 1.0


class Covers(Enum):
    """How much of a layer's routed experts a pattern covers."""

    NONE = 0
    SOME = 1
    ALL = 2


@dataclass(frozen=True)
class Experts:
    """Where a layer has its routed experts.

    Attributes:
        count: How many there are.
        blocks: Names of the module that holds them; an empty name for the layer itself.
    """

    count: int
    blocks: tuple[str, ...] = BLOCKS


class PatternError(Exception):
    """A pattern that cannot be decided. Says why."""


class Patterns:
    """A list of patterns, asked for one layer after the other.

    Raises:
        PatternError: A pattern is no regular expression, or too complicated.
    """

    def __init__(self, patterns: Iterable[object], experts: Experts, deadline: float) -> None:
        texts = [pattern for pattern in patterns if isinstance(pattern, str)]
        self._matchers = [(text, _compile(text)) for text in texts if _may_matter(text)]
        self._experts = sorted({0, experts.count - 1})
        self._blocks = experts.blocks
        self._deadline = deadline
        self._by_layer: dict[tuple[str, int], Covers] = {}

    def covers(self, layer: int) -> Covers:
        """How much of a layer's experts the patterns cover together."""
        found = [self._covers(text, matcher, layer) for text, matcher in self._matchers]
        return max(found, key=lambda c: c.value, default=Covers.NONE)

    def first(self, layer: int) -> tuple[str | None, Covers]:
        """Return the first pattern that covers experts of a layer, and how much of them."""
        for text, matcher in self._matchers:
            covers = self._covers(text, matcher, layer)
            if covers is not Covers.NONE:
                return text, covers
        return None, Covers.NONE

    def _covers(self, text: str, matcher: re.Pattern[str], layer: int) -> Covers:
        numbers = () if text.startswith("re:") else re.findall(r"layers\.(\d+)", text)
        if numbers and not any(str(layer).startswith(number) for number in numbers):
            return Covers.NONE
        # What has no digit in it is the same for every layer.
        key = (text, layer if re.search(r"\d|\\d|\[", text) else -1)
        if key not in self._by_layer:
            self._by_layer[key] = self._ask(matcher, layer)
        return self._by_layer[key]

    def _ask(self, matcher: re.Pattern[str], layer: int) -> Covers:
        best = Covers.NONE
        for prefix, block in product(_PREFIXES, self._blocks):
            if time.monotonic() > self._deadline:
                raise PatternError("the patterns take too long")
            experts = ".".join(filter(None, (prefix, str(layer), block, "experts")))
            if matcher.match(experts):
                return Covers.ALL
            fused = [
                bool(matcher.match(f"{experts}.{name}")) for name in ("gate_up_proj", "down_proj")
            ]
            if all(fused):
                return Covers.ALL
            for projections in _PROJECTIONS:
                names = [f"{experts}.{e}.{p}" for e in self._experts for p in projections]
                matched = [bool(matcher.match(name)) for name in names]
                if all(matched):
                    return Covers.ALL
                if any(matched):
                    best = Covers.SOME
        return best


def deadline() -> float:
    """Until when the patterns of one config may take."""
    return time.monotonic() + _TIME


def _may_matter(text: str) -> bool:
    """Whether a pattern may be about routed experts: a quick look at what has no wildcard."""
    if text.startswith("re:") or "*" in text:
        return True
    if "experts" in text:
        return "shared" not in text
    # A layer, or its block of experts.
    return text.rpartition(".")[2] in BLOCKS or text.rpartition(".")[2].isdigit()


def _compile(text: str) -> re.Pattern[str]:
    if text.startswith("re:"):
        expression = text[3:]
        if len(expression) > _MAX_LENGTH:
            raise PatternError(f"the pattern {text[:40]}... is too long")
        try:
            tree = parser.parse(expression)
        except (re.error, RecursionError, OverflowError) as error:
            raise PatternError(f"the pattern {text[:40]!r} is not a regular expression") from error
        if sum(_repeats(tree)) > _MAX_REPEATS:
            raise PatternError(f"the pattern {text[:40]!r} is too complicated")
        return re.compile(expression)
    if "*" in text:
        if text.count("*") > _MAX_REPEATS:
            raise PatternError(f"the pattern {text[:40]!r} is too complicated")
        return re.compile(translate(text))
    # A path, from a component's start to a component's end, with whatever lies below it.
    return re.compile(rf"(.*\.)?{re.escape(text)}(\.|$)")


def _repeats(tree: Any, within: int = 1) -> Iterator[int]:
    """One for each repeat without a small bound; many for one that lies within another."""
    for opcode, argument in tree:
        if opcode in (opcodes.MAX_REPEAT, opcodes.MIN_REPEAT):
            _, most, inner = argument
            unbounded = most is opcodes.MAXREPEAT or most > 8
            yield within if unbounded else 0
            yield from _repeats(inner, 10 * within if unbounded else within)
        elif opcode is opcodes.SUBPATTERN:
            yield from _repeats(argument[-1], within)
        elif opcode is opcodes.BRANCH:
            for branch in argument[1]:
                yield from _repeats(branch, within)
        elif opcode in (opcodes.ASSERT, opcodes.ASSERT_NOT):
            yield from _repeats(argument[1], within)
        elif opcode is opcodes.GROUPREF:
            yield _MAX_REPEATS + 1
