"""Asks a server of SGLang which runner it takes, on each GPU and for each placement of a model.

A placement is how a server shares out experts and tokens to its GPUs. The runner is that of a
server to which none was named, and the one that is taken where one is.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import cache, cached_property, partial
from itertools import product
from typing import Any, Protocol

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.given import refused_on
from pytest_moe_routing.targets.answers import PlacementsAnswer, RuleAnswer
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.default_runner import (
    FIELD,
    Checkpoint,
    Refusal,
    agreed,
    started,
)
from pytest_moe_routing.targets.sglang.probe.requests import DEVICE, requesting
from pytest_moe_routing.targets.sglang.probe.rule import runner_rules

_Device = tuple[int, int]
#: The compute capability of each GPU that a server is asked for.
_DEVICES: tuple[_Device, ...] = ((9, 0), (10, 0), (10, 3), (12, 0))
_EP = {"tp_size": 2, "ep_size": 2}
#: What a server is told, by placement; the default is one GPU.
_SHARED: Mapping[str, Mapping[str, Any]] = {
    "tp": {},
    "ep": _EP,
    "ep+eplb": {**_EP, "enable_eplb": True},
}
#: Values of `--moe-a2a-backend` that are none, or that other vendors' GPUs have.
_ELSEWHERE = ("none", "mori", "ascend_fuseep", "ascend_tp")
_ALL2ALL, _DISPATCH = "moe_a2a_backend", "flashinfer_a2a_dispatch_type"
#: The placements that a server is asked for with a runner that is named on every GPU. SGLang's
#: checks of others do not look at the GPU, and are asked about on one.
_NAMED, _NAMED_ON = ("tp", "ep"), (10, 0)
#: Of kinds of experts that are not TRT-LLM's, the kernel whose GPUs are known, or the GPUs.
_KERNELS = {"cutlass": "cutlass_fused_moe"}
_RUN_ON: Mapping[str, tuple[_Device, ...]] = {
    "mxfp4": _DEVICES,
    "cutedsl": ((10, 0), (10, 3)),
    "megamoe": ((10, 0), (10, 3)),
}
#: A kind of request: a server that is told TRT-LLM's runner that routes, and takes the one that is
#: given experts and weights.
_REPLACED = "replaced"


def _placements(names: Names, defaults: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return what a server of a release is told, by placement."""
    backends = names.spelling("all2all-backends")
    # Most of them need groups of GPUs with tokens of their own.
    is_new = "attn_dp_size" in defaults
    own = {"attn_dp_size": 2} if is_new else {"enable_dp_attention": True, "dp_size": 2}
    found = dict(_SHARED)
    for name in names.definitions.literals(backends.module, backends.path):
        if name not in _ELSEWHERE:
            found[name] = {**_EP, **own, _ALL2ALL: name}
    if names.has("all2all-dispatch-types"):
        types = names.spelling("all2all-dispatch-types")
        for kind in names.definitions.literals(types.module, types.path):
            found[f"flashinfer+{kind}"] = {**found["flashinfer"], _DISPATCH: kind}
    return found


class _Server:
    """A server for a checkpoint, by what it is told.

    Args:
        quantization: That of the checkpoint, which a server is told where a runner is named.
        placements: Those that it may be told.
    """

    def __init__(
        self,
        names: Names,
        defaults: Mapping[str, Any],
        checkpoint: Checkpoint,
        quantization: str | None,
        placements: Mapping[str, Mapping[str, Any]],
    ) -> None:
        self.names, self.placements, self.defaults = names, placements, defaults
        self._checkpoint = checkpoint
        self._told: Checkpoint = {**checkpoint, "quantization": quantization}

    def runner(
        self, device: _Device, placement: str, named: str = "", *, flagged: bool = False
    ) -> str | Refusal:
        """Return the runner that is taken, or why the server does not start.

        Args:
            named: The runner that `--moe-runner-backend` names, if any.
            flagged: Whether no server without `--quantization` is asked.
        """

        def taken(checkpoint: Checkpoint) -> str | Refusal:
            found = started(self.names, self.defaults, checkpoint, options)
            return found if isinstance(found, Refusal) else str(found[FIELD])

        options = {**self.placements[placement], **({FIELD: named} if named else {})}
        if unknown := options.keys() - self.defaults.keys():
            # Nothing would read it.
            raise Unsupported(f"not judged: SGLang's server has no argument {min(unknown)}")
        with requesting(**{DEVICE: device}):
            is_one = named or flagged
            told = self._told if named else self._checkpoint
            return taken(told) if is_one else agreed(told, taken)

    def offers(self, runner: str) -> bool:
        """Return whether `--moe-runner-backend` may name a runner."""
        return runner in self.defaults[self.names.spelling("runner-choices").path]

    @cached_property
    def naming(self) -> list[RuleAnswer]:
        """The functions that name a runner anywhere."""
        places = product(_DEVICES, self.placements)
        choosing = (partial(self.runner, *place) for place in places)
        rules = (rule for choose in choosing for rule in runner_rules(self.names, choose))
        return [rule for rule in rules if rule["instead"]]


