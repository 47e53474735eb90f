"""The routers of quantized models: it depends on the method whether TopK applies the factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TypedDict

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.default_runner import (
    AUTO,
    FIELD,
    Checkpoint,
    Refusal,
    layer_runner,
    started,
)
from pytest_moe_routing.targets.sglang.probe.device import on
from pytest_moe_routing.targets.sglang.probe.main import TRITON
from pytest_moe_routing.targets.sglang.probe.router_world import choose_triton
from pytest_moe_routing.targets.sglang.probe.watching import Seen
from pytest_moe_routing.targets.sglang.probe.world import choose_runner

#: Blocks of FP8 weights, and blocks that fit the widths which routers are run with.
_BLOCKS, _NARROW_BLOCKS = [128, 128], [16, 16]


class Served(TypedDict):
    """A checkpoint that is served, and what its quantization config is made from."""

    server: Checkpoint
    quantization: Mapping[str, Any] | None


class Blocks(Protocol):
    """What answers about a release; see `main.Blocks`."""

    names: Names

    @property
    def defaults(self) -> Callable[[], Mapping[str, Any]]: ...


def in_triton(
    blocks: Blocks,
    build: Callable[..., tuple[Any, float]],
    servers: Mapping[str, Served],
) -> Iterator[tuple[str, Seen, tuple[Any, float]]]:
    """Yield each scheme whose layer takes the Triton runner on Hopper, and what is built for it.

    Schemes whose layers cannot be made here take other runners.

    Args:
        build: Builds a block of a quantized model.
        servers: How a server serves the model, by scheme.
    """
    for scheme, served in servers.items():
        told, seen = _narrow(served["quantization"]), Seen()
        if told is None or not blocks.names.has(told["name"]):
            continue
        try:
            with on("Hopper"):
                found = started(blocks.names, blocks.defaults(), served["server"], {})
                if isinstance(found, Refusal) or found[FIELD] != AUTO:
                    continue
                choose_runner(AUTO)
                built = build(seen, quantization=told)
                # Code that calls experts as a function makes no layer, which could say so.
                runners = {layer_runner(blocks.names, layer) for layer in seen.made}
        except Unsupported:
            continue
        finally:
            choose_triton(blocks.names)
        if runners == {TRITON}:
            yield scheme, seen, built


def _narrow(quantization: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return what a quantization config is made from, for the widths of routers that are run."""
    if quantization is None or "arguments" not in quantization:
        return quantization
    arguments = dict(quantization["arguments"])
    if arguments.get("weight_block_size") == _BLOCKS:
        arguments["weight_block_size"] = _NARROW_BLOCKS
    return {**quantization, "arguments": arguments}
