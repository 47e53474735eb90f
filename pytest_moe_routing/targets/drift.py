"""Compares a framework's sources with its contract, without running them and without torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_moe_routing.targets.contract import Contract, Names, Row
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.stubs import definitions


@dataclass(frozen=True)
class Examination:
    """What a release of a framework has of its contract.

    Attributes:
        source: The release.
        contract: What the probes rely on.
        expected: How many names the contract expects the release to have.
        missing: Those that it does not have.
    """

    source: Source
    contract: Contract
    expected: int
    missing: tuple[Row, ...]

    def lines(self) -> list[str]:
        lines = [
            f"{self.contract.title} {self.source.version} ({self.source.root})",
            f"  compared  {self.expected} names of the contract",
        ]
        for row in self.missing:
            lines += [
                f"  drift     {' or '.join(map(str, row.spellings))} is missing",
                f"            contract row {row.key}: {row.use}",
                f"            not judged without it: {row.lost()}",
            ]
        return lines if self.missing else [*lines, "  no drift"]


def examine(package: str, path: Path | None = None) -> Examination:
    """Compare a framework at a path, or the installed one, with its contract.

    Raises:
        UnknownTarget: There is no such framework at the path.
        TargetNotInstalled: There is no path, and the framework is not installed.
    """
    contract = Contract.of(package)
    if path is None:
        source = Source.installed(package, contract.distributions)
    else:
        source = Source.at(package, path)
    names = Names(contract, source.version, definitions(package, str(source.root)))
    expected = sum(names.expects(key) for key in contract.rows)
    return Examination(source, contract, expected, tuple(names.missing()))
