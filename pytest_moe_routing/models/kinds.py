"""The building blocks of the YAML schema: the kind of one key, and how a dataclass declares it."""

from __future__ import annotations

from dataclasses import MISSING, Field, dataclass, field
from typing import Any

_TYPES = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "text",
    dict: "a mapping of keys to values",
}
#: (offending key, what was found, what is expected instead)
Problem = tuple[str, str, str]


@dataclass(frozen=True)
class Kind:
    """The valid values of one key: a type, and optionally a range or a closed list."""

    type: type
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    nullable: bool = False
    many: bool = False
    empty: bool = False

    def problem(self, value: object) -> str | None:
        """Return what is expected if `value` is not valid, otherwise None."""
        if self.many:
            one = Kind(self.type, choices=self.choices)
            some = isinstance(value, list) and bool(value or self.empty)
            if not isinstance(value, list) or not some or any(map(one.problem, value)):
                return f"a {'' if self.empty else 'non-empty '}list, each item {one}"
            return None if len(set(value)) == len(value) else "a list without repetition"
        if value is None:
            return None if self.nullable else str(self)
        if not self.is_typed(value) or (self.choices and value not in self.choices):
            return str(self)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low_enough = self.maximum is None or value <= self.maximum
            high_enough = self.minimum is None or value >= self.minimum
            if not (low_enough and high_enough):
                return str(self)
        return None

    def is_typed(self, value: object) -> bool:
        """Whether a value is of the type, whatever else it must be."""
        # bool is an int in Python, and 8 is a fine float in YAML; only the latter is meant.
        return type(value) is self.type or (self.type is float and type(value) is int)

    def __str__(self) -> str:
        text = "one of " + ", ".join(map(str, self.choices)) if self.choices else _TYPES[self.type]
        signs = {">=": self.minimum, "<=": self.maximum}
        limits = [
            f"{sign} {limit if isinstance(limit, int) else f'{limit:g}'}"
            for sign, limit in signs.items()
            if limit is not None
        ]
        text = " ".join(filter(None, (text, " and ".join(limits))))
        return text + (" or null" if self.nullable else "")


def key(type_: type, *, default: Any = MISSING, **limits: Any) -> Any:
    """Declare one YAML key; without `default` it is required."""
    kind = {"kind": Kind(type_, **limits)}
    return field(metadata=kind) if default is MISSING else field(default=default, metadata=kind)


def mapping() -> Any:
    """Declare an optional YAML key whose value is a mapping of any keys to any values."""
    return field(default_factory=dict, hash=False, metadata={"kind": Kind(dict)})


def is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING
