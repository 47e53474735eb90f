"""Which questions about the packaged models each release of a framework leaves open.

`not_judged.yaml` next to a framework's contract lists them. Whatever is not in it must be judged: a
run that asks fewer questions than it could is no pass.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import cache

from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.targets.contract import release_of

#: By name of a test of the suite: its cases that are not judged, as shell patterns.
Open = Mapping[str, tuple[str, ...]]


@cache
def _table(package: str) -> Mapping[Version, Open]:
    data = read_data(__package__, package, "not_judged.yaml") or {"releases": {}}
    return {
        Version(str(release)): {test: tuple(cases) for test, cases in tests.items()}
        for release, tests in sorted(data["releases"].items(), key=lambda row: Version(str(row[0])))
    }


def not_judged(package: str, version: str) -> Open | None:
    """Return what a release leaves open; None for a release older than all known ones.

    A release without a row must judge what the row before it judges: one that is newer than all,
    or whose version is no number, what the newest judges.
    """
    table, release = _table(package), release_of(version)
    place = len(table) if release is None else bisect_right(list(table), release)
    return list(table.values())[place - 1] if place else None


def is_open(package: str, version: str, test: str, case: str) -> bool:
    """Return whether a release may leave a case of a test open."""
    row = not_judged(package, version)
    return row is None or any(fnmatchcase(case, pattern) for pattern in row.get(test, ()))


def expected_judged(package: str, version: str, cases: Iterable[str]) -> int | None:
    """Return how many verdicts a release must give.

    Args:
        cases: The cases of `test_verdict` that are asked, as `MODEL-SCHEME`.

    Returns:
        A number, or None for a release of which nothing is known.
    """
    if not_judged(package, version) is None:
        return None
    return sum(not is_open(package, version, "test_verdict", case) for case in cases)
