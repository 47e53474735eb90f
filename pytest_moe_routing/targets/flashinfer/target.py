"""FlashInfer itself, installed or at `flashinfer@PATH`: its numbers, and our data against it.

It takes whatever method it is given, so it has no classifier and no gates. It is read, never
imported: a GPU or torch is not needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from pytest_moe_routing.flashinfer.drift import Examination, examine
from pytest_moe_routing.flashinfer.package import Package
from pytest_moe_routing.targets.framework import FrameworkTarget


class FlashInferTarget(FrameworkTarget):
    """Answers what a flashinfer-python says of its routing methods."""

    name = "flashinfer"
    package = "flashinfer"
    distributions = ("flashinfer-python",)
    tests = ("test_method_numbers",)

    @cached_property
    def examination(self) -> Examination:
        """The package of this environment, or the one asked for, compared with our data."""
        return examine(Package.of(self.source.root))

    def method_numbers(self) -> Mapping[str, int]:
        return self.examination.methods

    def drift(self) -> tuple[str, ...]:
        return self.examination.differences
