"""How the config.json of an architecture was published, and what it means without a key."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, replace
from functools import cache
from typing import Any

from pytest_moe_routing.data import read_data
from pytest_moe_routing.models.huggingface.families import Case, Family, table
from pytest_moe_routing.models.spec import ExpertsConfig, ModelSpec, RouterConfig

#: A config without one of these is of a model without experts.
_REQUIRED = ("num_experts", "top_k")
_ROUTER = {field.name: field for field in fields(RouterConfig)}
_ACTIVATION = {f.name for f in fields(ExpertsConfig) if f.name.startswith("activation_")}


@cache
def _data() -> Mapping[str, Any]:
    data: Mapping[str, Any] = read_data(__package__, "published.yaml")
    return data


def published_keys(architecture: str) -> Mapping[str, str]:
    """Return the key of config.json for each value of a model.yaml; empty if that is not known."""
    keys: Mapping[str, str] = _data()["keys"].get(architecture, {})
    return keys


def nesting(architecture: str) -> tuple[str, str]:
    """Return a config's `model_type`, and the key of the text model's config in it.

    The key is empty where the config is the text model's; both are if the architecture is unknown.
    """
    nested = _data()["nested"].get(architecture)
    if nested:
        return nested[0], nested[1]
    family = table().by_name.get(architecture)
    return (family.name if family else "", "")


def intermediate_key(architecture: str) -> str | None:
    """Return the key of the experts' intermediate size; None if the architecture is unknown."""
    families = table()
    inner = families.wrappers.get(architecture, ())
    family = families.families[inner[0]] if inner else families.by_name.get(architecture)
    if family is None:
        return None
    return family.keys.get("intermediate_size", families.spellings["intermediate_size"])[0]


def in_config(architecture: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values of keys of `published_keys` as a config.json has them.

    Values for each kind of token are lists, and a key with a dot is one of an object.
    """
    twice = _data()["twice"].get(architecture, ())
    found: dict[str, Any] = {}
    for key, value in values.items():
        outer, _, inner = key.rpartition(".")
        place = found.setdefault(outer, {}) if outer else found
        place[inner] = [value, value] if key in twice and not isinstance(value, list) else value
    return found


def stated_keys(model: ModelSpec) -> dict[str, Any]:
    """Return the keys about the router and the experts that a model's config.json states.

    An imported model's are its own, but for lists with a value for each layer.
    """
    if model.raw_config:
        return {k: v for k, v in model.raw_config.items() if not isinstance(v, list | dict)}
    said = {**vars(model.router), **vars(model.experts)}
    keys = published_keys(model.architecture)
    return {key: said[name] for name, key in keys.items() if said[name] is not None}


def left_out(model: ModelSpec, further: Collection[str]) -> Iterator[tuple[str, ModelSpec]]:
    """Yield each key that a config may leave out, and the model that the config then describes.

    Only keys about the router and the activation, and only where that model is known: by the
    default of transformers' config class, or because transformers computes the same whatever the
    key states.

    Args:
        further: Keys that published configs have besides those of `published_keys`.
    """
    family = _family(model.architecture)
    if family is None:
        return
    cases = {case.key: case for case in family.cases}
    named = {key: value for value, key in published_keys(model.architecture).items()}
    for key in dict.fromkeys((*named, *further)):
        value = named.get(key)
        if value in _ACTIVATION:
            # Cases of such keys are about other values than the default.
            if value in family.defaults and getattr(model.experts, value) is not None:
                experts = replace(model.experts, **{value: family.defaults[value]})
                yield key, replace(model, experts=experts)
            continue
        if key in cases:
            changes = _decided(cases[key], family)
        elif value is None or value in _REQUIRED or value not in _ROUTER:
            continue
        elif value in family.fixed:
            changes = {}
        elif value in family.defaults:
            changes = {value: family.defaults[value]}
        else:
            continue
        router = None if changes is None else replace(model.router, **changes)
        if router is not None and not any(router.problems()):
            yield key, replace(model, router=router)


def _family(architecture: str) -> Family | None:
    families = table()
    inner = families.wrappers.get(architecture, ())
    named = families.by_name.get(architecture)
    # What is not in transformers has no defaults.
    family = families.families[inner[0]] if len(inner) == 1 else named
    return family if family is not None and family.config else None


def _decided(case: Case, family: Family) -> dict[str, Any] | None:
    """Return the router's values without a key that decides them; None if they are not known."""
    fixed = case.fixed(case.default)
    if fixed is None or not fixed.keys() <= _ROUTER.keys() or "not_expressible" in fixed:
        return None
    decided = [name for name, field in _ROUTER.items() if case.decides(name)]
    usual = {name: family.fixed.get(name, _ROUTER[name].default) for name in decided}
    return {**usual, **fixed}
