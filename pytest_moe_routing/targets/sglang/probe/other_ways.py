"""The ways on which a server runs experts in kernels that are not TRT-LLM's; see `configs.yaml`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, TypedDict, Unpack

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.default_runner import FIELD, Checkpoint
from pytest_moe_routing.targets.sglang.probe.device import on
from pytest_moe_routing.targets.sglang.probe.sources import Sources
from pytest_moe_routing.targets.sglang.probe.world import Call


class Way(TypedDict):
    """One way.

    Attributes:
        stored: What the call is stored as, see `flashinfer/given.yaml`.
        is_restricted: Whether an assertion names the quantizations that the runner serves.
        options: Further options of the server, by their names.
    """

    runner: str
    device: str
    stored: str
    is_restricted: bool
    options: Mapping[str, str]


class Question(TypedDict):
    """Which block is built, with which experts; see `main.Blocks.capture`."""

    architecture: str
    config: dict[str, Any]
    scheme: str
    quantization: Mapping[str, Any] | None
    runner: str


class Blocks(Protocol):
    """What answers about the MoE blocks of a release; see `main.Blocks`."""

    names: Names
    sources: Sources
    calls: list[Call]

    def method_numbers(self) -> dict[str, int]: ...

    def rejection(self, server: Checkpoint, options: Mapping[str, Any]) -> str | None: ...

    def default_runner(self, **checkpoint: Unpack[Checkpoint]) -> str: ...

    def layer_runner(self, **question: Unpack[Question]) -> str: ...

    def capture(self, **question: Unpack[Question]) -> dict[str, Any]: ...


class Told(TypedDict):
    """The ways in question, and what a server is told on each of them but the runner.

    Attributes:
        quantization: The value of `--quantization`.
        elsewhere: Whether no kernel of FlashInfer's is known to serve the checkpoint.
    """

    ways: Iterable[Way]
    server: Checkpoint
    quantization: str | None
    elsewhere: bool


def accepted(blocks: Blocks, told: Told) -> Iterator[tuple[Way, list[str]]]:
    """Yield each way that a server accepts, on its GPU, and the flags that it needs.

    Raises:
        Unsupported: Whether a server accepts the runner is not known.
    """
    blocks.method_numbers()
    for way in told["ways"]:
        runner = way["runner"]
        if way["is_restricted"]:
            allowed = blocks.sources.accepted_quantizations(runner)
            if allowed is not None and told["quantization"] not in allowed:
                continue
        with on(way["device"]):
            if blocks.rejection(told["server"], {FIELD: runner}):
                continue
            is_default = _is_default(blocks, told["server"], runner)
            switches = [] if is_default else [f"--moe-runner-backend {runner}"]
            for name, value in way["options"].items():
                switches.append(f"--{name.replace('_', '-')} {value}")
            yield way, switches


def _is_default(blocks: Blocks, server: Checkpoint, runner: str) -> bool:
    """Return whether a server takes the runner by itself, as far as its code says."""
    try:
        return blocks.default_runner(**server) == runner
    except Unsupported:
        return False
