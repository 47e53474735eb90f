"""Asks a server of SGLang which runner it takes, on each GPU and for each placement of a model.

A placement is how a server shares out experts and tokens to its GPUs. The runner is that of a
server to which none was named, and whether one accepts a runner that is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Protocol

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.answers import PlacementsAnswer, RuleAnswer
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.default_runner import (
    FIELD,
    Checkpoint,
    started,
)
from pytest_moe_routing.targets.sglang.probe.requests import DEVICE, requesting
from pytest_moe_routing.targets.sglang.probe.rule import runner_rules
from pytest_moe_routing.targets.sglang.probe.sources import Sources

#: The compute capability of each GPU that a server is asked for.
_DEVICES = ((9, 0), (10, 0), (10, 3), (12, 0))
#: What a server is told, by placement; the default is one GPU.
_SHARED: Mapping[str, Mapping[str, Any]] = {
    "tp": {},
    "ep": {"tp_size": 2, "ep_size": 2},
    "ep+eplb": {"tp_size": 2, "ep_size": 2, "enable_eplb": True},
}
#: Other ways to bring tokens to the ranks of their experts: values of `--moe-a2a-backend`.
_ALL2ALL = ("deepep", "mooncake", "nixl", "flashinfer", "megamoe")
#: The GPU and the placements that a server is asked for with a runner that is named: most of its
#: checks of these look at neither.
_NAMED_ON, _NAMED = (10, 0), ("tp", "ep")


def _placements() -> dict[str, Mapping[str, Any]]:
    ep = _SHARED["ep"]
    return {**_SHARED, **{name: {**ep, "moe_a2a_backend": name} for name in _ALL2ALL}}


class _Server:
    """A server for a checkpoint, by what it is told.

    Args:
        accepts: Returns the quantizations that a named runner may be combined with; None: all.
    """

    def __init__(
        self,
        names: Names,
        defaults: Mapping[str, Any],
        accepts: Callable[[str], Sequence[str | None] | None],
        checkpoint: Checkpoint,
        quantization: str | None,
    ) -> None:
        self._about, self._accepts = (names, defaults, checkpoint), accepts
        self._quantization = quantization

    def runner(self, device: tuple[int, int], placement: str, named: str = "") -> str | None:
        """Return the runner that is taken; None if the server does not start.

        Args:
            named: The runner that `--moe-runner-backend` names, if any.
        """
        options = {**_placements()[placement], **({FIELD: named} if named else {})}
        if unknown := options.keys() - self._about[1].keys():
            # Nothing would read it.
            raise Unsupported(f"not judged: SGLang's server has no argument {min(unknown)}")
        with requesting(**{DEVICE: device}):
            found = started(*self._about, options)
        return None if isinstance(found, str) else str(found[FIELD])

    def accepts(self, runner: str) -> bool:
        """Return whether a named runner may be combined with the checkpoint's quantization."""
        try:
            allowed = self._accepts(runner)
        except Unsupported:
            # Nothing is asserted about most runners.
            return True
        return allowed is None or self._quantization in allowed


def placements(server: _Server, runners: Mapping[str, str]) -> PlacementsAnswer:
    """Return which runners are taken where; see `oracle.placed.Placements`.

    Args:
        runners: By the kind of their experts.

    Raises:
        Unsupported: SGLang's code does not say it here.
    """
    taken: dict[tuple[str, tuple[int, int], bool], list[str]] = {}
    kinds = {runner: kind for kind, runner in runners.items()}
    for device in _DEVICES:
        for placement in _placements():
            default = server.runner(device, placement)
            if default in kinds:
                taken.setdefault((default, device, False), []).append(placement)
            if device != _NAMED_ON or placement not in _NAMED:
                continue
            for runner in kinds:
                is_taken = server.runner(device, placement, runner) == runner
                if runner != default and is_taken and server.accepts(runner):
                    taken.setdefault((runner, device, True), []).append(placement)
    return {
        "taken": [
            {
                "experts": kinds[runner],
                "name": runner,
                "device": "{}.{}".format(*device),
                "requested": requested,
                "placements": found,
            }
            for (runner, device, requested), found in taken.items()
        ],
        "flags": {name: list(_flags(options)) for name, options in _placements().items()},
        "requests": {kind: f"--moe-runner-backend {runner}" for kind, runner in runners.items()},
        "compared": [],
    }


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield options as a user writes them."""
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        yield flag if value is True else f"{flag} {value}"


def placement_rule(
    server: _Server,
    runners: Mapping[str, str],
    experts: str,
    device: str,
    placement: str,
    requested: bool,
) -> RuleAnswer:
    """Return the function that names another runner, or that names none although it could.

    Which function could is known of one that names the runner elsewhere. Of others, all are named,
    with the place of the last, which is asked about each model.
    """
    major, minor = map(int, device.split("."))
    runner, taken = runners[experts], list[str | None]()

    def rules(device: tuple[int, int], placement: str, named: str = "") -> list[RuleAnswer]:
        return runner_rules(lambda: taken.append(server.runner(device, placement, named)))

    asked = rules((major, minor), placement, runner if requested else "")
    now = taken[0]
    told = "the server does not start" if now is None else f"--moe-runner-backend {now}"
    if requested and now == runner:
        name = f"the server's assertion about {runner}"
        return {"name": name, "source": "", "instead": "the server does not start"}
    if naming := [rule for rule in asked if rule["instead"]]:
        return {**naming[-1], "instead": told}
    elsewhere = (rule for place in product(_DEVICES, _placements()) for rule in rules(*place))
    able = {rule["name"] for rule in elsewhere if rule["instead"] == runner}
    deciding = [rule for rule in asked if rule["name"] in able] or asked
    names, source = " or ".join(rule["name"] for rule in deciding), deciding[-1]["source"]
    return {"name": names, "source": source, "instead": told}


class Release(Protocol):
    """What answers questions about a release; see `main.Blocks`."""

    names: Names
    sources: Sources

    @property
    def defaults(self) -> Callable[[], Mapping[str, Any]]: ...

    @property
    def enter(self) -> Callable[[], None]: ...


def placement_questions(blocks: Release) -> dict[str, Callable[..., Any]]:
    """Return the questions about placements of a release."""

    def about(ask: Callable[..., Any]) -> Callable[..., Any]:
        def answer(server: Checkpoint, quantization: str | None, **question: Any) -> Any:
            names = blocks.names
            names.require("verdicts")
            blocks.enter()
            if not names.expects("overrides-collect"):
                raise Unsupported(
                    "this release chooses runners in a way that the probe does not know"
                )
            told = server, quantization
            accepts = blocks.sources.accepted_quantizations
            return ask(_Server(names, blocks.defaults(), accepts, *told), **question)

        return answer

    return {"placements": about(placements), "placement_rule": about(placement_rule)}
