"""The runner that SGLang chooses for a checkpoint when no `--moe-runner-backend` is given.

SGLang's own code resolves the arguments of a server to which nothing was said but the quantization,
where SGLang's documentation has it said. A layer may choose further when they leave it at `auto`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from types import MappingProxyType
from typing import Any, TypedDict, TypeVar
from unittest.mock import patch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import layers, stubs
from pytest_moe_routing.targets.answers import RuleAnswer
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.raised import raising, verdict_on
from pytest_moe_routing.targets.sglang.probe.requests import module_apart
from pytest_moe_routing.targets.sglang.probe.sources import Sources

#: A server that leaves the choice to each layer.
AUTO = "auto"
#: Runners, by their names on a server's command line.
TRITON, _MARLIN = "triton", "marlin"
#: What Marlin's runner gives its kernel, which multiplies by it (`fused_marlin_moe.py`).
_BY_MARLIN = "routed_scaling_factor=runner_config.routed_scaling_factor"
#: The argument of a server that names the runner.
FIELD = "moe_runner_backend"
#: The one that keeps shared experts apart from the routed ones.
APART = "disable_shared_experts_fusion"


def server_defaults(sources: Sources) -> dict[str, Any]:
    """Return the defaults of a server's arguments, and the lists of choices that SGLang imports."""
    found = sources.server_defaults()
    stubs.stand_in({name: value for name, value in found.items() if name.isupper()})
    return found


def register_runners(names: Names) -> None:
    """Import what makes a runner known to SGLang, and which code that is not here would import."""
    if names.has("runner-marlin"):
        names.get("runner-marlin")


# A release does not change.
@cache
def multiplying_runners(names: Names) -> frozenset[str]:
    """Return the runners that multiply by a layer's factor, whatever the layer says of TopK.

    Triton's does in each release whose routers are run, see `routers.Routers`.
    """
    if names.has("runner-marlin"):
        spelling = names.spelling("runner-marlin")
        if _BY_MARLIN in stubs.installed_source_of(
            f"{spelling.module}.{spelling.path}".rstrip(".")
        ):
            return frozenset((TRITON, _MARLIN))
    return frozenset((TRITON,))


def layer_runner(names: Names, layer: Any) -> str:
    """Return the name of the runner that a layer took when it was made.

    Raises:
        Unsupported: It took none, or the release keeps it where the contract does not say.
    """
    if not names.expects("layer-runner"):
        raise Unsupported("which runner a layer uses in this release is not known")
    taken = layer
    if names.expects("layer-runner-name"):
        # Layers of compressed-tensors have a scheme, which has the runner.
        owners = (layer, getattr(layer, "scheme", None))
        taken = next(filter(None, (getattr(owner, "runner", None) for owner in owners)), None)
    if taken is None or taken.runner_backend is None:
        raise Unsupported("the layer calls kernels without a runner, whose name is not known")
    return str(taken.runner_backend.value)


class _Config(layers.Config):
    """The config of a checkpoint."""

    reads = "SGLang's code reads {!r} of the checkpoint's config"


class _ModelConfig:
    """SGLang's config of a model: what is not known of it is a stub."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return stubs.Stub(name)


class _Server:
    """Arguments of a server, their defaults where not given, and what was resolved of them."""

    def __init__(
        self,
        defaults: Mapping[str, Any],
        config: _Config,
        checkpoint: Checkpoint,
    ) -> None:
        vars(self).update(defaults)
        self._model_config = _ModelConfig(
            hf_config=config, quantization=checkpoint["detected"], **checkpoint["in_weights"]
        )
        self._model_config_built_from = None
        self._quantization_explicitly_unset = False
        self._resolved_overrides: list[tuple[str, Mapping[str, Any]]] = []
        self.moe_runner_backend = AUTO
        self.device = "cuda"
        self.quantization = checkpoint["quantization"]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        # No field, but a method that asks about other fields.
        return stubs.Stub(name)

    def get_model_config(self) -> Any:
        return self._model_config

    def take(self, source: str, declared: Mapping[str, Any]) -> None:
        """Remember what SGLang's code declares."""
        self._resolved_overrides.append((source, declared))
        vars(self).update(declared)


class Checkpoint(TypedDict):
    """A checkpoint that a server is told to serve.

    Attributes:
        config: Attributes of the model's config.
        quantization: `--quantization`, or None where it is not given.
        in_checkpoint: `quantization_config` of the checkpoint's config.
        detected: The quantization in SGLang's config of the model, with `--quantization` or not.
        stated: `quantization_config` in SGLang's config of the model on each kind of server that
            serves the checkpoint without `--quantization`, if it may be left out.
        flagged: Runners that are known to be the default only with `--quantization`.
        in_weights: What SGLang's config of the model has from the weights.
    """

    architecture: str
    config: Mapping[str, Any]
    quantization: str | None
    in_checkpoint: Mapping[str, Any] | None
    detected: str | None
    stated: Sequence[Mapping[str, Any] | None]
    flagged: Sequence[str]
    in_weights: Mapping[str, Any]


