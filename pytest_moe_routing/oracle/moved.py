"""Where a target runs FlashInfer's experts: on which GPUs, and for which placements.

A placement is how a server shares out experts and tokens to its GPUs. `placements.yaml` says where
each release runs them. Where one no longer does, its experts are lost. Where it does besides, what
arrives at the kernel must be asked: a few places are asked by other tests, and the rest is not
judged, or fails if the release is the one that the data describe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.choice import Rule
from pytest_moe_routing.oracle.finding import Finding
from pytest_moe_routing.oracle.given import refusal
from pytest_moe_routing.oracle.placed import Key, KnownPlacements, Placed, Placements
from pytest_moe_routing.oracle.target import Target

#: Where other tests ask what arrives at the kernel: the GPUs by kind of experts, and placements.
#: They are asked as on the first of the Blackwell family.
_FIRST = "10.0"
_FAMILY = (_FIRST, "10.3")
_ASKED_ON: Mapping[str, tuple[str, ...]] = {
    "monolithic": _FAMILY,
    "modular": _FAMILY,
    "cutlass": ("9.0", *_FAMILY),
    "cutedsl": _FAMILY,
    "mxfp4": _FAMILY,
}
_ASKED = ("tp", "ep", "dp+ep", "allgather_reducescatter")
#: Of each kind of experts, those that do more in one kernel: these are no loss.
_BETTER: Mapping[str, tuple[str, ...]] = {
    "modular": ("monolithic",),
    "cutlass": ("monolithic", "modular"),
}
#: Those of which no facts say on which GPUs FlashInfer runs them.
_ANYWHERE = ("mxfp4", "cutedsl", "cutedsl_batched", "megamoe")


@dataclass(frozen=True)
class Moved:
    """Placements where a target runs experts otherwise than its release is known to.

    Attributes:
        models: Those that were asked about.
        places: Those that the same code decides about, of one class of experts.
        since: The release that the data describe.
        rule: Of places where the experts are lost, the code that says no, and what is taken there.
        refused: Why FlashInfer does not run the experts where they are taken; None if it does.
    """

    models: tuple[ModelSpec, ...]
    places: tuple[Placed, ...]
    since: str
    rule: Rule | None = None
    refused: Finding | None = None

    @property
    def switches(self) -> tuple[str, ...]:
        """What a user switches on in the place that needs the least."""
        return min((place.switches for place in self.places), key=len)


@dataclass(frozen=True)
class MovedPlacements:
    """What a target does otherwise than is known of its release, for a scheme.

    Attributes:
        answered: How many models were asked.
        unanswered: Why how many new places are not judged.
    """

    moved: tuple[Moved, ...]
    answered: int
    unanswered: Counter[str]


def moved_placements(target: Target, scheme: str, models: Iterable[ModelSpec]) -> MovedPlacements:
    """Compare where a target runs a scheme's experts with what is known of its release.

    Args:
        models: Those that may be asked about; the data say which of them are.

    Raises:
        Unsupported: The target cannot be asked about one that the data have.
    """
    moved: list[Moved] = []
    answered, unanswered = 0, Counter[str]()
    for model in models:
        known = target.known_placements(model, scheme)
        if known is None:
            continue
        found = target.placements(model, scheme)
        answered += 1
        moved += _lost(target, model, scheme, known, found)
        for place in _new(known, found, scheme):
            refused = _refusal(place, scheme)
            if refused is not None or known.is_own:
                moved.append(Moved((model,), (place,), known.release, refused=refused))
            else:
                unanswered[f"{place.name} run {place}, which no known release does"] += 1
    return MovedPlacements(tuple(_together(moved)), answered, unanswered)


def _lost(
    target: Target, model: ModelSpec, scheme: str, known: KnownPlacements, found: Placements
) -> Iterator[Moved]:
    """Yield each place where the experts no longer run, or no longer by default."""
    for key, by_default in known.by_default.items():
        place = found.taken.get(key)
        if _is_lost(place, by_default) and not _is_told_elsewhere(key, found, by_default):
            name = "" if place is None else place.name
            lost = Placed(*key, by_default, name, found.switches(key, by_default))
            rule = target.placement_rule(model, scheme, lost)
            yield Moved((model,), (lost,), known.release, rule)


def _is_lost(place: Placed | None, by_default: bool) -> bool:
    return place is None or (by_default and not place.by_default)


def _is_told_elsewhere(key: Key, found: Placements, by_default: bool) -> bool:
    """Return whether the loss of a place is none, or another test fails because of it."""
    experts, device, placement = key
    for better in _BETTER.get(experts, ()):
        is_asked = by_default or found.requests.get(better) == found.requests[experts]
        if is_asked and not _is_lost(found.taken.get((better, device, placement)), by_default):
            return True
    first = found.taken.get((experts, _FIRST, placement))
    # Gates are asked for other GPUs as for one GPU alone.
    is_compared = device in found.compared and experts != "cutlass" and placement == "tp"
    return is_compared and not _is_lost(first, by_default)


def _new(known: KnownPlacements, found: Placements, scheme: str) -> Iterator[Placed]:
    """Yield each place of which nothing is known, unless another test asks about it."""
    for key, place in found.taken.items():
        if key in known.by_default:
            if known.is_own and place.by_default and not known.by_default[key]:
                yield place
            continue
        is_asked = place.device in _ASKED_ON.get(place.experts, ()) and place.placement in _ASKED
        if not is_asked or _refusal(place, scheme) is not None:
            yield place


def _refusal(place: Placed, scheme: str) -> Finding | None:
    """Return why FlashInfer does not run the experts on the GPU; None if it does."""
    if place.experts in _ANYWHERE:
        return None
    function = "cutlass_fused_moe" if place.experts == "cutlass" else None
    return refusal(function, scheme, place.device)


def _together(moved: Iterable[Moved]) -> Iterator[Moved]:
    """Yield one for all places of which nothing but the place differs."""
    groups: dict[object, list[Moved]] = {}
    for each in moved:
        (place,) = each.places
        why = each.rule and each.rule.source, each.refused is None
        groups.setdefault((place.experts, place.by_default, why), []).append(each)
    for group in groups.values():
        first = group[0]
        models = tuple(dict.fromkeys(model for each in group for model in each.models))
        places = tuple(place for each in group for place in each.places)
        yield replace(first, models=models, places=places)
