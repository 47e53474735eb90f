"""A target whose answers come from the sources of one release of a framework."""

from __future__ import annotations

from typing import ClassVar

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.schemes import kernel_of
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

    def not_served(self, scheme: str) -> Unsupported:
        """Return why a scheme that the adapter has no names for cannot be judged.

        A framework serves a scheme through FlashInfer only where its code names the entry point.
        """
        function = kernel_of(scheme).name
        if self.source.names(self.package, function):
            return Unsupported(
                f"{self}: its code calls {function}, in a way that the adapter does not know"
            )
        return Unsupported(f"{self} serves no {scheme} through FlashInfer: it names no {function}")
