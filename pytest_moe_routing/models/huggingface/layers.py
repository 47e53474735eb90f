"""Which layers of a config differ: dense, routed by a table of token ids, or with other numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pytest_moe_routing.models.huggingface.document import Section, show
from pytest_moe_routing.models.kinds import Kind
from pytest_moe_routing.models.layer_groups import MAX_LAYERS, LayerGroup, ranges
from pytest_moe_routing.models.spec import RouterConfig, schema

#: Keys with the number of decoder layers.
_COUNTS = ("num_hidden_layers", "n_layers", "num_layers", "n_layer")
#: What `mlp_layer_types`, `layers_block_type` and Nemotron's pattern call layers without experts.
_TABLE = "hash_moe"
_ROUTED = ("sparse", "moe", "E")
#: One layer in that many has experts; the key's value and the first such layer's index.
_STEPS: Mapping[str, Callable[[Section, int], int]] = {
    "decoder_sparse_step": lambda text, step: step - 1,
    "interleave_moe_layer_step": lambda text, step: step - 1,
    "moe_layer_interval": lambda text, step: step - 1,
    "moe_layer_freq": lambda text, step: 0,
    "expert_layer_period": lambda text, step: _integer(text, "expert_layer_offset") or 0,
}
#: The valid values of every key with a number of layers or the index of one.
_NUMBERS: Mapping[str, Kind] = {
    **{key: Kind(int, minimum=1, maximum=MAX_LAYERS, nullable=True) for key in (*_COUNTS, *_STEPS)},
    **{
        key: Kind(int, minimum=0, maximum=MAX_LAYERS, nullable=True)
        for key in (
            *("expert_layer_offset", "first_k_dense_replace", "num_dense_layers"),
            *("moe_layer_num_skipped", "moe_layer_start_index", "num_hash_layers"),
        )
    },
    # ERNIE's class has -1 for the last layer.
    "moe_layer_end_index": Kind(int, minimum=-1, maximum=MAX_LAYERS, nullable=True),
}
#: Those that a config may list instead, with a value for each layer or kind of token.
_LISTED = (
    *("moe_layer_freq", "moe_layer_num_skipped"),
    *("moe_layer_start_index", "moe_layer_end_index"),
)


@dataclass(frozen=True)
class Layers:
    """What a config states about its layers.

    Attributes:
        count: Decoder layers; None when no key states it.
        kinds: Kinds of the layers that are not `moe`, by index.
        notes: What is known about layers and cannot be put in groups.
    """

    count: int | None
    kinds: Mapping[int, str]
    notes: tuple[str, ...] = ()
    #: By index: what differs from the model's own numbers.
    own: dict[int, dict[str, Any]] = field(default_factory=dict)

    def vary(self, name: str, values: list[Any]) -> Any:
        """Take in a value with one item per layer, and return the commonest among routed layers."""
        routed = [i for i in range(len(values)) if i not in self.kinds]
        if not routed:
            return values[0]
        try:
            ((base, _),) = Counter(values[i] for i in routed).most_common(1)
        except TypeError:  # lists or objects among the values
            return values[routed[0]]
        for i in routed:
            if values[i] != base:
                self.own.setdefault(i, {})[name] = values[i]
        return base

    def take(self, name: str, values: Mapping[int, Any]) -> None:
        """Take in the values of single routed layers that differ from the model's."""
        for i, value in values.items():
            if self.kinds.get(i, "moe") == "moe":
                self.own.setdefault(i, {})[name] = value

    def with_experts(self) -> list[int]:
        """Return the layers with routed experts; one of them when their number is not known."""
        dense = {i for i, kind in self.kinds.items() if kind == "dense"}
        if self.count is None:
            return [max(dense, default=-1) + 1]
        return sorted(set(range(self.count)) - dense)

    def groups(self) -> tuple[LayerGroup, ...]:
        """Return the groups, in the order of their first layers."""
        members: dict[str, tuple[list[int], str, dict[str, Any]]] = {}
        for i in sorted({*self.kinds, *self.own}):
            kind, own = self.kinds.get(i, "moe"), self.own.get(i, {})
            label = f"{kind} {sorted(own.items())}"
            members.setdefault(label, ([], kind, own))[0].append(i)
        router = schema(RouterConfig)
        return tuple(
            LayerGroup(
                layers=ranges(layers),
                kind=kind,
                scheme=own.get("scheme"),
                router={name: v for name, v in own.items() if name in router},
                experts={n: v for n, v in own.items() if n not in router and n != "scheme"},
            )
            for layers, kind, own in members.values()
        )


