"""A target whose answers come from the sources of one release of a framework."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from pytest_moe_routing.data import packaged_directory, read_data
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.accepted_keys import AcceptedKeys, KnownKeys
from pytest_moe_routing.oracle.checkpoints import Checkpoint, Served
from pytest_moe_routing.oracle.choice import Expected, Rule
from pytest_moe_routing.oracle.laid_out import LaidOut
from pytest_moe_routing.oracle.misnamed import MisnamedWeight
from pytest_moe_routing.oracle.placed import OTHERS, KnownPlacements, Placed, Placements
from pytest_moe_routing.oracle.taken import TakenExperts
from pytest_moe_routing.oracle.target import OtherCall
from pytest_moe_routing.schemes import kernel_of
from pytest_moe_routing.targets.checkpoints import checkpoints_of
from pytest_moe_routing.targets.contract import release_of
from pytest_moe_routing.targets.expected import (
    expected_kernel,
    is_open,
    known_keys,
    known_placements,
    known_taken,
)
from pytest_moe_routing.targets.kept import Store, key_of_sources
from pytest_moe_routing.targets.layouts import split
from pytest_moe_routing.targets.model_classes import ModelClasses, Place
from pytest_moe_routing.targets.other_experts import other_call
from pytest_moe_routing.targets.probe import Probe, Questions
from pytest_moe_routing.targets.read_sources import ReadSources
from pytest_moe_routing.targets.reader import CodeReader
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.taken import placements_of, taken_experts

if TYPE_CHECKING:
    from pytest_moe_routing.targets.contract import Names


@cache
def _config_reads(package: str) -> Mapping[str, Any]:
    """Return the packaged table of a framework, cached: it is one file of the package."""
    table: Mapping[str, Any] = read_data(__package__, package, "config_reads.yaml")
    return table


class FrameworkTarget(ReadSources):
    """A target made with a `Source`: an installed framework, or the one at `name@PATH`.

    The module of a subclass is imported when pytest starts, so it must not import the framework.

    Attributes:
        distributions: The distributions that contain the package, in order of preference.
    """

    distributions: ClassVar[tuple[str, ...]]

    #: Schemes that this target serves in no kernel of FlashInfer's. It is asked whether it takes
    #: experts that call one nevertheless.
    elsewhere: Collection[str] = ()
    #: The child that answers most questions, and the one that is asked about weights and about what
    #: is around kernel calls. They may be one.
    _probe: Probe
    _aside: Probe

    def __init__(self, flashinfer: FlashInfer, source: Source) -> None:
        super().__init__(flashinfer)
        self.source = source
        cls, release = type(self), (str(source.root), flashinfer.release, source.version)
        self._reader = CodeReader(str(self), cls.__module__, cls.__qualname__, *release)

    def child(self, module: str, *more: str, answers: Mapping[str, Any]) -> Probe:
        """Return a child process that runs a module of the framework's probe.

        Args:
            more: What its command line has after root, FlashInfer and version.
            answers: See `Probe`.
        """
        name = f"pytest_moe_routing.targets.{self.package}.probe.{module}"
        release = self.flashinfer.release, self.source.version
        return Probe(str(self), name, str(self.source.root), *release, *more, answers=answers)

    def probes(self) -> Iterable[Probe]:
        """Return the children whose answers depend on nothing but what `targets.kept` knows."""
        return (self._reader.probe,)

    def start(self) -> None:
        """Start the children that are asked first, as each imports the framework for seconds.

        By default, each starts when it is asked.
        """

    def close(self) -> None:
        """End the children, and keep what they said."""
        self._reader.probe.close()

    def questions_ahead(self, method: str, models: Sequence[ModelSpec]) -> Iterable[Questions]:
        """Return what a method of the target will ask about models, of another child than most.

        Args:
            method: `misnamed_weights`, `files_not_run`, `layer_request`, `backend_request` or
                `router_runs`.
        """
        return self._reader.questions(method, models) if self.model_packages else ()

    def verdict_questions(
        self, models: Sequence[ModelSpec], scheme: str, *, thorough: bool = True
    ) -> Iterable[Questions]:
        """Yield what `prepare` asks, each after what it depends on is answered."""
        return ()

    def choice_questions(self, models: Sequence[ModelSpec], scheme: str) -> Iterable[Questions]:
        """Yield what `choice` asks, likewise."""
        return ()

    def modular_questions(self, models: Sequence[ModelSpec], scheme: str) -> Iterable[Questions]:
        """Yield what `modular_gates` and `modular_findings` ask, likewise."""
        return ()

    def prepare(self, models: Sequence[ModelSpec], scheme: str, *, thorough: bool = True) -> None:
        for probe, question, many in self.verdict_questions(models, scheme, thorough=thorough):
            probe.prepare(question, many)

    def keep_answers(self, store: Store) -> int:
        """Take over the answers of earlier runs, and keep new ones; return how many there are."""
        root = self.source.root
        sources = key_of_sources(root, self.package, self.distributions)
        if sources is None:
            return 0
        return sum(probe.keep(store, sources, root) for probe in self.probes())

    def version(self) -> str:
        return self.source.version

    def asked_of_others(self, model: ModelSpec, scheme: str) -> dict[str, Any] | None:
        """Return the arguments of the question about experts of other kernels.

        None if no experts that the adapter runs have the scheme.
        """
        raise Unsupported(f"{self.name} runs no experts of other kernels")

    def asked_of_split(self, model: ModelSpec, scheme: str) -> dict[str, Any]:
        """Return the arguments of the question about split experts, but for how they are split."""
        return {"model": model.as_dict(), "scheme": scheme}

    def split_switches(self, model: ModelSpec, scheme: str) -> tuple[str, ...] | None:
        """Return the flags that a server needs for the scheme's kernel; None if not known."""
        method = self.classify(model).method
        modular = not all(gate.ok for gate in self.gates(model, scheme, method))
        choice = self.choice(model, scheme, method, modular=modular)
        return None if choice is None else choice.switches

    def split(self, model: ModelSpec, scheme: str, count: int, whole: int) -> tuple[LaidOut, ...]:
        asked = {**self.asked_of_split(model, scheme), "count": count, "whole": whole}
        answers = self._aside.ask("split_layouts", **asked)
        found = [split(answer, scheme, self.flashinfer) for answer in answers]
        if not any(at.findings or at.refused for at in found):
            return tuple(found)
        switches = self.split_switches(model, scheme)
        return tuple(replace(at, switches=switches) for at in found)

    def other_experts(self, model: ModelSpec, scheme: str) -> tuple[OtherCall, ...]:
        """Return the calls of other kernels, on each GPU and with each number of ranks.

        Raises:
            Unsupported: The release has no such experts for the scheme, or cannot be asked.
        """
        asked = self.asked_of_others(model, scheme)
        answer = {"calls": []} if asked is None else self._aside.ask("other_experts", **asked)
        calls = tuple(other_call(model, record, self.flashinfer) for record in answer["calls"])
        if not calls and scheme in self.elsewhere:
            # As it should be. It has been asked, and models of the kind need not be.
            calls = (OtherCall("none", "any GPU", (), requests=False, findings=()),)
        return calls

    def not_served(self, scheme: str) -> Unsupported:
        """Return why a scheme that the adapter has no names for cannot be judged.

        A framework serves a scheme through FlashInfer only where its code names the entry point.
        """
        function = kernel_of(scheme).name
        if self.source.names(self.package, function):
            return Unsupported(
                f"{self}: its code calls {function}, in a way that the adapter does not know"
            )
        return Unsupported(
            f"{self} does not support {scheme} through FlashInfer: its code does not use {function}"
        )

    @cached_property
    def classes(self) -> ModelClasses:
        """The classes of the release's models, and the code that they lead to."""
        from pytest_moe_routing.targets.contract import Contract, Names
        from pytest_moe_routing.targets.stubs import definitions

        root = str(self.source.root)
        found = definitions(self.package, root)
        names = Names(Contract.of(self.package), self.source.version, found)
        return ModelClasses(found, lambda: self.registered(names, root), self.model_packages)

    def expected(self, model: ModelSpec, scheme: str) -> Expected | None:
        """Return what this release, or the newest known one before it, does with a packaged model.

        A user's own model has no expectation.
        """
        if model.folder.parent != packaged_directory():
            return None
        return expected_kernel(self.package, self.version(), str(model), scheme)

    def known_placements(self, model: ModelSpec, scheme: str) -> KnownPlacements | None:
        """Return where this release, or the newest known one before it, takes its experts."""
        if model.folder.parent != packaged_directory():
            return None
        return known_placements(self.package, self.version(), str(model), scheme)

    def runs_others(self, model: ModelSpec, scheme: str) -> bool:
        """Return whether the scheme's other experts are to be asked about.

        They are if tensor parallelism runs them on some GPU, in this release or in the newest known
        one before it, and no open question keeps them from being asked.
        """
        known = self.known_placements(model, scheme)
        places = () if known is None else known.by_default
        runs = any(kind in OTHERS and placement == "tp" for kind, _, placement in places)
        asked = self.package, self.version(), "test_other_experts", f"{model}-{scheme}"
        return runs and not is_open(*asked)

    def asked_of_placements(self, model: ModelSpec, scheme: str) -> dict[str, Any]:
        """Return the arguments of the question about places."""
        return {"model": model.as_dict(), "scheme": scheme}

    def placements(self, model: ModelSpec, scheme: str) -> Placements:
        """Return where the selectors of this release take experts of FlashInfer.

        Raises:
            Unsupported: The release has no selector for the scheme, or cannot be asked.
        """
        answer = self._probe.ask("placements", **self.asked_of_placements(model, scheme))
        return placements_of(answer)

    def placement_rule(self, model: ModelSpec, scheme: str, place: Placed) -> Rule:
        """Return the gate, or the selector, that keeps experts from a place."""
        asked = {name: getattr(place, name) for name in ("experts", "device", "placement")}
        question = self.asked_of_placements(model, scheme) | asked
        return Rule(**self._probe.ask("placement_rule", **question, requested=not place.by_default))

    def known_keys(self) -> KnownKeys | None:
        """Return what the experts of this release, or the newest known one before it, accept."""
        return known_keys(self.package, self.version())

    def accepted_keys(self, experts: str) -> AcceptedKeys:
        """Return which quantization keys a class of experts accepts.

        Args:
            experts: Its row of the contract.

        Raises:
            Unsupported: The release does not have the class.
        """
        answer = self._probe.ask("accepted_keys", experts=experts)
        pairs = {
            device: [(weights, activations) for weights, activations in accepted]
            for device, accepted in answer["accepted"].items()
        }
        about = {name: answer[name] for name in ("name", "keys", "function", "source")}
        return AcceptedKeys(pairs=pairs, **about)

    def taken_experts(self, models: Sequence[ModelSpec], scheme: str) -> TakenExperts | None:
        """Return which classes of experts the selectors of this release end with.

        Raises:
            Unsupported: The release has no selector for the scheme.
        """
        return taken_experts(
            self._probe,
            lambda model: self.classify(model).method,
            lambda ids: known_taken(self.package, self.version(), ids, scheme),
            models,
            scheme,
        )

    def checkpoints(self, scheme: str) -> Iterable[Checkpoint]:
        return checkpoints_of(self.package, scheme, release_of(self.version()))

    def served(self, model: ModelSpec, checkpoint: Checkpoint, experts: str) -> Served:
        """Return what this release makes of the experts of a checkpoint.

        Raises:
            Unsupported: The release does not have what the question needs.
        """
        asked = {"config": checkpoint.config, "hf_config": checkpoint.hf_config, "prefix": experts}
        return Served(**self._probe.ask("checkpoint", model=model.as_dict(), **asked))

    def unknown_architectures(self) -> list[str]:
        """Return the architectures with experts that are not known; see `targets.architectures`.

        Raises:
            Unsupported: The release has no registry that can be read.
        """
        from pytest_moe_routing.targets.architectures import unknown_architectures

        data = read_data(__package__, self.package, "architectures.yaml")
        return unknown_architectures(self.classes, data)

    def files_not_run(self) -> Sequence[str]:
        """Return the files of models with experts that no packaged model runs.

        Raises:
            Unsupported: The release has no registry that can be read.
        """
        return self._reader.files_not_run() if self.model_packages else super().files_not_run()

    def modules_run(self, architectures: Collection[str]) -> set[str]:
        """Return modules of models that are run for architectures, besides those they lead to."""
        return set()

    def registered(self, names: Names, root: str) -> Mapping[str, Place]:
        """Return the class of each architecture that the release has code for.

        Raises:
            Unsupported: The release has no registry that can be read.
        """
        raise Unsupported(f"{self.name} has no model code")

    def runs_as(self, architecture: str, known: Collection[str]) -> bool:
        """Whether the release runs an architecture by the class of one of the known ones."""
        try:
            place = self.classes.runs(architecture)
            return place is not None and place in map(self.classes.runs, known)
        except Unsupported:
            return False

    def misnamed_weights(self, model: ModelSpec) -> Sequence[MisnamedWeight]:
        """Return the weights that a model's code loads into another matrix's place.

        Raises:
            Unsupported: The release has no registry that can be read.
        """
        return self._reader.misnamed_weights(model) if self.model_packages else ()

    def contains(self, name: str) -> bool:
        return self.source.names(self.package, name)

    def honors(self, model: ModelSpec, name: str) -> bool | None:
        """Whether the release computes what a config states for a key that transformers ignores.

        Its code ignores a key that it does not read. What it does with one that it reads is in
        `config_reads.yaml`, for the releases whose code a person has read.
        """
        if not self.model_packages:
            return None
        rows = _config_reads(self.package)["releases"].get(self.version(), {})
        known: bool | None = rows.get(model.architecture, {}).get(name)
        if known is None:
            try:
                return False if self.classes.ignores(model.architecture, name) else None
            except Unsupported:
                return None
        return known
