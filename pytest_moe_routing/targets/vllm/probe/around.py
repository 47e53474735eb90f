"""Asks the monolithic experts of a release for what lies around routing, on a layer of a model.

A request is rejected when the gate for the parallel config, the placement of experts or a check
that a server makes before it serves says no. It fails when the forward pass raises. When the kernel
is called all the same, its arguments show whether the request got there: FlashInfer's kernels take
a range of experts, and every row that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pytest_moe_routing.targets.vllm.probe.capture import misplaced, on_one_gpu, run_layer
from pytest_moe_routing.targets.vllm.probe.config import parallel_config
from pytest_moe_routing.targets.vllm.probe.devices import other_device
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES, ServedScheme
from pytest_moe_routing.targets.vllm.probe.gates import experts_of
from pytest_moe_routing.targets.vllm.probe.layer import Layer, layer_of
from pytest_moe_routing.targets.vllm.probe.method import methods_of
from pytest_moe_routing.targets.vllm.probe.modular import Run
from pytest_moe_routing.targets.vllm.probe.ranks import (
    EXPERT_PARALLEL,
    TOKENS,
    Ranks,
    unevenly_shared_out,
)
from pytest_moe_routing.targets.vllm.probe.rejections import Rejected, rejections
from pytest_moe_routing.targets.vllm.probe.release import names
from pytest_moe_routing.targets.vllm.probe.selectors import asked_of_selectors
from pytest_moe_routing.targets.vllm.probe.weight_on_input import weight_on_input

_ROUND_ROBIN = "round_robin"
#: A class of experts, and what runs a layer with it: its kernel's arguments, as `capture` has them.
_Way = tuple[Any, Callable[[Layer], Mapping[str, Any]]]


def around(model: Mapping[str, Any], scheme: str, method: str) -> dict[str, dict[str, Any]]:
    """Return what becomes of each request that this release knows.

    Each has an `answer`, `why`, and the `switches` with which a user makes the request. Experts of
    releases without classes are not asked.
    """
    row = SCHEMES[scheme]
    experts = experts_of(row)
    found: dict[str, dict[str, Any]] = {}
    if not isinstance(experts, type):
        return found
    caller = methods_of(row.methods, model)[0]
    is_whole = model["router"]["num_experts"] % 2 == 0

    def layer(*ranks: Any) -> Layer:
        return layer_of(model, row, method, Ranks(*ranks))

    if is_whole and names().has("parallel-config.sp_size"):
        parallel = replace(parallel_config(2), sp_size=2, all2all_backend="allgather_reducescatter")
        padding = _answer(_by_gate, experts, parallel, "the kernel is given every row")
        found["padding rows"] = {
            **padding,
            "switches": [EXPERT_PARALLEL, "--data-parallel-size 2", "--tensor-parallel-size 2"],
        }
    if is_whole:
        balanced = replace(parallel_config(2), enable_eplb=True)
        placement = _answer(_by_gate, experts, balanced, "the kernel is given logical experts")
        switches = [EXPERT_PARALLEL, "--enable-eplb"]
        found["expert placement by load (EPLB)"] = {**placement, "switches": switches}
        if names().has("placement"):
            found["round-robin expert placement"] = {
                **_answer(_round_robin, experts, caller, lambda: layer(2, False, _ROUND_ROBIN)),
                "switches": [EXPERT_PARALLEL, "--expert-placement-strategy round_robin"],
            }
    if (uneven := unevenly_shared_out(model["router"]["num_experts"])) is not None:
        found["experts that ranks cannot share out evenly"] = {
            **_answer(
                _shared_out, [*_ways(model, row)], lambda: layer_of(model, row, method, uneven)
            ),
            "switches": [*uneven.flags],
        }
    if names().has("layer.routing_sink"):
        found["captured expert ids"] = {
            **_answer(_captured, experts, caller, layer),
            "switches": ["--enable-return-routed-experts"],
        }
    found["compute capability 10.3"] = other_device(model, scheme, method)
    if (weighed := weight_on_input(model, scheme, method)) is not None:
        found["router weight already on the input"] = weighed
    return found | asked_of_selectors(model, scheme, method, experts)


def _answer(ask: Callable[..., dict[str, str]], *about: Any) -> dict[str, str]:
    """Return an answer, or that vLLM rejects the request before it would serve it."""
    try:
        return ask(*about)
    except Rejected as rejected:
        return {"answer": "rejected", "why": str(rejected)}


def _by_gate(experts: Any, parallel: Any, why: str) -> dict[str, str]:
    with rejections():
        supported = experts._supports_parallel_config(parallel)
    if supported:
        return {"answer": "ignored", "why": why}
    return {"answer": "rejected", "why": f"{experts.__name__}._supports_parallel_config"}


def _round_robin(experts: Any, caller: Any, make: Callable[[], Layer]) -> dict[str, str]:
    """Experts of rank 1 of 2 are every second one, if vLLM places them so for this model."""
    with rejections():
        layer = make()
        arguments = {
            "expert_placement_strategy": _ROUND_ROBIN,
            "moe_parallel_config": parallel_config(2),
            "num_expert_group": layer.num_expert_group,
            "num_redundant_experts": 0,
            "enable_eplb": False,
        }
        placed = names().get("placement")(**names().accepted("placement", arguments))
    if placed != _ROUND_ROBIN:
        return {"answer": "rejected", "why": f"{names().spelling('placement').path}: {placed}"}
    record = run_layer(experts, caller, layer)
    if "raised" in record:
        return _failed(record)
    given = record["arguments"]
    first, local = given["local_expert_offset"], given["local_num_experts"]
    why = f"the kernel is given experts {first} to {first + local - 1}"
    return {"answer": "ignored", "why": why, "source": record["at"]}


def _shared_out(ways: Sequence[_Way], make: Callable[[], Layer]) -> dict[str, str]:
    """Whether a kernel is given the experts of the last rank, which has fewer than others.

    Args:
        ways: Those of the experts' classes, of which the first is asked that takes the ranks.
    """
    with rejections():
        layer = make()
        parallel = layer.config.moe_parallel_config
        run = next((run for each, run in ways if each._supports_parallel_config(parallel)), None)
    if run is None:
        return {"answer": "rejected", "why": f"{ways[0][0].__name__}._supports_parallel_config"}
    record = run(layer)
    if "raised" in record:
        return _failed(record)
    wrong = misplaced(layer.asked.expert_map, record["arguments"])
    if not wrong:
        return {"answer": "honored", "why": "local_expert_offset"}
    argument, right, got = wrong
    why = f"{argument} of the last rank is {got}, which has {right}"
    return {"answer": "ignored", "why": why, "source": record["at"]}


def _ways(model: Mapping[str, Any], row: ServedScheme) -> Iterator[_Way]:
    """Yield the classes that a scheme has, and what runs a layer with each."""
    experts, caller = experts_of(row), methods_of(row.methods, model)[0]
    yield experts, lambda layer: run_layer(experts, caller, layer)
    given = methods_of(row.modular_methods, model)
    if row.modular and names().has(row.modular) and given:
        modular = names().get(row.modular)
        yield modular, lambda layer: Run(modular, given[0], layer, layer.ranks.dispatched).answer()


def _captured(experts: Any, caller: Any, make: Callable[[], Layer]) -> dict[str, str]:
    """Whether ids that the kernel writes get to whoever captures them."""
    handed_on: list[torch.Tensor] = []
    with rejections(), on_one_gpu():
        layer = make()
        layer.bind(experts, caller, handed_on.append)

    def write(arguments: Mapping[str, Any]) -> None:
        into = arguments.get("routing_replay_out")
        if into is not None:
            into.copy_(torch.arange(TOKENS * layer.top_k).reshape(TOKENS, -1))

    record = run_layer(experts, caller, layer, write)
    if "raised" in record:
        return _failed(record)
    written = torch.arange(TOKENS * layer.top_k).reshape(TOKENS, -1).to(torch.int16)
    if any(torch.equal(ids.to(torch.int16), written) for ids in handed_on):
        return {"answer": "honored", "why": "routing_replay_out"}
    got = record["arguments"].get("routing_replay_out")
    why = (
        "the kernel is given no routing_replay_out"
        if got is None
        else "the ids that it writes reach no consumer"
    )
    return {"answer": "ignored", "why": why, "source": record["at"]}


def _failed(record: Mapping[str, Any]) -> dict[str, str]:
    raised = record["raised"]
    why = f"{raised['where']}: {raised['type']}: {raised['message']}"
    return {"answer": "failed", "why": why, "raised_in": raised["code"]}
