"""transformers, any release from 5.0 on: the routers of its models' MoE blocks.

transformers calls no fused kernel, so it has no classifier and no gates. Its own code builds and
runs its blocks, in a process of its own (`targets/transformers/probe.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.models.huggingface.families import Case, Family, table
from pytest_moe_routing.oracle.routers import RouterRun
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.probe import Probe
from pytest_moe_routing.targets.routers import ANSWERS, RouterProbes
from pytest_moe_routing.targets.source import Source

#: The settings of a router that a config class may have under one of several keys.
_SETTINGS = (
    *("num_experts", "top_k", "n_group", "topk_group", "renormalize", "scoring_func"),
    "routed_scaling_factor",
)


class TransformersTarget(FrameworkTarget):
    """The transformers of this environment, or at `transformers@PATH`."""

    name = "transformers"
    package = "transformers"
    distributions = ("transformers",)
    routers = ("block",)
    calls_kernels = False

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


def config_of(model: ModelSpec) -> dict[str, Any]:
    """Return a model's config class, as `folder.Class`, and keys that its router may be under.

    Raises:
        Unsupported: transformers is not known to have the model.
    """
    family = table().by_name.get(model.architecture)
    if family is None or family.config is None:
        raise Unsupported(f"transformers is not known to have {model.architecture}")
    return {"config": family.config, "keys": dict(_keys(family, model))}


def _keys(family: Family, model: ModelSpec) -> Iterator[tuple[str, Any]]:
    settings = {name: getattr(model.router, name) for name in _SETTINGS}
    settings["shared_experts"] = model.experts.shared_experts
    for name, value in settings.items():
        # A class whose default is no null may not take one.
        if value is not None:
            for key in family.keys.get(name, table().spellings.get(name, ())):
                yield key, value
    for case in family.cases:
        if _contradicts(family, case, case.fixed(case.default), model.router):
            values = (v for v, f in case.values if not _contradicts(family, case, f, model.router))
            yield from ((case.key, value) for value in list(values)[:1])


def _contradicts(
    family: Family, case: Case, fixed: Mapping[str, Any] | None, router: RouterConfig
) -> bool:
    """Whether the router is not what a value of a case makes of it."""
    stated = {**family.fixed, **(fixed or {})}
    decided = [name for name in vars(router) if case.decides(name) and name in stated]
    return any(getattr(router, name) != stated[name] for name in decided)
