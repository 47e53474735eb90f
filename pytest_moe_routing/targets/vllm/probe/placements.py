"""Asks selectors which of FlashInfer's experts a server takes, on each GPU and for each placement.

A placement is how a server shares out experts and tokens to its GPUs. All else that a server is
told is the default, or that the experts are requested.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.answers import RuleAnswer
from pytest_moe_routing.targets.vllm.probe import factory, server_defaults
from pytest_moe_routing.targets.vllm.probe.choice import (
    Selector,
    all_switches,
    experts_taken,
    on_capability,
    selector_of,
)
from pytest_moe_routing.targets.vllm.probe.config import NoActivation, parallel_config
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES
from pytest_moe_routing.targets.vllm.probe.gates import GATES, quant_keys
from pytest_moe_routing.targets.vllm.probe.rejections import Rejected, rejections
from pytest_moe_routing.targets.vllm.probe.release import accepted, names
from pytest_moe_routing.targets.vllm.probe.rule import rule_of

#: The compute capability of each GPU that the selectors are asked for.
DEVICES = ((9, 0), (10, 0), (10, 3), (12, 0))
_EP, _DP = "--enable-expert-parallel", "--data-parallel-size 2"
#: What asks for another way to bring tokens to the ranks of their experts.
_ALL2ALL = "--all2all-backend"
#: Which placements experts support does not depend on the activation: all are asked about once, and
#: these for each other activation.
_FEW = ("tp", "ep")
#: Names that the config of a server replaces by that of another one.
_REPLACED = ("naive", "pplx")


@dataclass(frozen=True)
class _Kind:
    """A kind of experts.

    Attributes:
        backend: The value of `--moe-backend` that asks for them.
        key: Their row of the contract; None if the release has none for the scheme.
    """

    name: str
    backend: str
    key: str | None


def _kinds(scheme: str) -> tuple[_Kind, ...]:
    row = SCHEMES[scheme]
    cutedsl = "flashinfer_cutedsl"
    of_nvfp4 = (
        _Kind("cutedsl", cutedsl, "modular-cutedsl"),
        _Kind("cutedsl_batched", cutedsl, "batched-cutedsl"),
    )
    return (
        _Kind("monolithic", "flashinfer_trtllm", row.experts),
        _Kind("modular", "flashinfer_trtllm", row.modular),
        _Kind("cutlass", "flashinfer_cutlass", "modular-flashinfer-cutlass"),
        *(of_nvfp4 if scheme == "nvfp4" else ()),
    )


@cache
def all_placements() -> dict[str, tuple[tuple[str, ...], Any]]:
    """Return the flags and the parallel config of each placement, by its name in data."""
    alone, shared = parallel_config(), parallel_config(2)
    own: dict[str, Any] = {"all2all_backend": server_defaults.parallel(server_defaults.ALL2ALL)}
    own |= {"dp_size": 2, "dp_rank": 1}
    found = {
        "tp": ((), alone),
        "ep": ((_EP, "--tensor-parallel-size 2"), shared),
        "ep+eplb": ((_EP, "--enable-eplb"), replace(shared, enable_eplb=True)),
        "dp": ((_DP,), replace(alone, **own)),
        "dp+ep": ((_DP, _EP), replace(shared, **own)),
        "dp+ep+eplb": ((_DP, _EP, "--enable-eplb"), replace(shared, **own, enable_eplb=True)),
    }
    if names().has("parallel-config.sp_size"):
        flags = (_DP, _EP, "--tensor-parallel-size 2")
        found["dp+ep+sp"] = (flags, replace(shared, **own, sp_size=2))
    for backend in _all2all_backends():
        other = {**own, "all2all_backend": backend}
        found[backend] = ((_DP, _EP, f"{_ALL2ALL} {backend}"), replace(shared, **other))
    return found


def _all2all_backends() -> Iterator[str]:
    """Yield the backends that a server of this release knows.

    Raises:
        Unsupported: They cannot be read.
    """
    spelling = names().spelling("all2all-backends")
    known = names().definitions.literals(spelling.module, spelling.path)
    yield from (name for name in known if name not in _REPLACED)


def placements(model: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """Return which experts are taken where.

    Each of `taken` is a kind of `experts`, its `name`, the compute capability of a `device`,
    whether the experts are `requested`, and the `placements`. `flags` and `requests` are what a
    user switches on for a placement and for a kind of experts.

    Raises:
        Unsupported: The release has no selector for the scheme, or one that cannot be asked.
    """
    selector, asked = _selector(model, scheme), list(all_placements())
    # Checkpoints of gpt-oss have a selector of their own.
    if model["experts"]["activation"] != "silu" and scheme != "mxfp4":
        asked = list(_FEW)
    taken: dict[tuple[str, str, str, bool], list[str]] = {}
    for device in DEVICES:
        with on_capability(*device):
            for kind, name, requested, place in _taken(selector, scheme, asked):
                key = kind, name, "{}.{}".format(*device), requested
                taken.setdefault(key, []).append(place)
    fields = ("experts", "name", "device", "requested")
    rows = [{**dict(zip(fields, key, strict=True)), "placements": p} for key, p in taken.items()]
    flags = {name: list(given) for name, (given, _) in all_placements().items()}
    requests = {kind.name: f"--moe-backend {kind.backend}" for kind in _kinds(scheme)}
    # `devices` compares gates and selectors.
    return {"taken": rows, "flags": flags, "requests": requests, "compared": ["10.3"]}


def _selector(model: Mapping[str, Any], scheme: str) -> Selector:
    method = factory.classify(model)[0]
    try:
        selector = selector_of(model, scheme, method)
    except NoActivation as unknown:
        raise Unsupported(f"not judged: {unknown}") from unknown
    if selector is None:
        raise Unsupported("no selector of this release chooses experts for the scheme")
    return selector


def _taken(
    selector: Selector, scheme: str, asked: Sequence[str]
) -> Iterator[tuple[str, str, bool, str]]:
    """Yield kind, name, whether it is requested, and placement, of all that is taken.

    Args:
        asked: The placements.
    """
    kinds = {cls: kind for kind in _kinds(scheme) if (cls := _class(kind)) is not None}
    backends = dict.fromkeys(kind.backend for kind in kinds.values())
    for backend in backends:
        server_defaults.require_backend(backend)
    for place in asked:
        _, parallel = all_placements()[place]
        default = _asked(selector, parallel, server_defaults.moe_backend(), ())
        if default in kinds:
            yield kinds[default].name, default.__name__, False, place
        for backend in backends:
            found = _asked(selector, parallel, backend, all_switches())
            if found in kinds and found is not default and kinds[found].backend == backend:
                yield kinds[found].name, found.__name__, True, place


def classes_of_flashinfer() -> set[Any]:
    """Return all classes of experts that any scheme is asked about here."""
    return {cls for scheme in SCHEMES for kind in _kinds(scheme) if (cls := _class(kind))}


def _class(kind: _Kind) -> Any:
    """Return the class of a kind of experts; None if the release has none."""
    found = names().get(kind.key) if kind.key is not None and names().has(kind.key) else None
    return found if isinstance(found, type) else None


def _asked(selector: Selector, parallel: Any, backend: str, variables: tuple[str, ...]) -> Any:
    """Return the class that is taken, or the text of a rejection."""
    try:
        with rejections():
            config = replace(selector.config, moe_parallel_config=parallel, moe_backend=backend)
    except Rejected as rejected:
        return str(rejected)
    return experts_taken(selector, config, variables)


def placement_rule(
    model: Mapping[str, Any],
    scheme: str,
    experts: str,
    device: str,
    requested: bool,
    placement: str,
) -> RuleAnswer:
    """Return the code that keeps experts from a layer: a gate, or the selector.

    The answer's `instead` is what the selector takes.
    """
    if placement not in all_placements():
        name = f"placement {placement}"
        return {"name": name, "source": "", "instead": "this release has no such placement"}
    selector = _selector(model, scheme)
    kind = next(kind for kind in _kinds(scheme) if kind.name == experts)
    parallel = all_placements()[placement][1]
    backend = kind.backend if requested else server_defaults.moe_backend()
    with on_capability(*map(int, device.split("."))):
        found = _asked(selector, parallel, backend, all_switches() if requested else ())
        instead = found if isinstance(found, str) else getattr(found, "__name__", "no experts")
        function = selector.function
        if (cls := _class(kind)) is not None:
            weight, activation = quant_keys(SCHEMES[scheme])
            config = selector.config
            given = {
                "activation": config.activation,
                "weight_key": weight,
                "activation_key": activation,
                "moe_parallel_config": parallel,
                "routing_method": config.routing_method,
                "routing_method_type": config.routing_method,
                "router_logits_dtype": config.router_logits_dtype,
                "hidden_dim": config.hidden_dim,
            }
            gates = (getattr(cls, name, None) for _, name, _ in GATES)
            no = (gate for gate in gates if gate and not gate(**accepted(gate, given)))
            function = next(no, function)
        return rule_of(function, instead)
