"""The ways on which a server runs experts in kernels that are not TRT-LLM's; see `configs.yaml`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any, Protocol, TypedDict, Unpack

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.calls import Call
from pytest_moe_routing.targets.sglang.probe.default_runner import FIELD, Checkpoint
from pytest_moe_routing.targets.sglang.probe.device import BLACKWELL, on
from pytest_moe_routing.targets.sglang.probe.sources import Sources

_FLAG = "--moe-runner-backend"
#: The module that names the environment variables.
_VARIABLES = "sglang.srt.environ"
#: How the names of FlashInfer's runners begin.
_FLASHINFER = "flashinfer"


class Way(TypedDict):
    """One way.

    Attributes:
        stored: What the call is stored as, see `flashinfer/given.yaml`.
        is_restricted: Whether an assertion names the quantizations that the runner serves.
        options: Further options of the server, by their names.
        is_default: Whether only servers are asked that take the runner by default.
    """

    runner: str
    device: str
    stored: str
    is_restricted: bool
    options: Mapping[str, str]
    is_default: bool


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

    @property
    def defaults(self) -> Callable[[], Mapping[str, Any]]: ...

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
        known: Every runner that is asked about, here or by other questions.
        unjudged: By runner, further settings with which it is not asked about.
    """

    ways: Iterable[Way]
    server: Checkpoint
    quantization: str | None
    elsewhere: bool
    known: Iterable[str]
    unjudged: Mapping[str, Iterable[str]]


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
            is_default = _is_default(blocks, told["server"], runner)
            if way["is_default"] > is_default or blocks.rejection(told["server"], {FIELD: runner}):
                continue
            switches = [] if is_default else [f"{_FLAG} {runner}"]
            for name, value in way["options"].items():
                switches.append(f"--{name.replace('_', '-')} {value}")
            yield way, switches


def defaults_elsewhere(blocks: Blocks, server: Checkpoint, ways: Iterable[Way]) -> list[list[str]]:
    """Return each GPU but the usual one on which a server takes a way's runner by default."""
    blocks.method_numbers()
    found = list[list[str]]()
    for device, runner in dict.fromkeys((way["device"], way["runner"]) for way in ways):
        with on(device):
            if device != BLACKWELL and _is_default(blocks, server, runner):
                found.append([device, runner])
    return found


def unjudged(blocks: Blocks, told: Told, **question: Any) -> Iterator[list[str]]:
    """Yield flags with which a server may run a kernel of FlashInfer's that is not asked about.

    These are the runners of the release that are not known, as far as servers accept them and
    layers do not take another one, and settings in which a known one hands over something else.

    Args:
        question: That about a block, but for the runner.
    """
    blocks.method_numbers()
    choices = blocks.defaults().get(blocks.names.spelling("runner-choices").path) or ()
    for runner in choices:
        if not runner.startswith(_FLASHINFER) or not _may_be_accepted(blocks, told, runner):
            continue
        if runner in told["known"]:
            settings = filter(partial(_is_known, blocks), told["unjudged"].get(runner, ()))
            yield from ([f"{_FLAG} {runner}", f"with {setting}"] for setting in settings)
        elif _may_be_taken(blocks, runner, question):
            yield [f"{_FLAG} {runner}"]


def _is_known(blocks: Blocks, setting: str) -> bool:
    """Return whether a release has a setting, if it is an environment variable."""
    if setting.startswith("-"):
        return True
    return setting.partition("=")[0] in blocks.sources.source(_VARIABLES)


def _may_be_accepted(blocks: Blocks, told: Told, runner: str) -> bool:
    """Return whether a server accepts a runner, as far as its code says."""
    with suppress(Unsupported):  # It asserts nothing about the runner.
        allowed = blocks.sources.accepted_quantizations(runner)
        if allowed is not None and told["quantization"] not in allowed:
            return False
    with suppress(Unsupported):
        return not blocks.rejection(told["server"], {FIELD: runner})
    return True


def _may_be_taken(blocks: Blocks, runner: str, question: Mapping[str, Any]) -> bool:
    """Return whether a layer takes a runner of FlashInfer's, as far as its code says."""
    with suppress(Unsupported):
        return blocks.layer_runner(**question, runner=runner).startswith(_FLASHINFER)
    return True


def _is_default(blocks: Blocks, server: Checkpoint, runner: str) -> bool:
    """Return whether a server takes the runner by itself, as far as its code says."""
    try:
        return blocks.default_runner(**server) == runner
    except Unsupported:
        return False
