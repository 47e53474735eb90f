"""Write a model as the text of a `model.yaml` that `load_model` reads back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING
from typing import Any

import yaml

from pytest_moe_routing.models.spec import SECTIONS, ModelSpec, schema

#: The keys that a reader looks for first; the others follow in the schema's order.
_FIRST = ("model", "hf_repo", "architecture", "router", "experts", "checkpoints")
#: Text that needs no quotes in YAML, whatever it means.
_PLAIN = re.compile(r"[A-Za-z][\w./-]*")


def dump_model(spec: ModelSpec) -> str:
    """Return the text of a model's `model.yaml`, defaults left out.

    Numbers are written in full, also where the model was read as `like` another.
    """
    lines: list[str] = []
    keys = schema(ModelSpec)
    for name in dict.fromkeys((*_FIRST, *keys)):
        value, item = getattr(spec, name), keys[name]
        if name in SECTIONS:
            lines += [f"{name}:", *(f"  {line}" for line in _keys(value))]
        elif "kind" not in item.metadata:
            lines += [f"{name}:", *(f"  - {_flow(g.as_dict())}" for g in value)] if value else []
        elif isinstance(value, dict):
            lines += [f"{name}: {_flow(value)}"] if value else []
        elif name in ("sources", "notes", "unproven") and value:
            lines += [f"{name}:", *(f"  - {_quoted(text)}" for text in value)]
        elif name != "like" and value != item.default:
            lines.append(f"{name}: {_scalar(value)}")
    return "\n".join(lines) + "\n"


def _keys(section: Any) -> Iterator[str]:
    for name, item in schema(type(section)).items():
        value = getattr(section, name)
        if item.default is MISSING or value != item.default:
            yield f"{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, float):
        # YAML takes 1e-20 for text: it wants a dot.
        digits, e, exponent = repr(value).partition("e")
        return f"{digits if '.' in digits else digits + '.0'}{e}{exponent}"
    if isinstance(value, str):
        plain = _PLAIN.fullmatch(value) and yaml.safe_load(value) == value
        return value if plain else _quoted(value)
    return str(value)


def _flow(value: Mapping[str, Any]) -> str:
    # Without a width, long text would be folded over several lines.
    text = yaml.safe_dump(
        dict(value),
        default_flow_style=True,
        sort_keys=False,
        width=float("inf"),
    )
    return text.rstrip("\n")


def _quoted(text: str) -> str:
    # Without a width, long text would be folded over several lines.
    return yaml.safe_dump(text, default_style='"', width=float("inf")).rstrip("\n")
