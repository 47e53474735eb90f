"""Which class of experts a framework ends with for each model, and where, as its child answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from pytest_moe_routing.data import packaged_directory
from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.placed import Placed, Placements
from pytest_moe_routing.oracle.taken import (
    DEFAULT,
    LORA,
    NONE,
    SPLITS,
    Kept,
    Key,
    KnownSplits,
    KnownTaken,
    Routed,
    Router,
    TakenExperts,
)
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets.answers import PlacementsAnswer, RouterAnswer, TakenIn
from pytest_moe_routing.targets.probe import Probe


def taken_experts(
    probe: Probe,
    method_of: Callable[[ModelSpec], str],
    known_of: Callable[[Sequence[str]], KnownTaken | None],
    models: Sequence[ModelSpec],
    scheme: str,
) -> TakenExperts | None:
    """Ask which classes a framework takes; None if nothing is known of its release.

    Args:
        method_of: Returns the routing method of a model.
        known_of: Returns what is known of packaged models, by their ids.

    Raises:
        Unsupported: The release has nothing that chooses experts for the scheme.
    """
    packaged = [model for model in models if model.folder.parent == packaged_directory()]
    ids_of = [str(model) for model in packaged]
    known = known_of(ids_of)
    if known is None:
        return None
    cases, methods, unanswered = {}, {}, Counter[str]()
    for model in models:
        try:
            methods[str(model)] = method_of(model)
        except (TargetError, Unsupported) as reason:
            unanswered[str(reason)] += 1
            continue
        cases[str(model)] = {"model": model.as_dict(), "method": methods[str(model)]}
    answer = probe.ask("taken_experts", cases=list(cases.values()), scheme=scheme)
    ids = list(cases)
    for why, places in answer["unasked"].items():
        unanswered[why] += len(places)
        for place in places:
            del methods[ids[place]]

    def keys(rows: Sequence[TakenIn]) -> dict[Key, str]:
        return {
            (ids[place], row["device"], row["way"]): row["experts"]
            for row in rows
            for place in row["cases"]
        }

    def kept_by(key: Key, experts: str) -> Kept:
        name, device, way = key
        place = {"experts": experts, "device": device, "way": way}
        return Kept(**probe.ask("kept_out_by", **cases[name], scheme=scheme, **place))

    found = keys(answer["taken"])
    asked = {key: name for key, name in known.classes.items() if key[0] in methods}
    if why := answer["without_splits"]:
        unanswered[f"splits and adapters: {why}"] += 1
        asked = {key: name for key, name in asked.items() if not key[2].startswith(LORA)}
    else:
        asked |= _split_classes(known.splits, asked, found, packaged)
    return TakenExperts(
        known=replace(known, classes=asked),
        classes={**dict.fromkeys(asked, NONE), **found},
        kept_out=keys(answer["kept_out"]),
        preceded={key: name for key, name in keys(answer["preceded"]).items() if key[0] in ids_of},
        methods=methods,
        routers=[_router(row) for row in answer["routers"]],
        elsewhere=answer["elsewhere"],
        switches={way: tuple(switches) for way, switches in answer["switches"].items()},
        kept_by=kept_by,
        unanswered=unanswered,
    )


def _split_classes(
    splits: KnownSplits | None,
    known: Mapping[Key, str],
    found: Mapping[Key, str],
    models: Iterable[ModelSpec],
) -> dict[Key, str]:
    """Return the known class of each split of models' experts.

    Without adapters, the class for whole experts is what was found. Models that end with another
    one than is known are told of as they are, and left out here.
    """
    classes: dict[Key, str] = {}
    if splits is None:
        return classes
    wholes = {key: name for key, name in known.items() if key[2] == LORA}
    for key, name in found.items():
        if key[2] == DEFAULT and known.get(key, name) == name:
            wholes[key] = name
    sizes = {str(model): model.experts.intermediate_size for model in models}
    for (model, device, base), whole in wholes.items():
        for way, count in SPLITS.items():
            size, rest = divmod(sizes.get(model, 1), count)
            if way.startswith(LORA) == (base == LORA) and not rest:
                key = model, device, way
                classes[key] = splits.known(key, size, whole)
    return classes


def _router(row: RouterAnswer) -> Router:
    methods = {}
    for name, routed in row["methods"].items():
        recipes = (
            Recipe(score=call["score"], normalize=call["normalize"], top_k=call["top_k"])
            for call in routed["calls"]
        )
        methods[name] = Routed(
            routed["accepted"],
            tuple(dict.fromkeys(recipes)),
            next((call["rounded"] for call in routed["calls"] if call["rounded"]), ""),
            routed["unknown"],
        )
    sizes = row["num_experts"], row["top_k"]
    return Router(row["experts"], row["gate"], row["source"], *sizes, methods)


def placements_of(answer: PlacementsAnswer) -> Placements:
    """Return where a child says that experts are taken."""
    flags = {name: tuple(switches) for name, switches in answer["flags"].items()}
    found = Placements({}, flags, answer["requests"], tuple(answer["compared"]))
    taken = {}
    for row in answer["taken"]:
        experts, device, by_default = row["experts"], row["device"], not row["requested"]
        for placement in row["placements"]:
            key = experts, device, placement
            switches = found.switches(key, by_default)
            taken[key] = Placed(*key, by_default, row["name"], switches)
    return replace(found, taken=taken)
