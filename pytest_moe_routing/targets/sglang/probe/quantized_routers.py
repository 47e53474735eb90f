"""The routers of quantized models: it depends on the method whether TopK applies the factor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypedDict

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.default_runner import (
    AUTO,
    FIELD,
    TRITON,
    Checkpoint,
    Refusal,
    layer_runner,
    multiplying_runners,
    register_runners,
    started,
)
from pytest_moe_routing.targets.sglang.probe.device import on
from pytest_moe_routing.targets.sglang.probe.router_case import Case, compare, not_judged
from pytest_moe_routing.targets.sglang.probe.router_world import choose_triton
from pytest_moe_routing.targets.sglang.probe.watching import Seen
from pytest_moe_routing.targets.sglang.probe.ways import PLAIN
from pytest_moe_routing.targets.sglang.probe.world import choose_runner

#: Blocks of FP8 weights, and blocks that fit the widths which routers are run with.
_BLOCKS, _NARROW_BLOCKS = [128, 128], [16, 16]


#: A block's TopK, and the factor on the weights behind it.
Topk = tuple[Any, float]


class Served(TypedDict):
    """A checkpoint that is served, and what its quantization config is made from."""

    server: Checkpoint
    quantization: Mapping[str, Any] | None


class Blocks(Protocol):
    """What answers about a release; see `main.Blocks`."""

    names: Names

    @property
    def defaults(self) -> Callable[[], Mapping[str, Any]]: ...


def on_hopper(
    blocks: Blocks,
    build: Callable[..., Topk],
    case_of: Callable[..., Case],
    servers: Mapping[str, Served],
    like: Mapping[str, Any],
) -> Iterator[dict[str, Any]]:
    """Run the router in each scheme whose layer takes Triton's or Marlin's runner on Hopper.

    Where that cannot be asked, the answer has the reason. A model that is not quantized is run
    elsewhere.

    Args:
        build: Builds a block of a quantized model.
        case_of: Returns the case of a TopK, the factor behind it, and what was seen of the block.
        servers: How a server serves the model, by scheme.
        like: The answer about the router on another way.
    """
    for scheme, served in servers.items():
        way = f"cuda, in {scheme} on Hopper"
        if served["quantization"] is None:
            continue
        try:
            found = _on_hopper(blocks, build, served["server"], served["quantization"])
            if found is not None:
                case = case_of(*found[1], seen=found[0])
                yield compare(replace(case, way=way, patterns=PLAIN))
        except Unsupported as reason:
            yield not_judged(like, way, f"{way}: {reason}")


def _on_hopper(
    blocks: Blocks,
    build: Callable[..., Topk],
    server: Checkpoint,
    quantization: Mapping[str, Any],
) -> tuple[Seen, Topk] | None:
    """Return what is built of one scheme; None if its layer takes another runner.

    Raises:
        Unsupported: The runner is not known, or the block cannot be built here.
    """
    if not blocks.names.has(quantization["name"]):
        return None
    seen = Seen()
    try:
        with on("Hopper"):
            found = started(blocks.names, blocks.defaults(), server, {})
            if isinstance(found, Refusal) or found[FIELD] != AUTO:
                return None
            choose_runner(AUTO)
            register_runners(blocks.names)
            try:
                built = build(seen, quantization=_narrow(quantization))
            except Unsupported:
                # What follows the layer does not change its runner.
                known = multiplying_runners(blocks.names)
                if not seen.made or not known.isdisjoint(_runners(blocks.names, seen)):
                    raise
                return None
    finally:
        choose_triton(blocks.names)
    runners = _runners(blocks.names, seen)
    if len(runners) != 1:
        listed = ", ".join(sorted(runners)) or "none"
        raise Unsupported(f"not judged: found the runners {listed} of the block, expected one")
    return (seen, built) if runners <= multiplying_runners(blocks.names) else None


def _runners(names: Names, seen: Seen) -> set[str]:
    """Return the runners of a block's layers of experts.

    Code without such a layer calls SGLang's function of Triton kernels.
    """
    if seen.runners and not seen.made:
        return {TRITON}
    return {layer_runner(names, layer) for layer in seen.made}


def _narrow(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a quantization config is made from, for the widths of routers that are run."""
    if "arguments" not in quantization:
        return quantization
    arguments = dict(quantization["arguments"])
    if arguments.get("weight_block_size") == _BLOCKS:
        arguments["weight_block_size"] = _NARROW_BLOCKS
    return {**quantization, "arguments": arguments}
