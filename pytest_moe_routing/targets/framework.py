"""A target whose answers come from the sources of one release of a framework."""

from __future__ import annotations

from typing import ClassVar

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.targets.source import Source


class FrameworkTarget(Target):
    """A target made with a `Source`: an installed framework, or the one at `name@PATH`.

    The module of a subclass is imported when pytest starts, so it must not import the framework.

    Attributes:
        package: The framework's top-level package.
        distributions: The distributions that contain the package, in order of preference.
    """

    package: ClassVar[str]
    distributions: ClassVar[tuple[str, ...]]

    def __init__(self, flashinfer: FlashInfer, source: Source) -> None:
        super().__init__(flashinfer)
        self.source = source

    def version(self) -> str:
        return self.source.version
