"""The routers of quantized models: it depends on the method whether TopK applies the factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.model_configs import configs
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


class Blocks(Protocol):
    """What answers about a release; see `main.Blocks`."""

    names: Names

    @property
    def defaults(self) -> Callable[[], Mapping[str, Any]]: ...


def in_triton(
    blocks: Blocks,
    build: Callable[..., tuple[Any, float]],
    servers: Mapping[str, Checkpoint],
) -> Iterator[tuple[str, Seen, tuple[Any, float]]]:
    """Yield each scheme whose layer takes the Triton runner on Hopper, and what is built for it.

    Schemes whose layers cannot be made here take other runners.

    Args:
        build: Builds a block of a quantized model.
        servers: What a server is told of the model, by scheme.
    """
    for scheme, server in servers.items():
        told, seen = _told(configs()["schemes"][scheme]), Seen()
        if told is None or not blocks.names.has(told["name"]):
            continue
        try:
            with on("Hopper"):
                found = started(blocks.names, blocks.defaults(), server, {})
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


def _told(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return what a block's quantization config is made from; None if it has none."""
    told = row["config"]
    if told is None:
        return None
    if "arguments" not in told:
        return {**told, "in_checkpoint": row["in_checkpoint"]}
    arguments = dict(told["arguments"])
    if arguments.get("weight_block_size") == _BLOCKS:
        arguments["weight_block_size"] = _NARROW_BLOCKS
    return {**told, "arguments": arguments}
