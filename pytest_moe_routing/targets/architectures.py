"""What a release has code for that is not asked: architectures of no family, files of no model."""

from __future__ import annotations

import pkgutil
from collections.abc import Collection, Iterable, Iterator, Mapping
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


def modules(root: str, package: str) -> Iterator[str]:
    """Yield every module below a package of a tree or a wheel."""
    for module in pkgutil.iter_modules(["/".join([root, *package.split(".")])]):
        name = f"{package}.{module.name}"
        yield name
        if module.ispkg:
            yield from modules(root, name)


def files_not_run(
    classes: ModelClasses,
    data: Mapping[str, Any],
    every: Iterable[str],
    architectures: Collection[str],
    run: Collection[str],
) -> list[str]:
    """Return the files of models that make layers of experts, and that none of these models runs.

    Files for other devices than NVIDIA's GPUs are left out.

    Args:
        data: The framework's `architectures.yaml`.
        every: The modules of models.
        architectures: Those of the models.
        run: Modules that are known to be run for them.
    """
    layers, others = data["layers"], set(data["other_devices"])
    known = architectures & classes.registered().keys()
    reached = {module for name in known for module, _ in classes.callers(name, layers)}
    return sorted(
        f"{module.replace('.', '/')}.py"
        for module in classes.modules_with_calls(every, layers)
        if module not in reached.union(run) and others.isdisjoint(module.split("."))
    )
