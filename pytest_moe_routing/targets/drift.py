"""Compares a framework's sources with its contract and the known families of models.

None of them are run, and torch is not needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets.contract import Contract, Names, Row
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.registry import TargetId, locate
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

    @cached_property
    def unknown(self) -> tuple[str, ...] | Unsupported:
        """The architectures with experts that are not known, looked up when they are asked for.

        Or why they cannot be read.
        """
        located = locate(TargetId(self.contract.package, self.source.root))
        target = located.make(FlashInfer.of(None))
        assert isinstance(target, FrameworkTarget)
        try:
            return tuple(target.unknown_architectures())
        except Unsupported as reason:
            return reason
        finally:
            target.close()

    @property
    def has_drifted(self) -> bool:
        """Whether a name is missing, or an architecture is not known."""
        return bool(self.missing or self.unknown)

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
        if isinstance(self.unknown, Unsupported):
            lines.append(f"  drift     architectures with experts are not compared: {self.unknown}")
            return lines
        for name in self.unknown:
            lines += [
                f"  drift     {name} has experts and is not known",
                "            not judged without a row in models/huggingface/families.yaml",
            ]
        return lines if self.has_drifted else [*lines, "  no drift"]


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
