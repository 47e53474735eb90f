"""Asks selectors which class of experts a server ends with, whatever kernels the class calls.

Of FlashInfer's, other questions ask what arrives at the kernel. Of the others, monolithic ones are
run up to the call that chooses experts: its arguments say what the kernel computes of the logits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from itertools import product
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.answers import KeptAnswer, TakenExpertsAnswer
from pytest_moe_routing.targets.compressed_tensors import QuantizationArgs
from pytest_moe_routing.targets.vllm.probe.capture import refusal
from pytest_moe_routing.targets.vllm.probe.choice import (
    Selector,
    in_a_build,
    on_capability,
    outcomes,
    selector_of,
)
from pytest_moe_routing.targets.vllm.probe.config import quant_config
from pytest_moe_routing.targets.vllm.probe.experts import ELSEWHERE, SCHEMES
from pytest_moe_routing.targets.vllm.probe.gates import GATES, QUANTIZATION, quant_keys
from pytest_moe_routing.targets.vllm.probe.other_experts import DEVICES
from pytest_moe_routing.targets.vllm.probe.placements import (
    all_placements,
    classes_of_flashinfer,
)
from pytest_moe_routing.targets.vllm.probe.rejections import Rejected, rejections
from pytest_moe_routing.targets.vllm.probe.release import accepted, names
from pytest_moe_routing.targets.vllm.probe.rule import rule_of
from pytest_moe_routing.targets.vllm.probe.splits import (
    decider,
    split_outcomes,
    split_ways,
    taken_in,
)

#: Values of `--moe-backend` that ask for other kernels than FlashInfer's.
_BACKENDS = ("triton", "marlin")
#: Ways to share out experts and tokens to GPUs, see `placements`; of Blackwell, only one GPU is
#: asked about.
_PLACEMENTS = {"Blackwell": ("tp",), "Hopper": ("tp", "ep", "ep+eplb", "dp+ep")}
_ROUTING = "_supports_routing_method"
#: The gate of adapters, as `GATES` has others.
_ADAPTERS = "adapters", "supports_lora", ""
#: What the module of a class says of the kernels that it has found, and all that it may say.
_GENERATIONS: Mapping[str, tuple[Any, ...]] = {
    "triton_kernels_version": ("3.5.1", "3.6", "3.8"),
    "use_legacy_triton_kernels": (True, False),
}
#: The weights of checkpoints in MXINT4, as their config describes them.
_MXINT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
#: A group of cases that no selector tells apart, by their indices.
_Groups = Sequence[tuple[Selector, Sequence[int]]]


class _Chosen(Exception):
    """The call that chooses experts.

    Attributes:
        logits: What it chooses by.
        first: Whether it takes a softmax of that before it chooses, in the same dtype.
        after: Whether it takes a softmax of the chosen.
    """

    def __init__(self, logits: Tensor, top_k: int, *, first: bool, after: bool) -> None:
        super().__init__()
        self.logits, self.top_k, self.first, self.after = logits, top_k, first, after


def _topk(x: Tensor, k: int, apply_softmax: bool = True, *_: Any, **__: Any) -> None:
    raise _Chosen(x, k, first=False, after=apply_softmax)


def _routing(logits: Tensor, n_expts_act: int, sm_first: bool = False, *_: Any, **__: Any) -> None:
    raise _Chosen(logits, n_expts_act, first=sm_first, after=not sm_first)


#: Functions of other libraries that choose experts, by module and name.
_CHOOSING: Mapping[tuple[str, str], Callable[..., None]] = {
    ("triton_kernels.topk", "topk"): _topk,
    ("triton_kernels.routing", "routing"): _routing,
}


def taken_experts(cases: Sequence[Mapping[str, Any]], scheme: str) -> TakenExpertsAnswer:
    """Return which class is taken in each case, in each way to run a server.

    `kept_out` are the monolithic classes that would be taken but for their gate of routing methods,
    and `preceded` those of FlashInfer's that would be in a build without the libraries of others.

    Args:
        cases: Each a `model` and its routing `method`.

    Raises:
        Unsupported: The release has no selector for the scheme.
    """
    groups, unasked = _groups(cases, scheme)
    flashinfer = classes_of_flashinfer()
    taken: list[Any] = []
    kept_out: list[Any] = []
    preceded: list[Any] = []
    routers: dict[Any, Selector] = {}
    for device, capability in DEVICES.items():
        for way in (*_PLACEMENTS[device], *_BACKENDS):
            _, changes = _ways()[way]
            about = {"device": "{}.{}".format(*capability), "way": way}
            with on_capability(*capability):
                alone = _outcomes(groups, changes)
            with on_capability(*capability), in_a_build():
                found = _outcomes(groups, changes)
                pairs = zip(alone, found, strict=True)
                first = [
                    old if old in flashinfer and new is not old else None for old, new in pairs
                ]
                preceded += _rows(about, first, groups)
                taken += _rows(about, found, groups)
                for cls in _routing_classes(scheme, flashinfer):
                    with patch.object(cls, _ROUTING, staticmethod(lambda *_, **__: True)):
                        open_to_all = _outcomes(groups, changes)
                    for (selector, _), experts in zip(groups, open_to_all, strict=True):
                        if experts is cls:
                            routers.setdefault(cls, selector)
                    pairs = zip(found, open_to_all, strict=True)
                    others = [new if new is cls is not old else None for old, new in pairs]
                    kept_out += _rows(about, others, groups)
        with on_capability(*capability), in_a_build():
            splits, without_splits = split_outcomes([each for each, _ in groups], scheme)
            for way, found in splits.items():
                about = {"device": "{}.{}".format(*capability), "way": way}
                taken += _rows(about, found, groups)
    switches = {way: list(switches) for way, (switches, _) in _ways().items()}
    return {
        "taken": taken,
        "kept_out": kept_out,
        "preceded": preceded,
        "routers": [_router(cls, selector, scheme) for cls, selector in routers.items()],
        "elsewhere": sorted(cls.__name__ for cls in flashinfer),
        "switches": switches | {way: list(given) for way, given in split_ways().items()},
        "unasked": unasked,
        "without_splits": without_splits,
    }


def kept_out_by(
    model: Mapping[str, Any], scheme: str, method: str, *, experts: str, device: str, way: str
) -> KeptAnswer:
    """Return what keeps a class of experts from a model: its gate, or the selector."""
    [(selector, _)], _ = _groups([{"model": model, "method": method}], scheme)

    def ask() -> None:
        if way in split_ways():
            taken_in([selector], way, scheme)
        else:
            _outcomes([(selector, ())], _ways()[way][1])

    with on_capability(*map(int, device.split("."))), in_a_build():
        # The modules of classes are imported when a selector asks them.
        ask()
        cls = next((cls for cls in _all_classes() if cls.__name__ == experts), None)
        gate = None if cls is None else _rejecting(cls, selector, ask)
        reader = decider(selector, way, scheme) if gate is None and way in split_ways() else None
    rule = reader or rule_of(selector.function if gate is None else gate)
    told = {"name": rule["name"], "source": rule["source"]}
    return {"exists": cls is not None, "is_gate": gate is not None, **told}  # type: ignore[typeddict-item]


def _groups(
    cases: Iterable[Mapping[str, Any]], scheme: str
) -> tuple[list[tuple[Selector, list[int]]], dict[str, list[int]]]:
    """Return the cases that a selector may tell apart, and why which it cannot be asked about.

    Raises:
        Unsupported: The release has no selector for the scheme.
    """
    groups: dict[Any, tuple[Selector, list[int]]] = {}
    unasked: dict[str, list[int]] = {}
    for place, case in enumerate(cases):
        try:
            selector = selector_of(case["model"], scheme, case["method"])
        except Unsupported as reason:
            unasked.setdefault(str(reason), []).append(place)
            continue
        if selector is None:
            raise Unsupported("no selector of this release chooses experts for the scheme")
        if scheme == "mxint4":
            # Other kernels than FlashInfer's ask what the checkpoint's config is.
            made = QuantizationArgs.model_validate(_MXINT4)
            selector = replace(selector, arguments={**selector.arguments, "quant_config": made})
        key = selector.function, repr(selector.config)
        groups.setdefault(key, (selector, []))[1].append(place)
    return list(groups.values()), unasked


def _ways() -> dict[str, tuple[tuple[str, ...], dict[str, Any]]]:
    """Return what a server is told, by name: switches, and the config's fields that they set."""
    shared = {
        name: (switches, {"moe_parallel_config": parallel})
        for name, (switches, parallel) in all_placements().items()
    }
    return shared | {n: ((f"--moe-backend {n}",), {"moe_backend": n}) for n in _BACKENDS}


