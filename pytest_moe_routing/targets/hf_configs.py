"""Which config class of transformers a model has, and the keys that state its router there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.models.huggingface.families import Case, Family, table

#: The transformers whose blocks a framework's backend for them is run on.
_TRANSFORMERS = Requirement("transformers>=5.19")
#: The settings of a router that a config class may have under one of several keys.
_SETTINGS = (
    *("num_experts", "top_k", "n_group", "topk_group", "renormalize", "scoring_func"),
    "routed_scaling_factor",
)


def without_transformers() -> str:
    """Return why no framework's transformers backend is run here; empty if it is."""
    with suppress(metadata.PackageNotFoundError):
        if _TRANSFORMERS.specifier.contains(metadata.version(_TRANSFORMERS.name)):
            return ""
    return f"tests of the transformers backend (without {_TRANSFORMERS})"


def config_of(model: ModelSpec) -> dict[str, Any]:
    """Return a model's config class, as `folder.Class`, and keys that its router may be under.

    Raises:
        Unsupported: transformers is not known to have the model.
    """
    family = table().by_name.get(model.architecture)
    if family is None or family.config is None:
        raise Unsupported(f"transformers is not known to have {model.architecture}")
    return {"config": family.config, "keys": dict(_keys(family, model))}


def _keys(family: Family, model: ModelSpec) -> Iterator[tuple[str, Any]]:
    settings = {name: getattr(model.router, name) for name in _SETTINGS}
    settings["shared_experts"] = model.experts.shared_experts
    for name, value in settings.items():
        # A class whose default is no null may not take one.
        if value is not None:
            for key in family.keys.get(name, table().spellings.get(name, ())):
                yield key, value
    for case in family.cases:
        if _contradicts(family, case, case.fixed(case.default), model.router):
            values = (v for v, f in case.values if not _contradicts(family, case, f, model.router))
            yield from ((case.key, value) for value in list(values)[:1])


def _contradicts(
    family: Family, case: Case, fixed: Mapping[str, Any] | None, router: RouterConfig
) -> bool:
    """Whether the router is not what a value of a case makes of it."""
    stated = {**family.fixed, **(fixed or {})}
    decided = [name for name in vars(router) if case.decides(name) and name in stated]
    return any(getattr(router, name) != stated[name] for name in decided)