def read_layers(text: Section) -> Layers:
    """Return the number of layers, and those that have no routed experts.

    A config without the number of layers has no layers by step; a note states the step.

    Raises:
        ModelError: A number of layers, or the index of one, is none.
    """
    for key, kind in _NUMBERS.items():
        value = text.get(key)
        if isinstance(value, list) and key in _LISTED:
            # A frequency of each layer says whether the layer has experts.
            is_frequency = key == "moe_layer_freq"
            flag = Kind(int, minimum=0, maximum=1)
            _check_items(text, key, value, flag if is_frequency else replace(kind, nullable=False))
        elif (expected := kind.problem(value)) is not None:
            text.fail(key, show(value), expected)
    count = next((n for key in _COUNTS if (n := _integer(text, key))), None)
    for key in ("mlp_only_layers", "moe_layers"):
        _check_indices(text, key, count)
    listed = _listed(text, count)
    if listed is not None:
        count = count or min(len(listed), MAX_LAYERS)
        kinds = {i: kind for i, kind in enumerate(listed[:count]) if kind != "moe"}
        return Layers(count, kinds)
    kinds = dict.fromkeys(_dense(text, count), "dense")
    kinds |= dict.fromkeys(range(_first(text, "num_hash_layers", count)), _TABLE)
    notes = () if count is not None else tuple(_steps(text))
    return Layers(count, dict(sorted(kinds.items())), notes)


def _check_items(text: Section, key: str, values: list[Any], kind: Kind) -> None:
    if not values:
        text.fail(key, "an empty list", str(kind))
    for i, value in enumerate(values):
        # A flag is 0 or 1.
        expected = kind.problem(int(value) if isinstance(value, bool) else value)
        if expected is not None:
            text.fail(f"{key}.{i}", show(value), expected)


def _check_indices(text: Section, key: str, count: int | None) -> None:
    """Check a list of layers: the code of models asks whether it holds a layer's index."""
    values = [*text.items(key)]
    kind = Kind(int, minimum=0, maximum=(count or MAX_LAYERS) - 1)
    for i, value in enumerate(values):
        expected = kind.problem(value)
        if expected is not None:
            text.fail(f"{key}.{i}", show(value), f"the index of a layer, {expected}")
        if value in values[:i]:
            text.fail(f"{key}.{i}", show(value), "each layer once")


def _listed(text: Section, count: int | None) -> list[str] | None:
    """Each layer's kind, where the config lists them."""
    for key in ("mlp_layer_types", "layers_block_type", "hybrid_override_pattern"):
        value = text.get(key)
        if isinstance(value, str):
            # Nemotron-3's puzzle models separate the letters of pipeline stages.
            value = [letter for letter in value if letter.isalnum() or letter in "*-"]
        if isinstance(value, list) and any(item in (*_ROUTED, _TABLE) for item in value):
            names = {**dict.fromkeys(_ROUTED, "moe"), _TABLE: _TABLE}
            return [
                names.get(item, "dense") if isinstance(item, str) else "dense" for item in value
            ]
    frequency = text.get("moe_layer_freq")
    if isinstance(frequency, list):
        if len(frequency) < (count or 0):
            text.fail(
                "moe_layer_freq", f"{len(frequency)} values", f"one for each of {count} layers"
            )
        return ["moe" if item else "dense" for item in frequency]
    enumerated = text.get("moe_layers_enum")
    if isinstance(enumerated, str) and re.fullmatch(r"\d{1,4}(,\d{1,4})*,?", enumerated):
        enumerated = [int(layer) for layer in enumerated.rstrip(",").split(",")]
    for layers in (enumerated, text.get("moe_layers")):
        if isinstance(layers, list) and layers and count:
            return ["moe" if i in layers else "dense" for i in range(count)]
    return None


def _dense(text: Section, count: int | None) -> Iterator[int]:
    for key in ("first_k_dense_replace", "num_dense_layers", "moe_layer_num_skipped"):
        yield from range(_first(text, key, count))
    yield from text.items("mlp_only_layers")
    yield from range(_first(text, "moe_layer_start_index", count))
    if count is None:
        return
    last = _integer(text, "moe_layer_end_index")
    if last is not None and last >= 0:
        yield from range(last + 1, count)
    for key, start in _STEPS.items():
        if step := _integer(text, key):
            yield from (i for i in range(count) if (i - start(text, step)) % step)


def _steps(text: Section) -> Iterator[str]:
    for key in _STEPS:
        step = _integer(text, key)
        if step is not None and step > 1:
            yield f"one layer in {step} is a mixture of experts ({key})"


def _first(text: Section, key: str, count: int | None) -> int:
    """Return a number of layers; 0 when it is absent or no such number."""
    value = _integer(text, key)
    if value is None or not 0 < value <= MAX_LAYERS:
        return 0
    return value if count is None else min(value, count)


def _integer(text: Section, key: str) -> int | None:
    value = text.get(key)
    return value if type(value) is int else None