def _outcomes(groups: _Groups, changes: Mapping[str, Any]) -> list[Any]:
    """Return for each group the class that is taken, or None if all are rejected.

    Args:
        changes: Fields of the layer's config that are not those of a server by default.
    """
    found: list[Any] = [None] * len(groups)
    asked = {}
    for place, (selector, _) in enumerate(groups):
        with suppress(Rejected), rejections():
            asked[place] = selector, replace(selector.config, **changes)
    for place, (_, experts) in zip(asked, outcomes(asked.values(), ()), strict=True):
        found[place] = experts if isinstance(experts, type) else None
    return found


def _rows(about: Mapping[str, str], found: Sequence[Any], groups: _Groups) -> list[Any]:
    cases: dict[Any, list[int]] = {}
    for experts, (_, places) in zip(found, groups, strict=True):
        if experts is not None:
            cases.setdefault(experts.__name__, []).extend(places)
    return [{**about, "experts": name, "cases": places} for name, places in cases.items()]


def _subclasses(cls: Any) -> Iterator[Any]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


def _all_classes() -> Iterator[Any]:
    for key in ("monolithic-experts", "modular-experts"):
        yield from _subclasses(names().get(key)) if names().has(key) else ()


def _routing_classes(scheme: str, flashinfer: set[Any]) -> list[Any]:
    """Return the other monolithic classes that this GPU runs, and that have the scheme."""
    key = "monolithic-experts"
    weight, activation = quant_keys((SCHEMES | ELSEWHERE)[scheme])
    found = dict.fromkeys(_subclasses(names().get(key)) if names().has(key) else ())
    return [
        cls
        for cls in found
        if cls not in flashinfer
        and cls._supports_current_device()
        and any(cls._supports_quant_scheme(weight, each) for each in (activation, None))
    ]