def placements(server: _Server, scheme: str, runners: Mapping[str, str]) -> PlacementsAnswer:
    """Return which runners are taken where; see `oracle.placed.Placements`.

    Args:
        runners: By the kind of their experts.

    Raises:
        Unsupported: SGLang's code does not say it here.
    """
    taken: dict[tuple[str, str, _Device, bool], list[str]] = {}
    kinds = {runner: kind for kind, runner in runners.items()}
    for device, placement in product(_DEVICES, server.placements):
        default = server.runner(device, placement)
        if isinstance(default, str) and default in kinds:
            taken.setdefault((kinds[default], default, device, False), []).append(placement)
        for kind, runner in runners.items():
            if not _is_asked(server, scheme, kind, runner, (device, placement)):
                continue
            found = server.runner(device, placement, runner)
            if found == runner and found != default:
                taken.setdefault((kind, runner, device, True), []).append(placement)
            elif kind == "monolithic" and found == runners.get("modular"):
                taken.setdefault((_REPLACED, found, device, True), []).append(placement)
    requests = {kind: f"--moe-runner-backend {runner}" for kind, runner in runners.items()}
    if "monolithic" in requests:
        requests[_REPLACED] = requests["monolithic"]
    return {
        "taken": [
            {
                "experts": kind,
                "name": runner,
                "device": "{}.{}".format(*device),
                "requested": requested,
                "placements": found,
            }
            for (kind, runner, device, requested), found in taken.items()
        ],
        "flags": {name: list(_flags(options)) for name, options in server.placements.items()},
        "requests": requests,
        "compared": [],
    }


def _is_asked(
    server: _Server, scheme: str, kind: str, runner: str, place: tuple[_Device, str]
) -> bool:
    """Return whether a server is asked for a runner by its name in a place."""
    device, placement = place
    if not server.offers(runner) or (device != _NAMED_ON and placement not in _NAMED):
        return False
    if runner in server.placements and placement != runner:
        # It brings tokens to experts itself.
        return False
    if kind in _RUN_ON:
        return device in _RUN_ON[kind]
    return _runs(_KERNELS.get(kind), scheme, "{}.{}".format(*device))


@cache
def _runs(function: str | None, scheme: str, device: str) -> bool:
    return refused_on(function, scheme, device) is None


def _flags(options: Mapping[str, Any]) -> Iterator[str]:
    """Yield options as a user writes them."""
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        yield flag if value is True else f"{flag} {value}"


def placement_rule(
    server: _Server,
    scheme: str,
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
    if placement not in server.placements:
        name = f"placement {placement}"
        return {"name": name, "source": "", "instead": "this release has no such placement"}
    major, minor = map(int, device.split("."))
    named = runners["monolithic" if experts == _REPLACED else experts] if requested else ""
    if named and not server.offers(named):
        name = f"{named} in {server.names.spelling('runner-choices').path}"
        return {"name": name, "source": "", "instead": "this release has no such runner"}
    taken = list[str | Refusal]()
    asked = runner_rules(
        server.names,
        lambda: taken.append(server.runner((major, minor), placement, named)),
    )
    now = taken[0]
    if isinstance(now, Refusal):
        return {**now.code, "instead": f"the server does not start: {now.text}"}
    told = f"--moe-runner-backend {now}"
    if not named and server.runner((major, minor), placement, flagged=True) != now:
        told += " without --quantization"
    if naming := [rule for rule in asked if rule["instead"]]:
        return {**naming[-1], "instead": told}
    if now == named:
        return {"name": "no function replaces it", "source": "", "instead": told}
    able = {rule["name"] for rule in server.naming if rule["instead"] == runners[experts]}
    deciding = [rule for rule in asked if rule["name"] in able] or asked
    names, source = " or ".join(rule["name"] for rule in deciding), deciding[-1]["source"]
    return {"name": names, "source": source, "instead": told}


class Release(Protocol):
    """What answers questions about a release; see `main.Blocks`."""

    names: Names

    @property
    def defaults(self) -> Callable[[], Mapping[str, Any]]: ...

    @property
    def enter(self) -> Callable[[], None]: ...


def placement_questions(blocks: Release) -> dict[str, Callable[..., Any]]:
    """Return the questions about placements of a release."""
    known = cache(lambda: _placements(blocks.names, blocks.defaults()))
    #: By the question, as each lost place asks about the same server.
    servers: dict[str, _Server] = {}

    def about(ask: Callable[..., Any]) -> Callable[..., Any]:
        def answer(server: Checkpoint, quantization: str | None, **question: Any) -> Any:
            blocks.names.require("verdicts")
            blocks.enter()
            key = json.dumps([server, quantization], sort_keys=True)
            if key not in servers:
                told = server, quantization, known()
                servers[key] = _Server(blocks.names, blocks.defaults(), *told)
            return ask(servers[key], **question)

        return answer

    return {"placements": about(placements), "placement_rule": about(placement_rule)}
