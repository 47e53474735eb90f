"""The table of architecture families, `families.yaml`, looked up by the names that configs use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from pytest_moe_routing.data import read_data

#: In the fixed values of a case: the model cannot be described, for this reason.
REFUSE = "refuse"
#: In the fixed values of a case: what is read may not be what the model computes, for this reason.
UNPROVEN = "unproven"
#: In the fixed values of a case: some frameworks honor the key, and others ignore it.
DISPUTED = "disputed"
#: What follows a model's own name in the names of its classes. Another head has the same experts.
_HEAD = re.compile(
    r"(Text)?(For(CausalLM|ConditionalGeneration|SequenceClassification|TokenClassification"
    r"|QuestionAnswering|Embedding)|LMHeadModel|Model)$"
)
_ELSE, _DEFAULT = "else", "default"


@dataclass(frozen=True)
class Case:
    """A config key whose value decides: further fixed values for each of its values."""

    key: str
    default: Any
    values: tuple[tuple[Any, Mapping[str, Any]], ...]
    otherwise: Mapping[str, Any] | None

    def fixed(self, value: object) -> Mapping[str, Any] | None:
        """Return what a value fixes; None if the value is not valid."""
        for valid, fixed in self.values:
            # True is 1 in Python, and neither is the other in a config.
            if valid == value and isinstance(valid, bool) == isinstance(value, bool):
                return fixed
        return self.otherwise

    def decides(self, name: str) -> bool:
        """Whether any value of the key fixes a value of this name."""
        return any(name in fixed for _, fixed in self.values) or name in (self.otherwise or {})

    def __str__(self) -> str:
        return "one of " + ", ".join("null" if v is None else str(v) for v, _ in self.values)


@dataclass(frozen=True)
class Family:
    """How one family's config.json is read. The fields are explained in `families.yaml`."""

    name: str
    router: str
    architectures: tuple[str, ...] = ()
    model_types: tuple[str, ...] = ()
    config: str | None = None
    since: str = "5.19.0"
    fixed: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()
    first: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    blocks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """All families, and what they share.

    Attributes:
        families: By the row's own name.
        by_name: Families under every architecture and model type that means them.
        by_base: Families under the part of an architecture's name that its heads share.
        wrappers: Names of the families that the text model of a wrapper may have, by the wrapper's
            architecture or model type.
        refused: Reasons, by architecture or model type.
        spellings: The config keys that a value may have, by the value's name.
        nulls: What null means, for the values that may be null.
        activations: The experts' activation, by the config's name for it.
        nested: Keys of objects that hold the text model's config.
    """

    families: Mapping[str, Family]
    by_name: Mapping[str, Family]
    by_base: Mapping[str, Family]
    wrappers: Mapping[str, tuple[str, ...]]
    refused: Mapping[str, str]
    spellings: Mapping[str, tuple[str, ...]]
    nulls: Mapping[str, Any]
    activations: Mapping[str, str]
    nested: tuple[str, ...]


@cache
def table() -> Table:
    """Return the packaged table."""
    data = read_data(__package__, "families.yaml")
    families = {name: _family(name, row, data["routers"]) for name, row in data["families"].items()}
    return Table(
        families=families,
        by_name={name: family for family in families.values() for name in _names(family)},
        by_base={base_of(name): f for f in families.values() for name in f.architectures},
        wrappers={name: tuple(inner) for name, inner in data["wrappers"].items()},
        refused=data["refused"],
        spellings={name: tuple(keys) for name, keys in data["spellings"].items()},
        nulls=data["nulls"],
        activations=data["activations"],
        nested=tuple(data["nested"]),
    )


@cache
def keys_of(value: str) -> frozenset[str]:
    """Every config key under which a family has a value, whose name is a field of the spec."""
    families = table()
    keys = set(families.spellings.get(value, ()))
    for family in families.families.values():
        keys.update(family.keys.get(value, ()))
        keys.update(case.key for case in family.cases if case.decides(value))
    return frozenset(key.rpartition(".")[2] for key in keys)


def base_of(architecture: str) -> str:
    """Return the model's own name in an architecture's: `Qwen3Moe` of `Qwen3MoeForCausalLM`."""
    return _HEAD.sub("", architecture)


def _names(family: Family) -> Iterator[str]:
    yield from (family.name, *family.model_types, *family.architectures)


def _family(name: str, row: Mapping[str, Any], routers: Mapping[str, Mapping[str, Any]]) -> Family:
    lists = ("architectures", "model_types", "first", "reads", "blocks", "notes")
    router = dict(routers[row["router"]])
    cases = {**router.pop("cases", {}), **row.get("cases", {})}
    return Family(
        name=name,
        router=row["router"],
        config=row.get("config"),
        since=row.get("since", "5.19.0"),
        fixed={**router, **row.get("fixed", {})},
        keys={key: tuple(keys) for key, keys in row.get("keys", {}).items()},
        defaults=row.get("defaults", {}),
        limits=row.get("limits", {}),
        cases=tuple(_case(key, values) for key, values in cases.items()),
        **{key: tuple(row.get(key, ())) for key in lists},
    )


def _case(key: str, values: Mapping[Any, Any]) -> Case:
    valid = tuple((v, fixed) for v, fixed in values.items() if v not in (_ELSE, _DEFAULT))
    return Case(key, values[_DEFAULT], valid, values.get(_ELSE))
