"""What each release of a framework is known to do with the packaged models.

Next to a framework's contract, `not_judged.yaml` lists which questions about them a release leaves
open: whatever is not in it must be judged, as a run that asks fewer questions than it could is no
pass. `open_parts.yaml` lists why parts of tests are left open. `fused.yaml` lists the cases whose
fused kernel runs: a case that loses it fails. `placements.yaml` lists on which GPUs, and how shared
out to them, experts run, and `accepted_keys.yaml` the quantization keys that they accept.
`taken_experts.yaml` lists which classes that call no kernel of FlashInfer's a server ends with, and
`split_experts.yaml` with which others if experts are split over ranks.

A release without a row is held to the row before it; one that is newer than all, or whose version
is no number, to the newest.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache
from itertools import product
from typing import Any

from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.oracle.accepted_keys import KnownKeys, Pair
from pytest_moe_routing.oracle.choice import Expected
from pytest_moe_routing.oracle.placed import KnownPlacements
from pytest_moe_routing.oracle.taken import Key, KnownSplits, KnownTaken
from pytest_moe_routing.targets.contract import release_of

#: The parts of a row of `fused.yaml` and `placements.yaml`.
_SECTIONS = (("by_default", True), ("with_switch", False))


@cache
def _table(package: str, file: str) -> Mapping[Version, Mapping[str, Any]]:
    """Return the rows of a packaged file by release, oldest first; it is read once."""
    rows = (read_data(__package__, package, file) or {"releases": {}})["releases"]
    return {Version(str(r)): rows[r] for r in sorted(rows, key=lambda r: Version(str(r)))}


def _row(package: str, file: str, version: str) -> tuple[Version, Mapping[str, Any]] | None:
    """Return the row that a release is held to; None for a release older than all known ones."""
    table, release = _table(package, file), release_of(version)
    place = len(table) if release is None else bisect_right(list(table), release)
    return list(table.items())[place - 1] if place else None


def is_open(package: str, version: str, test: str, case: str) -> bool:
    """Return whether a release may leave a case of a test open."""
    row = _row(package, "not_judged.yaml", version)
    return row is None or any(fnmatchcase(case, pattern) for pattern in row[1].get(test, ()))


def is_known_reason(package: str, version: str, reason: str) -> bool | None:
    """Return whether a release may leave a part of a test open for a reason.

    None for a release of which no reasons are known.
    """
    row = _row(package, "open_parts.yaml", version)
    return None if row is None else any(fnmatchcase(reason, p) for p in row[1]["reasons"])


def expected_judged(package: str, version: str, cases: Iterable[str]) -> int | None:
    """Return how many verdicts a release must give.

    Args:
        cases: The cases of `test_verdict` that are asked, as `MODEL-SCHEME`.

    Returns:
        A number, or None for a release of which nothing is known.
    """
    if _row(package, "not_judged.yaml", version) is None:
        return None
    return sum(not is_open(package, version, "test_verdict", case) for case in cases)


def expected_kernel(package: str, version: str, model: str, scheme: str) -> Expected | None:
    """Return what a release must do with a packaged model; None if nothing is expected of it."""
    row = _row(package, "fused.yaml", version)
    if row is None:
        return None
    release, sections = row
    for section, by_default in _SECTIONS:
        models = sections.get(section, {}).get(scheme, ())
        if any(fnmatchcase(model, pattern) for pattern in models):
            return Expected(str(release), by_default)
    return None


def known_placements(package: str, version: str, model: str, scheme: str) -> KnownPlacements | None:
    """Return where a release takes its experts; None for models that are not asked about."""
    row = _row(package, "placements.yaml", version)
    sections = None if row is None else row[1].get(scheme, {}).get(model)
    if row is None or sections is None:
        return None
    places = {
        (experts, device, placement): by_default
        for section, by_default in _SECTIONS
        for experts, devices in sections.get(section, {}).items()
        for listed, placements in devices.items()
        for device in listed.split()
        for placement in placements
    }
    return KnownPlacements(str(row[0]), row[0] == release_of(version), places)


def known_keys(package: str, version: str) -> KnownKeys | None:
    """Return which quantization keys a release's experts accept; None if that is not known."""
    row = _row(package, "accepted_keys.yaml", version)
    if row is None:
        return None
    experts: dict[str, dict[str, list[Pair]]] = {}
    for name, listed in row[1].items():
        pairs = experts.setdefault(name, {})
        for devices, keys in listed.items():
            for device in devices.split():
                pairs.setdefault(device, []).extend(
                    (weights, activations) for weights, activations in map(str.split, keys)
                )
    return KnownKeys(str(row[0]), row[0] == release_of(version), experts)


def known_taken(
    package: str, version: str, models: Iterable[str], scheme: str
) -> KnownTaken | None:
    """Return which classes a release ends with; None if that is not known.

    Args:
        models: The packaged ones that are asked about.
    """
    row = _row(package, "taken_experts.yaml", version)
    if row is None or scheme not in row[1]:
        return None
    classes: dict[Key, str] = {}
    models = list(models)
    for place, listed in row[1][scheme].items():
        words = place.split()
        devices = [word for word in words if word[0].isdecimal()]
        cells = list(product(devices, words[len(devices) :]))
        for model in models:
            fitting = (n for n, ps in listed.items() if any(fnmatchcase(model, p) for p in ps))
            if (name := next(fitting, None)) is not None:
                classes |= {(model, *cell): name for cell in cells}
    splits = _known_splits(package, version, scheme)
    return KnownTaken(str(row[0]), row[0] == release_of(version), classes, splits)


def _known_splits(package: str, version: str, scheme: str) -> KnownSplits | None:
    row = _row(package, "split_experts.yaml", version)
    if row is None:
        return None
    rules = dict(row[1].get(scheme, {}))
    unpadded = rules.pop("unpadded", "")
    known = {tuple(place.split()): tuple(rule) for place, rule in rules.items()}
    return KnownSplits(known, unpadded)
