"""What a target is: something that classifies routers and gates them, in one release."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.oracle.accepted_keys import AcceptedKeys, KnownKeys
from pytest_moe_routing.oracle.around import Request, Response
from pytest_moe_routing.oracle.checkpoints import Checkpoint, Served
from pytest_moe_routing.oracle.choice import Choice, Expected, Rule
from pytest_moe_routing.oracle.crossed import Crossed
from pytest_moe_routing.oracle.exact import Gate, kernel_call
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.lacking import Lacking
from pytest_moe_routing.oracle.laid_out import LaidOut
from pytest_moe_routing.oracle.methods_run import MethodsRun
from pytest_moe_routing.oracle.misnamed import MisnamedWeight
from pytest_moe_routing.oracle.model_code import LayerRequest, SplitExperts
from pytest_moe_routing.oracle.placed import KnownPlacements, Placed, Placements
from pytest_moe_routing.oracle.routers import RouterRun
from pytest_moe_routing.oracle.taken import TakenExperts


@dataclass(frozen=True)
class Classification:
    """A routing method by name, and the questions and answers that led to it."""

    method: str
    path: tuple[str, ...] = ()

    def __str__(self) -> str:
        return " -> ".join((*self.path, self.method))


@dataclass(frozen=True)
class Captured:
    """A call as a target's own code made it.

    Attributes:
        call: The routing arguments that reached the kernel; None if the code failed before.
        findings: What is wrong with the call, or why there is none; downcasts and notes
            included.
        site: The code that makes the call, and the entry point, as far as they are known.
        unknown: What cannot be known of the call, as a sentence. It is not judged then, unless
            something else is wrong with it.
        source: File and line of the target's code that makes the call, if they are known.
    """

    call: KernelCall | None
    findings: tuple[Finding, ...] = ()
    site: str = ""
    unknown: str = ""
    source: str = ""

    @property
    def wrong(self) -> tuple[Finding, ...]:
        """The findings that are no matter of precision."""
        precision = (Kind.DOWNCAST, Kind.PRECISION)
        return tuple(f for f in self.findings if f.kind not in precision)

    @property
    def downcasts(self) -> tuple[Finding, ...]:
        """What arrives less precise than the layer has it."""
        return tuple(f for f in self.findings if f.kind is Kind.DOWNCAST)

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What the kernel itself computes less precisely than the layer."""
        return tuple(f for f in self.findings if f.kind is Kind.PRECISION)


@dataclass(frozen=True)
class OtherCall:
    """A call of experts of another kernel than TRT-LLM's, which are given a router's choice.

    Attributes:
        experts: Their name.
        device: The GPU.
        switches: What a user has to switch on for that GPU; empty if they are the default.
        requests: Whether a switch names these experts.
    """

    experts: str
    device: str
    switches: tuple[str, ...]
    requests: bool
    findings: tuple[Finding, ...]


