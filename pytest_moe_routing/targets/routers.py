"""The parent's side of a framework's router probes: one child for each platform."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any, TypedDict

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.oracle.routers import RouterRun
from pytest_moe_routing.targets.probe import Probe, Questions


class _Deviation(TypedDict):
    kind: str
    pattern: str
    text: str
    cause: str
    source: str


class _Run(TypedDict):
    router: str
    function: str
    source: str
    way: str
    subject: str
    reach: str
    called: list[str]
    deviations: list[_Deviation]


#: The type of each answer of a child.
ANSWERS: Mapping[str, Any] = {"run": list[_Run], "run_other": list[_Run], "read": dict[str, Any]}
#: The name under which runs of routers are gathered that a target does not list.
OTHER = "other"


def _asked(model: ModelSpec) -> dict[str, Any]:
    """Return what a reading depends on: neither dtypes, nor the side of the weight."""
    router = {**vars(model.router), "logits_dtype": "float32", "weight_on": "output"}
    if router["correction_bias"] is not None:
        router["correction_bias"] = "float32"
    return {**model.as_dict(), "router": router}


class RouterProbes:
    """Asks children for the runs of a framework's routers, each model and child once.

    Args:
        probes: The children; each answers `run` for a model and `run_other` for configurations.
        routers: The routers that the target lists.
        more: What a child is told of a model besides.
        of_runs: What it is told for a run alone.
    """

    def __init__(
        self,
        probes: Sequence[Probe],
        routers: Sequence[str],
        more: Callable[[ModelSpec], Mapping[str, Any]] = lambda _: {},
        of_runs: Callable[[ModelSpec], Mapping[str, Any]] = lambda _: {},
    ) -> None:
        self.probes, self._routers, self._more = probes, routers, more
        self._of_runs = of_runs
        self._runs: dict[str, list[RouterRun]] = {}
        self._refusals: dict[str, str] = {}

    def runs(self, models: Iterable[ModelSpec]) -> list[RouterRun]:
        """Return the runs for these models and for configurations that no model has."""
        chosen = list(models)
        new = [model for model in chosen if model.id not in self._runs]
        # Children are processes: they work side by side.
        with ThreadPoolExecutor(len(self.probes)) as pool:
            answers = list(pool.map(lambda probe: self._ask(probe, new), self.probes))
        for model_id in {key for answer in answers for key in answer}:
            rows = [row for answer in answers for row in answer[model_id]]
            self._runs[model_id] = [self._listed(RouterRun.of(row)) for row in rows]
        return [run for key in (*(model.id for model in chosen), "") for run in self._runs[key]]

    def read(self, models: Sequence[ModelSpec]) -> list[RouterConfig | Unsupported]:
        """Return how the first child's router reads each model's config, as `reading_of` does."""
        probe = self.probes[0]
        questions = [self._question_of(model) for model in models]
        probe.prepare("read", [asked for asked in questions if isinstance(asked, dict)])
        readings: list[RouterConfig | Unsupported] = []
        for model, question in zip(models, questions, strict=True):
            if isinstance(question, Unsupported):
                readings.append(question)
                continue
            try:
                readings.append(replace(model.router, **probe.ask("read", **question)))
            except Unsupported as reason:
                readings.append(reason)
        return readings

    def _question_of(self, model: ModelSpec) -> dict[str, Any] | Unsupported:
        try:
            return {"model": _asked(model), **self._more(model)}
        except Unsupported as reason:
            return reason

    def questions(self, models: Iterable[ModelSpec]) -> Iterator[Questions]:
        """Yield what `runs` asks, by child: the one that also reads configs comes last."""
        chosen = list(models)
        for probe in reversed(self.probes):
            for model in chosen:
                with suppress(Unsupported):
                    yield Questions(probe, "run", [self._question(model)])
            yield Questions(probe, "run_other", [{}])

    def refusals(self) -> dict[str, str]:
        """Return why models were not judged, by id, as far as `runs` asked about them."""
        return dict(self._refusals)

    def _question(self, model: ModelSpec) -> dict[str, Any]:
        asked = {"model": {**model.as_dict(), "id": model.id}, **self._more(model)}
        return {**asked, **self._of_runs(model)}

    def _ask(self, probe: Probe, models: Iterable[ModelSpec]) -> dict[str, list[dict[str, Any]]]:
        """Return a child's answers by model id; "" has those for further configurations."""
        answers: dict[str, list[dict[str, Any]]] = {}
        for model in models:
            try:
                answers[model.id] = probe.ask("run", **self._question(model))
            except Unsupported as reason:
                answers[model.id] = []
                self._refusals[model.id] = str(reason)
        if "" not in self._runs:
            answers[""] = probe.ask("run_other")
        return answers

    def _listed(self, run: RouterRun) -> RouterRun:
        return run if run.router in self._routers else replace(run, router=OTHER)

    def close(self) -> None:
        """End the children."""
        for probe in self.probes:
            probe.close()
