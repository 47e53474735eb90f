"""Quantization keys that a target's experts accept otherwise than its release is known to.

Experts that accept a pair of keys are given every checkpoint that has it. `accepted_keys.yaml` says
which pairs each release accepts. One that is no longer accepted is lost. What arrives at the kernel
for another one, nobody has asked: such a pair fails if the release is the one that the data
describe, and is not judged otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.accepted_keys import ANY, AcceptedKeys, Pair
from pytest_moe_routing.oracle.target import Target

#: So many pairs that one function accepts, or no longer does, have a cause each.
_FEW = 3


@dataclass(frozen=True)
class ChangedKeys:
    """Pairs that one function accepts otherwise than its release is known to.

    Attributes:
        accepted: Whether the pairs are accepted now; if not, they are lost.
        experts: The classes that have the function.
        devices: The compute capabilities where the answer changed.
        since: The release that the data describe.
    """

    accepted: bool
    pairs: tuple[Pair, ...]
    experts: tuple[str, ...]
    devices: tuple[str, ...]
    function: str
    source: str
    since: str


@dataclass(frozen=True)
class Changes:
    """What the experts of a target accept otherwise.

    Attributes:
        answered: How many classes of experts were asked.
        unanswered: Why how many classes or pairs are not judged.
    """

    changed: tuple[ChangedKeys, ...]
    answered: int
    unanswered: Counter[str]


def changed_keys(target: Target) -> Changes:
    """Compare what a target's experts accept with what is known of its release."""
    changed: list[ChangedKeys] = []
    answered, unanswered = 0, Counter[str]()
    known = target.known_keys()
    if known is None:
        return Changes((), answered, unanswered)
    for experts, by_device in known.pairs.items():
        try:
            found = target.accepted_keys(experts)
        except Unsupported as reason:
            unanswered[str(reason)] += 1
            continue
        answered += 1
        for each in _changes(found, by_device, known.release):
            [(weights, activations)] = each.pairs
            pair = f"weights {weights} with activations {activations}"
            unknown = {weights, activations} - set(found.keys)
            if unknown:
                unanswered[f"{found.name}: {target} does not define {', '.join(unknown)}"] += 1
            elif each.accepted and not known.is_own:
                unanswered[f"{found.name} accepts {pair}, which no known release does"] += 1
            else:
                changed.append(each)
    return Changes(tuple(_together(changed)), answered, unanswered)


def _changes(
    found: AcceptedKeys, known: Mapping[str, Collection[Pair]], since: str
) -> Iterator[ChangedKeys]:
    """Yield each pair for which the answer is another, with the GPUs where it is."""
    devices: dict[tuple[bool, Pair], list[str]] = {}
    for device, accepted in found.pairs.items():
        before, now = set(_each(known.get(device, ()), found.keys)), set(accepted)
        for pair in sorted(before ^ now):
            devices.setdefault((pair in now, pair), []).append(device)
    for (is_accepted, pair), where in devices.items():
        about = (pair,), (found.name,), tuple(where), found.function, found.source
        yield ChangedKeys(is_accepted, *about, since)


def _each(pairs: Collection[Pair], keys: Collection[str]) -> Iterator[Pair]:
    for weights, activations in pairs:
        yield from ((weights, each) for each in (keys if activations == ANY else (activations,)))


def _together(changed: list[ChangedKeys]) -> Iterator[ChangedKeys]:
    """Yield each change of a function once, or one for all its pairs if they are many."""
    functions: dict[tuple[str, bool], dict[Pair, list[ChangedKeys]]] = {}
    for each in changed:
        by_pair = functions.setdefault((each.source, each.accepted), {})
        by_pair.setdefault(each.pairs[0], []).append(each)
    for by_pair in functions.values():
        groups = list(by_pair.values())
        if len(groups) > _FEW:
            groups = [[each for group in groups for each in group]]
        for group in groups:
            yield replace(
                group[0],
                pairs=tuple(dict.fromkeys(each.pairs[0] for each in group)),
                experts=tuple(dict.fromkeys(name for each in group for name in each.experts)),
                devices=tuple(dict.fromkeys(device for each in group for device in each.devices)),
            )