_Runner = TypeVar("_Runner")


def agreed(checkpoint: Checkpoint, ask: Callable[[Checkpoint], _Runner]) -> _Runner | str:
    """Return the runner of a server with `--quantization`, if a server without it takes it as well.

    Args:
        ask: Returns the runner of a server, or what keeps the server from starting.

    Returns:
        The runner; `AUTO` if servers without `--quantization` differ, unless that is known.
    """
    runner = ask(checkpoint)
    if runner in checkpoint["flagged"]:
        return runner
    for stated in checkpoint["stated"]:
        without: Checkpoint = {**checkpoint, "quantization": None, "in_checkpoint": stated}
        if ask(without) != runner:
            return AUTO
    return runner


def _resolved(
    names: Names,
    defaults: Mapping[str, Any],
    checkpoint: Checkpoint,
    options: Mapping[str, Any] = MappingProxyType({}),
) -> _Server:
    """Return the arguments of a server after SGLang's own code has resolved them.

    Args:
        defaults: Of the server's arguments, and its lists of choices.
        options: Arguments that are given.

    Raises:
        Unsupported: SGLang's code does not say it here.
    """
    if not names.expects("overrides-collect"):
        raise Unsupported("this release chooses runners in a way that the probe does not know")
    architecture, in_checkpoint = checkpoint["architecture"], checkpoint["in_checkpoint"]
    said = {"architectures": [architecture], "model_type": "", "quantization_config": in_checkpoint}
    config = _Config({**checkpoint["config"], **said})
    server = _Server(defaults, config, checkpoint)
    vars(server).update(options)
    for source, declared in names.get("overrides-collect")(architecture, server, config):
        server.take(source, declared)
    for key in ("overrides-rtx", "overrides-deepseek", "overrides-quantization"):
        if names.expects(key):
            server.take(key, names.get(key)(server))
    return server


def keeps_shared_apart(
    names: Names, defaults: Mapping[str, Any], checkpoint: Checkpoint, runner: str
) -> bool:
    """Return whether a server with this runner keeps shared experts apart from the routed ones.

    If it does not, the model's code decides; see `shared_experts`. The arguments are those of
    `_resolved`.

    Raises:
        Unsupported: SGLang's code does not say it here.
    """
    try:
        server = _resolved(names, defaults, checkpoint, {FIELD: runner})
        server.take("overrides-fusion", names.get("overrides-fusion")(server))
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(
            f"cannot determine whether a server with {runner} keeps shared experts apart: "
            f"{type(error).__name__}: {error}"
        ) from error
    return bool(getattr(server, APART))


@dataclass(frozen=True)
class Refusal:
    """Why a server does not start, and the code that says so."""

    text: str
    code: RuleAnswer


# Reading it takes longer than all else that is done for one server.
@cache
def _environment() -> dict[str, str]:
    return dict(os.environ)


def _handle(names: Names, server: _Server) -> None:
    """Have SGLang's code check the runner, and resolve it further, as when a server starts."""
    # Nothing is asked about buffers for so many tokens; the usual number depends on the GPU.
    vars(server)["chunked_prefill_size"] = -1
    # Some of what is resolved is kept in variables.
    with patch.object(os, "environ", dict(_environment())):
        for key in ("overrides-moe", "overrides-all2all"):
            spelling = names.spelling(key)
            attrgetter(spelling.path)(module_apart(spelling.module))(server)
    for _, declared in server._resolved_overrides:
        vars(server).update(declared)


def started(
    names: Names,
    defaults: Mapping[str, Any],
    checkpoint: Checkpoint,
    options: Mapping[str, Any],
) -> Mapping[str, Any] | Refusal:
    """Return the arguments of a server once it is started, or why it does not start.

    The arguments are those of `_resolved`.

    Raises:
        Unsupported: SGLang's code does not say it here.
    """
    try:
        server = _resolved(names, defaults, checkpoint, options)
        _handle(names, server)
        return vars(server)
    except Unsupported:
        raise
    except Exception as error:
        kind, text, _ = verdict_on(error, is_built=False)
        if kind != "refused":
            raise Unsupported(f"cannot determine whether a server starts: {text}") from error
        return Refusal(text, raising(error))


def default_runner(names: Names, defaults: Mapping[str, Any], checkpoint: Checkpoint) -> str:
    """Return the runner by its name on the command line, see `agreed`.

    The arguments are those of `_resolved`.

    Raises:
        Unsupported: SGLang's code does not say it here.
    """
    try:
        runner = agreed(
            checkpoint, lambda served: getattr(_resolved(names, defaults, served), FIELD)
        )
    except Unsupported:
        raise
    except Exception as error:
        raise Unsupported(
            f"cannot determine which runner {AUTO} selects: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(runner, str):
        raise Unsupported(f"cannot determine which runner {AUTO} selects: found {runner}")
    return runner