class Target:
    """Base class of targets: answers nothing, so that a subclass answers what it can.

    A question that a target cannot answer raises `Unsupported` with a reason, which becomes a
    skip. A target is made with the FlashInfer release that its decisions are judged against.
    """

    name: ClassVar[str]
    #: Names of the target's own routers, for each of which `test_router` has a case.
    routers: ClassVar[tuple[str, ...]] = ()
    #: The suite's tests that it answers, where these are few; all if there are none.
    tests: ClassVar[tuple[str, ...]] = ()

    def __init__(self, flashinfer: FlashInfer) -> None:
        self.flashinfer = flashinfer

    def close(self) -> None:
        """Let go of what the target holds, such as a process."""

    def version(self) -> str:
        """Return the release of what is tested."""
        raise Unsupported(f"{self.name} does not state its version")

    def lacking(self) -> Sequence[Lacking]:
        """Return what the target's code needs of FlashInfer and the judged release lacks."""
        raise Unsupported(f"{self.name} has no code that calls FlashInfer")

    def crossed(self) -> Sequence[Crossed]:
        """Return the calls of the target's layers with two values in each other's place."""
        raise Unsupported(f"{self.name} has no layers whose code is read")

    def drift(self) -> tuple[str, ...]:
        """Return where a FlashInfer that the target bundles contradicts the bundled facts."""
        return ()

    def honors(self, model: ModelSpec, name: str) -> bool | None:
        """Whether the target computes what the config states for a key that transformers ignores.

        Returns None where that is not known.
        """
        return None

    def contains(self, name: str) -> bool | None:
        """Whether the target's code contains a name; None where there is no code to read."""
        return None

    def logits_dtype(self, model: ModelSpec) -> str:
        """Return the dtype of the router logits that the target hands to a model's experts."""
        return model.router.logits_dtype

    def runs_as(self, architecture: str, known: Collection[str]) -> bool:
        """Return whether the target runs an architecture by the code of one of `known`."""
        return False

    def method_numbers(self) -> Mapping[str, int]:
        """Return the number that the target passes to FlashInfer for each method, by name."""
        raise Unsupported(f"{self.name} has no routing method numbers")

    def classify(self, model: ModelSpec) -> Classification:
        """Return the routing method that the target gives to a model's router."""
        raise Unsupported(f"{self.name} does not classify routers")

    def gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """Return the gates of a scheme's fused experts for this method, with their answers."""
        raise Unsupported(f"{self.name} has no gates for {scheme}")

    def modular_gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """Return the gates of the fused experts that are given ids and weights."""
        raise Unsupported(f"{self.name} has no modular experts for {scheme}")

    def modular_findings(self, model: ModelSpec, scheme: str) -> tuple[Finding, ...]:
        """Return what arrives wrongly at the kernel of experts that are given ids and weights."""
        raise Unsupported(f"{self.name} records no calls of modular experts")

    def named_findings(self, model: ModelSpec, scheme: str) -> tuple[Finding, ...]:
        """Return what is wrong with the call of the scheme's kernel where its backend is named.

        It is given ids and weights, as the target's own router serves the model.
        """
        return ()

    def weight_path(self, model: ModelSpec, scheme: str) -> str | None:
        """Return what tells the ways apart in which weights get to the scheme's kernels.

        None if no kernel of the scheme is called for the model.
        """
        raise Unsupported(f"{self.name} does not prepare weights")

    def laid_out(self, model: ModelSpec, scheme: str) -> tuple[LaidOut, ...]:
        """Return how weights and scales lie in the calls of the scheme's kernel.

        There is one for each way in which the target prepares them and calls the kernel.
        """
        raise Unsupported(f"{self.name} does not prepare weights")

    def split(self, model: ModelSpec, scheme: str, count: int, whole: int) -> tuple[LaidOut, ...]:
        """Return the same of one of `count` ranks that have a part of each expert.

        Args:
            whole: The intermediate size that the experts are made with.
        """
        raise Unsupported(f"{self.name} does not split experts")

    def formats(self, scheme: str) -> Mapping[str, Target]:
        """Return the target as it serves other checkpoints of a scheme, by what these say.

        A scheme's usual checkpoint is the one that all other questions are about.
        """
        return {}

    def laid_out_elsewhere(self, model: ModelSpec, scheme: str) -> tuple[LaidOut, ...]:
        """Return the same of calls of other kernels than the scheme's, if the target makes any."""
        return ()

    def taken_elsewhere(self, model: ModelSpec, scheme: str) -> object:
        """Return what tells models apart that the target takes such kernels for by default."""
        return None

    def other_experts(self, model: ModelSpec, scheme: str) -> tuple[OtherCall, ...]:
        """Return the calls of other kernels that the target runs a model's experts in, if any."""
        raise Unsupported(f"{self.name} runs no experts of other kernels")

    def served_elsewhere(self, scheme: str) -> Mapping[str, Target]:
        """Return the target as it serves checkpoints of a scheme in no kernel of FlashInfer's.

        By what they say, as `formats` are; "" is the usual one of a scheme that no kernel serves.
        """
        return {}

    def methods_run(self) -> MethodsRun:
        """Return what of the target's quantization methods its tests run, as far as it is known."""
        return MethodsRun(0, Counter())

    def choice_of_others(self, model: ModelSpec, scheme: str) -> object:
        """Return what tells models apart that the target chooses other experts for."""
        return None

    def capture(self, model: ModelSpec, scheme: str, method: str) -> Captured | None:
        """Return the call that the target's own code makes; None if it is not recorded."""
        return None

    def opt_in(self, model: ModelSpec, scheme: str) -> tuple[str, ...] | None:
        """Return the switches without which the target does not take its fused path for a model.

        Empty if it takes that path by default; None if `choice` says what makes it take the path,
        or nothing does.

        Raises:
            Unsupported: The target cannot be asked what it chooses. The verdict then has an open
                question: who can reach it.
        """
        return None

    def choice(
        self, model: ModelSpec, scheme: str, method: str, *, modular: bool = False
    ) -> Choice | None:
        """Return what makes the target take its fused experts; None if it is not known.

        Args:
            modular: The experts that are given ids and weights.
        """
        return None

    def expected(self, model: ModelSpec, scheme: str) -> Expected | None:
        """Return what the target must do with a case; None if nothing is expected of it."""
        return None

    def rule(self, model: ModelSpec, scheme: str, method: str, gate: str) -> Rule:
        """Return which code keeps the fused kernel from a model, as far as that is known.

        Args:
            gate: The first gate that rejects the model; empty if the kernel runs with a switch.
        """
        return Rule()

    def known_placements(self, model: ModelSpec, scheme: str) -> KnownPlacements | None:
        """Return where the target must take its experts; None if the model is not asked about."""
        return None

    def runs_others(self, model: ModelSpec, scheme: str) -> bool:
        """Return whether the target must run a model in `other_experts`."""
        return False

    def placements(self, model: ModelSpec, scheme: str) -> Placements:
        """Return where the target takes experts of FlashInfer for a model."""
        raise Unsupported(f"{self.name} takes no experts of FlashInfer")

    def placement_rule(self, model: ModelSpec, scheme: str, place: Placed) -> Rule:
        """Return which code keeps experts from a place, as far as that is known."""
        return Rule()

    def known_keys(self) -> KnownKeys | None:
        """Return which quantization keys experts must accept; None if that is not known."""
        return None

    def accepted_keys(self, experts: str) -> AcceptedKeys:
        """Return which quantization keys a class of experts accepts; `known_keys` names it."""
        raise Unsupported(f"{self.name} has no experts that accept quantization keys")

    def taken_experts(self, models: Sequence[ModelSpec], scheme: str) -> TakenExperts | None:
        """Return which classes of experts the target ends with; None if that is not known."""
        return None

    def checkpoints(self, scheme: str) -> Iterable[Checkpoint]:
        """Return the formats of a scheme's checkpoints that the target can be asked about."""
        return ()

    def served(self, model: ModelSpec, checkpoint: Checkpoint, experts: str) -> Served:
        """Return what the target makes of the experts of a checkpoint, by their name."""
        raise Unsupported(f"{self.name} reads no quantization configs")

    def around(self, model: ModelSpec, scheme: str, method: str) -> Mapping[Request, Response]:
        """Return how the fused experts handle each request of a server besides routing."""
        raise Unsupported(f"{self.name} answers no questions about requests besides routing")

    def capture_first(self, model: ModelSpec, scheme: str, method: str) -> Captured | None:
        """Return the same call, on the first of several ways that `capture` takes."""
        return self.capture(model, scheme, method)

    def prepare(self, models: Sequence[ModelSpec], scheme: str, *, thorough: bool = True) -> None:
        """Ask ahead, in one go, what a judgement of each of these models will ask.

        Args:
            thorough: Whether that will be `capture` or `capture_first`.
        """

    def prepare_gates(
        self,
        models: Sequence[ModelSpec],
        scheme: str,
        methods: Iterable[str],
        *,
        modular: bool = False,
    ) -> None:
        """Ask ahead, in one go, for `gates`, or `modular_gates`, of each model with each method."""

    def read_routers(self, models: Sequence[ModelSpec]) -> Sequence[RouterConfig | Unsupported]:
        """Return what the target's own routers, which run without a fused kernel, compute.

        For each model that is a router, or the reason why there is none. A target without routers
        of its own reads a config as it is meant.
        """
        return [
            Unsupported("this router cannot exist: {}: found {}, expected {}".format(*problems[0]))
            if (problems := list(router.problems()))
            else router
            for router in (model.router for model in models)
        ]

    def kernel_call(self, model: ModelSpec, scheme: str, method: str) -> KernelCall:
        """Return the routing arguments that reach the kernel.

        A target that does not record its real calls is taken to pass what the model says.
        """
        return kernel_call(model.router, scheme, method, self.flashinfer)

    def layer_request(self, model: ModelSpec, without: str = "") -> LayerRequest:
        """Return what the target's own code of a model requests from its MoE layer.

        Args:
            without: A key that the model's config leaves out; see `left_out`.
        """
        raise Unsupported(f"{self.name} has no model code")

    def split_shared_experts(self, model: ModelSpec) -> SplitExperts | None:
        """Return what of a model's shared experts is split over ranks that have other tokens."""
        return None

    def files_not_run(self) -> Sequence[str]:
        """Return the files of models with experts that no packaged model runs."""
        raise Unsupported(f"{self.name} has no model code")

    def misnamed_weights(self, model: ModelSpec) -> Sequence[MisnamedWeight]:
        """Return the weights that a model's code loads into another matrix's place."""
        return ()

    @staticmethod
    def without_backend() -> str:
        """Return why `backend_request` is not asked here; empty if it is."""
        return "tests of a transformers backend, which the target does not have"

    def backend_request(self, model: ModelSpec) -> LayerRequest | None:
        """Return what the target requests from its MoE layer for transformers' code of a model.

        None if transformers' own code routes.
        """
        raise Unsupported(f"{self.name} does not run the models of transformers")

    def left_out(self, model: ModelSpec) -> Iterable[tuple[str, ModelSpec]]:
        """Return keys that a config may leave out, and the model that it then describes."""
        return ()

    def router_runs(self, models: Iterable[ModelSpec]) -> list[RouterRun]:
        """Return what the target's own routers compute for models and other configurations."""
        raise Unsupported(f"{self.name} has no routers of its own")

    def refused_models(self) -> Mapping[str, str]:
        """Return why models have no run, by id, as far as `router_runs` was asked about them."""
        return {}

    def __str__(self) -> str:
        return f"{self.name} {self.version()}"
