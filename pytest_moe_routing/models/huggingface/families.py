"""The table of architecture families, `families.yaml`, looked up by the names that configs use."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

import yaml

from pytest_moe_routing.models.huggingface.document import Section

#: In the fixed values of a case: the model cannot be described, for this reason.
REFUSE = "refuse"
_ELSE, _DEFAULT = "else", "default"


@dataclass(frozen=True)
class Case:
    """A config key whose value decides: further fixed values for each of its values."""

    key: str
    default: Any
    values: tuple[tuple[Any, Mapping[str, Any]], ...]
    otherwise: Mapping[str, Any] | None

    def fixed(self, value: object) -> Mapping[str, Any] | None:
        """What a value fixes; None when it is none of the valid ones."""
        for valid, fixed in self.values:
            # True is 1 in Python, and neither is the other in a config.
            if valid == value and isinstance(valid, bool) == isinstance(value, bool):
                return fixed
        return self.otherwise

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
    fixed: Mapping[str, Any] = field(default_factory=dict)
    keys: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    cases: tuple[Case, ...] = ()
    first: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """All families, and what they share.

    Attributes:
        families: By the row's own name.
        by_name: Families under every architecture and model type that means them.
        refused: Reasons, by architecture or model type.
        spellings: The config keys that a value may have, by the value's name.
        nulls: What null means, for the values that may be null.
        activations: The experts' activation, by the config's name for it.
        nested: Keys of objects that hold the text model's config.
        routing: Patterns of the names of keys about experts or routing.
    """

    families: Mapping[str, Family]
    by_name: Mapping[str, Family]
    refused: Mapping[str, str]
    spellings: Mapping[str, tuple[str, ...]]
    nulls: Mapping[str, Any]
    activations: Mapping[str, str]
    nested: tuple[str, ...]
    routing: tuple[re.Pattern[str], ...]

    def about_routing(self, key: str) -> bool:
        """Whether a config key is about experts or routing, by its name."""
        return any(pattern.search(key) for pattern in self.routing)


@cache
def table() -> Table:
    """The packaged table."""
    text = resources.files(__package__).joinpath("families.yaml").read_text("utf-8")
    data = yaml.safe_load(text)
    families = {name: _family(name, row, data["routers"]) for name, row in data["families"].items()}
    return Table(
        families=families,
        by_name={name: family for family in families.values() for name in _names(family)},
        refused=data["refused"],
        spellings={name: tuple(keys) for name, keys in data["spellings"].items()},
        nulls=data["nulls"],
        activations=data["activations"],
        nested=tuple(data["nested"]),
        routing=tuple(map(re.compile, data["routing"])),
    )


def raw_keys(text: Section, families: Table) -> dict[str, Any]:
    """The keys of a config that are about experts or routing, with their values, as they stand."""
    read = {key.partition(".")[0] for keys in families.spellings.values() for key in keys}
    for family in families.families.values():
        read |= {key.partition(".")[0] for keys in family.keys.values() for key in keys}
        read |= {case.key.partition(".")[0] for case in family.cases} | {*family.limits}
    return {k: v for k, v in text.values.items() if k in read or families.about_routing(k)}


def _names(family: Family) -> Iterator[str]:
    yield from (family.name, *family.model_types, *family.architectures)


def _family(name: str, row: Mapping[str, Any], routers: Mapping[str, Mapping[str, Any]]) -> Family:
    lists = ("architectures", "model_types", "first", "notes")
    return Family(
        name=name,
        router=row["router"],
        config=row.get("config"),
        fixed={**routers[row["router"]], **row.get("fixed", {})},
        keys={key: tuple(keys) for key, keys in row.get("keys", {}).items()},
        defaults=row.get("defaults", {}),
        limits=row.get("limits", {}),
        cases=tuple(_case(key, values) for key, values in row.get("cases", {}).items()),
        **{key: tuple(row.get(key, ())) for key in lists},
    )


def _case(key: str, values: Mapping[Any, Any]) -> Case:
    valid = tuple((v, fixed) for v, fixed in values.items() if v not in (_ELSE, _DEFAULT))
    return Case(key, values[_DEFAULT], valid, values.get(_ELSE))
