"""FlashInfer itself, installed or at `flashinfer@PATH`: its numbers, and our data against it.

It takes whatever method it is given, so it has no classifier and no gates. It is read, never
imported: a GPU or torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from pytest_moe_routing.backends.drift import Examination, examine
from pytest_moe_routing.backends.wheel import Package
from pytest_moe_routing.errors import TargetImportError
from pytest_moe_routing.targets.protocol import Target


class FlashInferTarget(Target):
    """Answers what a flashinfer-python says of its routing methods."""

    name = "flashinfer"
    package = "flashinfer"
    distributions = ("flashinfer-python",)

    @cached_property
    def examination(self) -> Examination:
        """The package of this environment, or the one asked for, compared with our data."""
        if self.source is None:
            raise TargetImportError("flashinfer: made without a package to read")
        return examine(Package.of(self.source.root))

    def method_numbers(self) -> Mapping[str, int]:
        return self.examination.methods

    def drift(self) -> tuple[str, ...]:
        return self.examination.differences