def _rejecting(cls: Any, selector: Selector, ask: Callable[[], None]) -> Any:
    """Return the gate of a class that rejects a layer; None if none does.

    Classes may be asked more than once, for other quantization keys.
    """
    said_no = []

    def watched(gate: Any) -> Any:
        def ask(*args: Any, **kwargs: Any) -> Any:
            answer = gate(*args, **kwargs)
            if not answer:
                said_no.append(gate)
            return answer

        return staticmethod(ask)

    gates = {name: gate for _, name, _ in (*GATES, _ADAPTERS) if (gate := getattr(cls, name, None))}
    with ExitStack() as stack:
        for name, gate in gates.items():
            stack.enter_context(patch.object(cls, name, watched(gate)))
        ask()
    own = [gate for gate in said_no if gate is not gates.get(QUANTIZATION)]
    # A class that needs no gate to say no to what is not gated has such a gate all the same.
    is_gated = selector.config.is_act_and_mul
    own = [gate for gate in own if not (is_gated and gate is gates.get("_supports_no_act_and_mul"))]
    return (own or said_no or [None])[-1]


def _router(cls: Any, selector: Selector, scheme: str) -> Any:
    """Return which routing methods monolithic experts accept, and what they compute of each."""
    gate = getattr(cls, _ROUTING)
    row = (SCHEMES | ELSEWHERE)[scheme]
    keys = dict(zip(("weight_key", "activation_key"), quant_keys(row), strict=True))
    methods = {}
    for name, method in names().get("methods").__members__.items():
        given = {**keys, "routing_method": method, "routing_method_type": method}
        is_accepted = bool(gate(**accepted(gate, given)))
        config = replace(selector.config, routing_method=method)
        try:
            calls, unknown = _calls(cls, config, quant_config(row, config.num_experts)), ""
        except Unsupported as reason:
            calls, unknown = [], str(reason)
        methods[name] = {"accepted": is_accepted, "calls": calls, "unknown": unknown}
    config = selector.config
    about = {"experts": cls.__name__, "num_experts": config.num_experts}
    about["top_k"] = config.experts_per_token
    rule = rule_of(gate)
    return {**about, "gate": rule["name"], "source": rule["source"], "methods": methods}


