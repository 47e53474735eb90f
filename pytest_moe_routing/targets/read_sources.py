"""What is asked of a framework's sources, and not of its code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.names import Names, listed_releases
from pytest_moe_routing.oracle.crossed import Crossed
from pytest_moe_routing.oracle.lacking import Lacking
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.targets.source import Source


class ReadSources(Target):
    """A target whose MoE code is read.

    Attributes:
        package: The framework's top-level package.
        model_packages: The packages that hold the code of models.
        layer_package: The package that holds that of layers.
        source: The sources.
    """

    package: ClassVar[str]
    model_packages: ClassVar[tuple[str, ...]] = ()
    layer_package: ClassVar[str] = ""

    source: Source

    def lacking(self) -> Sequence[Lacking]:
        """Return what the release's MoE code needs of FlashInfer and the judged release lacks.

        Raises:
            Unsupported: The names of the judged release are not listed.
        """
        from pytest_moe_routing.targets.contract import Contract
        from pytest_moe_routing.targets.uses import lacking

        if not self.model_packages:
            return super().lacking()
        names = Names.of(self.flashinfer.release)
        if names is None:
            first, *_, last = listed_releases()
            raise Unsupported(
                f"not judged: the names of FlashInfer {self.flashinfer.release}; those of most "
                f"releases from {first} to {last} are listed"
            )
        run = Contract.of(self.package).run
        layers = [name for name in run if not f"{name}.".startswith(self.model_packages)]
        return lacking(self.source.root, layers, self.flashinfer, names)

    def crossed(self) -> Sequence[Crossed]:
        from pytest_moe_routing.targets.crossed import crossed

        if not self.layer_package:
            return super().crossed()
        return crossed(self.source.root, [self.layer_package])
