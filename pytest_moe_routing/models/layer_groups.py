"""Layers that differ from a model's other layers: dense, routed by a table, or other numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pytest_moe_routing.models.kinds import Problem, key
from pytest_moe_routing.schemes import CHECKPOINT_SCHEMES

#: What a group's layers are.
#:   moe       routed by logits; `router` and `experts` hold what differs from the other layers
#:   dense     no routed experts: a plain MLP, or none
#:   hash_moe  experts are looked up in a table of token ids (DeepSeek-V4); no routing to judge
LAYER_KINDS = ("moe", "dense", "hash_moe")
_WORDS = {
    "dense": "dense",
    "hash_moe": "routed by a table of token ids instead of logits, and not judged here",
}
#: More layers than any model has; a slip in a range must not become an allocation of 100 GB.
MAX_LAYERS = 4096
_RANGE = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")


@dataclass(frozen=True)
class LayerGroup:
    """Layers that differ from the model's other layers in one way.

    Attributes:
        layers: Zero-based indices of decoder layers as ranges: `0-2, 43`.
        kind: One of `LAYER_KINDS`.
        scheme: The experts' quantization scheme, if it is another than the model's.
        router: Keys of `RouterConfig` with other values than the model's `router`.
        experts: Keys of `ExpertsConfig` with other values than the model's `experts`.
    """

    layers: str = key(str)
    kind: str = key(str, default="moe", choices=LAYER_KINDS)
    scheme: str | None = key(str, default=None, nullable=True, choices=CHECKPOINT_SCHEMES)
    router: Mapping[str, Any] = field(default_factory=dict, hash=False)
    experts: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def indices(self) -> tuple[int, ...]:
        """The layers' zero-based indices, ascending.

        Raises:
            ValueError: `layers` is not a list of ascending ranges.
        """
        found: list[int] = []
        for part in self.layers.split(","):
            match = _RANGE.fullmatch(part.strip())
            if match is None:
                raise ValueError(part)
            first = int(match[1])
            last = int(match[2] or first)
            if last < first or last >= MAX_LAYERS or (found and first <= found[-1]):
                raise ValueError(part)
            found += range(first, last + 1)
        return tuple(found)

    def as_dict(self) -> dict[str, Any]:
        """Return the group's keys as plain data, without those that are empty."""
        data: dict[str, Any] = {"layers": self.layers, "kind": self.kind}
        data |= {"scheme": self.scheme} if self.scheme else {}
        data |= {"router": dict(self.router)} if self.router else {}
        return data | ({"experts": dict(self.experts)} if self.experts else {})

    def __str__(self) -> str:
        """In words, for a reader: `layers 0-2 are dense`."""
        own: dict[str, Any] = {"scheme": self.scheme} if self.scheme else {}
        own |= {**self.router, **self.experts}
        differs = ", ".join(f"{name} {value}" for name, value in own.items())
        what = _WORDS.get(self.kind, f"different: {differs}")
        runs = self.layers.split(", ")
        more = len(replace(self, layers=", ".join(runs[8:])).indices) if runs[8:] else 0
        layers = ", ".join(runs[:8]) + (f" and {more} others" if more else "")
        one = self.layers.isdigit()
        return f"layer{'' if one else 's'} {layers} {'is' if one else 'are'} {what}"

    def problems(self) -> Iterator[Problem]:
        """Yield combinations of valid values that no group can have."""
        try:
            _ = self.indices
        except ValueError:
            expected = f"ascending ranges of layers below {MAX_LAYERS}, such as 0-2, 43"
            yield "layers", repr(self.layers[:60]), expected
            return
        differs = bool(self.router or self.experts or self.scheme)
        if differs and self.kind != "moe":
            yield "kind", self.kind, "moe for layers that have a router or experts of their own"
        if not differs and self.kind == "moe":
            yield "layers", self.layers, "something in which these layers differ"


def ranges(layers: Iterable[int]) -> str:
    """Return the text of `LayerGroup.layers` for ascending indices: `0-2, 43`."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], layer]
        else:
            runs.append([layer])
    return ", ".join("-".join(map(str, run)) for run in runs)


def overlaps(groups: Iterable[LayerGroup], num_layers: int | None) -> Iterator[Problem]:
    """Problems of groups together: a layer in two of them, or one that the model does not have."""
    seen: dict[int, str] = {}
    for group in groups:
        for layer in group.indices:
            if layer in seen:
                yield "layers", f"layer {layer} twice", f"it in one group; {seen[layer]} has it too"
                return
            if num_layers is not None and layer >= num_layers:
                yield "layers", f"layer {layer}", f"layers below num_layers ({num_layers})"
                return
            seen[layer] = group.layers