def _calls(cls: Any, config: Any, quantization: Any) -> list[dict[str, Any]]:
    """Return what each call that chooses experts computes: for each dtype and way to call, once.

    Raises:
        Unsupported: The experts end otherwise than in a call that chooses.
    """
    found = []
    module = sys.modules[cls.__module__]
    settings = [{n: v} for n, vs in _GENERATIONS.items() if hasattr(module, n) for v in vs]
    ways = product(settings or [{}], (torch.bfloat16, torch.float32), (False, True))
    for setting, dtype, is_mapped in ways:
        with _choosing(), patch.multiple(module, **setting) if setting else nullcontext():
            call = _call(cls(config, quantization), config, dtype, is_mapped)
        if call not in found:
            found.append(call)
    return found


@contextmanager
def _choosing() -> Iterator[None]:
    """Have the functions that choose experts raise their call."""
    modules: dict[str, ModuleType] = {}
    for (path, name), function in _CHOOSING.items():
        for each in (path.partition(".")[0], path):
            modules.setdefault(each, ModuleType(each))
        setattr(modules[path], name, function)
    with patch.dict(sys.modules, modules):
        yield


def _call(experts: Any, config: Any, dtype: torch.dtype, is_mapped: bool) -> dict[str, Any]:
    count = config.num_experts
    # Distinct in both dtypes, and in no order.
    logits = (torch.arange(2 * count).mul(37).remainder(2 * count).reshape(2, count) / 64).to(dtype)
    given = {
        "hidden_states": torch.ones(2, config.hidden_dim, dtype=torch.bfloat16),
        "w1": torch.ones(count, 1, 1),
        "w2": torch.ones(count, 1, 1),
        "router_logits": logits.clone(),
        "activation": config.activation,
        "global_num_experts": count,
        "expert_map": torch.arange(count, dtype=torch.int32) if is_mapped else None,
        "a1q_scale": None,
        "apply_router_weight_on_input": False,
    }
    try:
        experts.apply(**accepted(experts.apply, given))
    except _Chosen as chosen:
        return _computed(chosen, logits)
    except Exception as error:
        # Whatever vLLM's code raises.
        raise Unsupported(f"not judged: {type(experts).__name__}: {refusal(error)}") from error
    raise Unsupported(f"not judged: {type(experts).__name__} calls nothing that chooses experts")


def _computed(chosen: _Chosen, logits: Tensor) -> dict[str, Any]:
    """Return the recipe of a call that chooses experts, and to what scores are rounded for it.

    Raises:
        Unsupported: It chooses by something that is not known.
    """
    given = chosen.logits.double()
    scores = {"identity": logits.double(), "softmax": torch.softmax(logits.double(), -1)}
    # Three digits: a softmax may be rounded to bfloat16.
    near = (n for n, s in scores.items() if s.shape == given.shape and _alike(s, given))
    score = next(near, None)
    if score is None or (chosen.first and score == "softmax"):
        raise Unsupported("not judged: experts are chosen by something other than the logits")
    score = "softmax" if chosen.first else score
    dtype = str(chosen.logits.dtype).removeprefix("torch.")
    return {
        "score": score,
        "normalize": "softmax" if chosen.after else "none",
        "top_k": chosen.top_k,
        "rounded": dtype if score == "softmax" and dtype != "float32" else "",
    }


def _alike(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-2, atol=0.0)
