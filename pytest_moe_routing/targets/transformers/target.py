"""transformers, any release from 5.0 on: the routers of its models' MoE blocks.

transformers calls no fused kernel, so it has no classifier and no gates. Its own code builds and
runs its blocks, in a process of its own (`targets/transformers/probe.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.routers import RouterRun
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.hf_configs import config_of
from pytest_moe_routing.targets.probe import Probe
from pytest_moe_routing.targets.routers import ANSWERS, RouterProbes
from pytest_moe_routing.targets.source import Source


class TransformersTarget(FrameworkTarget):
    """The transformers of this environment, or at `transformers@PATH`."""

    name = "transformers"
    package = "transformers"
    distributions = ("transformers",)
    routers = ("block",)
    tests = ("test_router", "test_router_precision")

    def __init__(self, flashinfer: FlashInfer, source: Source) -> None:
        super().__init__(flashinfer, source)
        module = "pytest_moe_routing.targets.transformers.probe"
        self._probe = Probe(str(self), module, str(source.root), answers=ANSWERS)
        self._routers = RouterProbes([self._probe], self.routers, config_of)

    def probes(self) -> Iterable[Probe]:
        return (self._probe,)

    def close(self) -> None:
        self._routers.close()

    def router_runs(self, models: Iterable[ModelSpec]) -> list[RouterRun]:
        """Return what the MoE blocks of models compute."""
        return self._routers.runs(models)

    def refused_models(self) -> Mapping[str, str]:
        """Return why no router was run for models, by id."""
        return self._routers.refusals()
