"""The architectures with experts that a release has code for and no family describes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from pytest_moe_routing.models.huggingface.families import base_of, table
from pytest_moe_routing.targets.model_classes import ModelClasses


def unknown_architectures(classes: ModelClasses, data: Mapping[str, Any]) -> list[str]:
    """Return the architectures of a release whose code makes layers of experts, and are not known.

    Known is what `families.yaml` names, another head of it, and what the release runs by the same
    class.

    Args:
        data: The framework's `architectures.yaml`.

    Raises:
        Unsupported: The release has no registry that can be read.
    """
    families = table()
    names = {*families.by_name, *families.wrappers, *families.refused}
    new = [
        name
        for name in sorted(classes.registered())
        if name not in names
        and base_of(name) not in families.by_base
        and not any(fnmatchcase(name, pattern) for pattern in patterns(data))
        and classes.calls(name, data["layers"])
    ]
    known = {classes.runs(name) for name in names} if new else set()
    return [name for name in new if classes.runs(name) not in known]


def patterns(data: Mapping[str, Any]) -> Iterator[str]:
    """Yield the shell patterns of names that need no family."""
    for row in data["not_described"]:
        yield from row["names"]
