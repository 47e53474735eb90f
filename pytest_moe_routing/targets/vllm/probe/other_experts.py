"""Runs modular experts that call other kernels of FlashInfer than TRT-LLM's, on marked tokens.

They are run as `modular` runs TRT-LLM's, and only where a selector of the release takes them: on
each GPU that they are for, by default or for `--moe-backend`, with expert parallelism and without
it. The layer's quantization method makes their quantization config, for the backend that the
selector chose. Scales of blocks are known by their memory, and what is computed of others by the
values of `targets.scales`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.given import refused_on
from pytest_moe_routing.targets import scales
from pytest_moe_routing.targets.recorder import input_scale, roles_of
from pytest_moe_routing.targets.vllm.probe import factory, server_defaults
from pytest_moe_routing.targets.vllm.probe.biases import gives_biases
from pytest_moe_routing.targets.vllm.probe.choice import (
    REQUESTED,
    Selector,
    on_capability,
    outcome,
    selector_of,
)
from pytest_moe_routing.targets.vllm.probe.config import NoActivation, parallel_config
from pytest_moe_routing.targets.vllm.probe.exchanged import BACKENDS, exchange
from pytest_moe_routing.targets.vllm.probe.experts import ELSEWHERE, SCHEMES
from pytest_moe_routing.targets.vllm.probe.gates import quant_keys
from pytest_moe_routing.targets.vllm.probe.layer import Layer, layer_of, sizes_of
from pytest_moe_routing.targets.vllm.probe.method import class_of, methods_of
from pytest_moe_routing.targets.vllm.probe.modular import Run
from pytest_moe_routing.targets.vllm.probe.ranks import Ranks, shared_out_to, unevenly_shared_out
from pytest_moe_routing.targets.vllm.probe.release import names


@dataclass(frozen=True)
class Kind:
    """One class of experts.

    Attributes:
        key: Its row of the contract.
        backends: The values of `--moe-backend` that ask for it.
        function: The entry point of FlashInfer that it calls.
        devices: Names of the GPUs that it is asked about; see `CAPABILITIES`.
    """

    key: str
    backends: tuple[str, ...]
    function: str
    devices: tuple[str, ...] = ("Blackwell", "Hopper")


_KINDS = (
    Kind(
        "modular-flashinfer-cutlass",
        ("flashinfer_cutlass", "flashinfer_cutlass_afp8"),
        "cutlass_fused_moe",
    ),
    Kind(
        "modular-cutedsl",
        ("flashinfer_cutedsl",),
        "cute_dsl_fused_moe_nvfp4",
        ("Blackwell", "Rubin"),
    ),
)
#: The compute capability of each GPU that the selectors are asked for.
DEVICES = {"Blackwell": (10, 0), "Hopper": (9, 0)}
#: The same, and that of GPUs that only some kinds are asked about.
CAPABILITIES = {**DEVICES, "Rubin": (10, 7)}
_GATHERED = Ranks(2, dispatched=True)
#: What the tensors of a layer are to a kernel, see `flashinfer/given.yaml`.
_ROLES: Mapping[str, str] = {
    "w13_weight_scale": "fc1 weights",
    "w2_weight_scale": "fc2 weights",
    "w13_input_scale": "fc1 input",
    "w2_input_scale": "fc2 input",
    "w13_bias": "fc1 biases",
    "w2_bias": "fc2 biases",
}
#: How activations are stored of which a checkpoint of MXFP4 says nothing.
_UNQUANTIZED_ACTIVATIONS = "mxfp4_bf16"
#: What a record has besides where the kernel cannot be called.
_NO_CALL: Mapping[str, Any] = {"by": "", "has_biases": False}


def other_experts(model: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """Return what becomes of marked tokens in each class that a server takes for the model.

    Each of the `calls` is as those of `capture_modular`, with the name of the `experts`, the
    `device`, the `switches` that a user needs, what the call is `stored` as (see
    `flashinfer/given.yaml`) and the `roles` of its tensors. Where FlashInfer does not run the
    kernel, nothing is run, and the record has the `capability` of the GPU.

    Raises:
        Unsupported: The release has no such experts, or nothing that chooses them.
    """
    if scheme in ELSEWHERE:
        return _elsewhere(model, scheme)
    if SCHEMES[scheme].modular is None:
        return {"calls": []}
    names().require("modular", scheme)
    kinds = kinds_of(scheme)
    if not kinds and not any(map(names().expects, BACKENDS)):
        return {"calls": []}
    row, method = SCHEMES[scheme], factory.classify(model)[0]
    try:
        selector = selector_of(model, scheme, method)
    except NoActivation:
        return {"calls": []}
    callers = methods_of(row.modular_methods, model)
    if selector is None or not callers:
        raise Unsupported("no selector of this release chooses modular experts for the scheme")
    calls = []
    for (kind, stored), devices in kinds.items():
        experts = names().get(kind.key)
        for ranks in _ways(model):
            found = []
            for device in devices:
                with on_capability(*CAPABILITIES[device]):
                    taken = taken_as(selector, kind, experts, ranks)
                if taken is None:
                    continue
                switches, backend = taken
                about = {"experts": experts.__name__, "device": device, "stored": stored}
                about |= {"switches": switches, "requests": switches != list(ranks.flags)}
                capability = "{}.{}".format(*CAPABILITIES[device])
                if refused_on(kind.function, stored, capability) is None:
                    found.append((about, backend))
                else:
                    about |= {"function": kind.function, "capability": capability}
                    calls.append({**about, **_NO_CALL, "shards": ranks.shards})
            if not found:
                continue
            # A class is the same on each of them: the one is taken that needs the least.
            about, backend = min(found, key=lambda each: needs(each[0]))
            with on_capability(*CAPABILITIES[about["device"]]):
                for caller in callers:
                    layer = layer_of(model, row, method, ranks)
                    layer.backend = backend
                    calls.append({**about, **_call(experts, caller, layer, ranks)})
    return {"calls": [*calls, *_exchanged(model, scheme, selector, callers)]}


def _exchanged(
    model: Mapping[str, Any], scheme: str, selector: Selector, callers: Sequence[Any]
) -> Iterator[dict[str, Any]]:
    """Yield calls of experts on Blackwell whose tokens ranks exchange over NVLink.

    The first method that calls them is asked: methods hand over the same, and do not exchange.
    """
    row, method, device = SCHEMES[scheme], factory.classify(model)[0], "Blackwell"
    trtllm = Kind(row.modular or "", (REQUESTED,), "", (device,))
    for (kind, stored), devices in {(trtllm, scheme): [device], **kinds_of(scheme)}.items():
        experts = names().get(kind.key)
        for ranks in _exchanges(model) if device in devices else ():
            with on_capability(*DEVICES[device]):
                taken = taken_as(selector, kind, experts, ranks)
                if taken is None:
                    continue
                layer = layer_of(model, row, method, ranks)
                layer.backend = None if kind is trtllm else taken[1]
                about = {"experts": experts.__name__, "device": device, "stored": stored}
                about |= {"switches": taken[0], "requests": taken[0] != list(ranks.flags)}
                about["intermediate_size"] = sizes_of(model)[1]
                with exchange():
                    call = _call(experts, callers[0], layer, ranks)
                if not _is_not_made(call):
                    yield {**about, **call}


def _is_not_made(call: Mapping[str, Any]) -> bool:
    """Return whether what makes the steps around experts rejects them: a server does not start."""
    said = call.get("raised", {"type": "", "where": ""})
    file = names().spelling("prepare-factory").module.replace(".", "/")
    return said["type"] == NotImplementedError.__name__ and said["where"].startswith(f"{file}.py:")


def _exchanges(model: Mapping[str, Any]) -> Iterator[Ranks]:
    for key, backend in BACKENDS.items():
        if names().expects(key) and shared_out_to(model["router"]["num_experts"]) > 1:
            yield replace(_GATHERED, exchange=backend)


def _elsewhere(model: Mapping[str, Any], scheme: str) -> dict[str, Any]:
    """Return experts of FlashInfer's that a server takes for a scheme that none of them serves.

    They are not run.

    Raises:
        Unsupported: Nothing chooses experts for the scheme.
    """
    names().require("modular", scheme)
    try:
        selector = selector_of(model, scheme, factory.classify(model)[0])
    except NoActivation:
        return {"calls": []}
    if selector is None:
        raise Unsupported("no selector of this release chooses experts for the scheme")
    row, calls = ELSEWHERE[scheme], []
    keys = filter(None, (row.experts, row.modular, *(kind.key for kind in _KINDS)))
    of_flashinfer = [names().get(key) for key in keys if names().has(key)]
    default = server_defaults.moe_backend()
    backends = dict.fromkeys((default, REQUESTED, *(b for kind in _KINDS for b in kind.backends)))
    for device, capability in DEVICES.items():
        with on_capability(*capability):
            for name in backends:
                taken = outcome(selector, replace(selector.config, moe_backend=name), ())[1]
                if not any(taken is each for each in of_flashinfer):
                    continue
                switches = [] if name == default else [f"--moe-backend {name}"]
                about = {"experts": taken.__name__, "device": device, "switches": switches}
                about |= {"requests": bool(switches), "stored": scheme, "elsewhere": True}
                calls.append({**about, **_NO_CALL, "shards": 1})
    return {"calls": calls}


@cache
def kinds_of(scheme: str) -> dict[tuple[Kind, str], list[str]]:
    """Return the GPUs of each class that a release has for a scheme, and how it stores that.

    Cached, as a release does not change.
    """
    found: dict[tuple[Kind, str], list[str]] = {}
    for kind in _KINDS:
        for device in kind.devices if names().has(kind.key) else ():
            with on_capability(*CAPABILITIES[device]):
                stored = _stored(names().get(kind.key), scheme)
            if stored:
                found.setdefault((kind, stored), []).append(device)
    return found


def _ways(model: Mapping[str, Any]) -> Iterator[Ranks]:
    experts = model["router"]["num_experts"]
    yield Ranks()
    if (count := shared_out_to(experts)) > 1:
        yield Ranks(count)
        yield _GATHERED
    if (uneven := unevenly_shared_out(experts)) is not None:
        yield uneven
    yield Ranks(2, split=True)


def _stored(experts: Any, scheme: str) -> str:
    """Return how a class of experts has the scheme on this GPU; nothing if it does not."""
    weight, activation = quant_keys(SCHEMES[scheme])
    if experts._supports_current_device():
        if experts._supports_quant_scheme(weight, activation):
            return scheme
        if scheme == "mxfp4" and experts._supports_quant_scheme(weight, None):
            return _UNQUANTIZED_ACTIVATIONS
    return ""


def needs(about: Mapping[str, Any]) -> tuple[int, str]:
    return len(about["switches"]), about["device"]


def taken_as(
    selector: Selector, kind: Kind, experts: Any, ranks: Ranks
) -> tuple[list[str], Any] | None:
    """Return what has to be switched on for a server to take a class, and as which backend.

    None if it never takes the class.

    Raises:
        Unsupported: No user of this release can ask for the class.
    """
    server_defaults.require_backend(*kind.backends)
    config = selector.config
    if ranks.count > 1:
        parallel = parallel_config(
            ranks.shards,
            dispatched=ranks.dispatched,
            parts=ranks.parts,
            exchange=ranks.exchange,
        )
        config = replace(config, moe_parallel_config=parallel)
    default = server_defaults.moe_backend()
    for name in dict.fromkeys((default, *kind.backends)):
        backend, taken = outcome(selector, replace(config, moe_backend=name), ())
        if taken is experts:
            return [*ranks.flags, *([] if name == default else [f"--moe-backend {name}"])], backend
    return None


def _call(experts: Any, caller: Any, layer: Layer, ranks: Ranks) -> dict[str, Any]:
    """Return what becomes of the tokens.

    Raises:
        Unsupported: The method makes no quantization config for the experts.
    """
    sources: dict[str, Tensor] = {}

    def made() -> Any:
        found = layer.made(experts, caller)
        if found is None:
            raise Unsupported(
                f"not judged: {caller.__qualname__.split('.')[0]} of vLLM {names().version} makes "
                f"no quantization config for {experts.__name__}"
            )
        parameters = {name: getattr(layer.asked, name, None) for name in _ROLES}
        sources.update(
            {_ROLES[n]: tensor for n, tensor in parameters.items() if tensor is not None}
        )
        return found

    scales.quantized_by.clear()
    run = Run(experts, caller, layer, ranks.dispatched, made)
    about = {"by": caller.__qualname__.split(".")[0], "shards": ranks.shards}
    about |= {"dispatched": ranks.dispatched, "parts": ranks.parts}
    about |= {"has_biases": layer.model["experts"]["bias"] and gives_biases(class_of(caller))}
    answer = {**about, **run.answer(), **input_scale()}
    return {**answer, "roles": roles_of(run.arguments, sources)}
