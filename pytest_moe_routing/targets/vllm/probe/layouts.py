"""Says where marked weights and scales lie in a call of the kernel, loaded and prepared by vLLM."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest.mock import patch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.given import given_experts, refused_on
from pytest_moe_routing.targets import marked_weights
from pytest_moe_routing.targets.given_weights import orders_of_given, scales_of, sizes_of
from pytest_moe_routing.targets.recorder import Reached, factors_of
from pytest_moe_routing.targets.shares import Share, split_orders
from pytest_moe_routing.targets.vllm.probe import factory, server_defaults
from pytest_moe_routing.targets.vllm.probe.capture import on_one_gpu, raised, refusal
from pytest_moe_routing.targets.vllm.probe.choice import on_capability, selector_of
from pytest_moe_routing.targets.vllm.probe.config import NoActivation
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES
from pytest_moe_routing.targets.vllm.probe.forms import Form
from pytest_moe_routing.targets.vllm.probe.gates import ALL, experts_of
from pytest_moe_routing.targets.vllm.probe.hand_overs import called_at, noting
from pytest_moe_routing.targets.vllm.probe.layer import HIDDEN, INTERMEDIATE
from pytest_moe_routing.targets.vllm.probe.loaded import LoadedLayer, surroundings
from pytest_moe_routing.targets.vllm.probe.method import class_of, methods_of
from pytest_moe_routing.targets.vllm.probe.other_experts import (
    CAPABILITIES,
    Kind,
    kinds_of,
    needs,
    taken_as,
)
from pytest_moe_routing.targets.vllm.probe.padded import unlike_unpadded
from pytest_moe_routing.targets.vllm.probe.ranks import Ranks, shared_out_to
from pytest_moe_routing.targets.vllm.probe.release import names

#: Sizes that methods pad, and what pads them, by key of the contract; others raise, or take them.
_PADDED = (384, 160)
_PADS = {
    "fp8_per_tensor": "pads-fp8",
    "mxfp8": "pads-mxfp8",
    "nvfp4": "pads-fp4",
    "mxfp4": "pads-mxfp4",
}
#: The least that all kernels take.
_HIDDEN_OF_SPLIT = 256
_FLAG = "--moe-backend "
#: Models whose own code loads gate and up rows that alternate (`_load_packed_expert` in vLLM's
#: models/gpt_oss.py), which is not run here.
_ALTERNATING = "GptOss"
#: Schemes whose published checkpoints have all experts in one tensor, or both rows of one.
_STACKED = ("bf16", "fp8_block")
#: What checks raise.
_DELIBERATE = (AssertionError, NotImplementedError, ValueError)
#: Experts of a layer, for what does not depend on their number.
_EXPERTS, _TOP_K, _GROUPS = 8, 2, 2


@dataclass(frozen=True)
class _Loading:
    """How a layer is made and loaded, whose experts are whole.

    Attributes:
        sizes: The hidden and the intermediate size of its checkpoint.
        ranks: Where it runs.
        larger: The half of gated experts whose input has the larger scales.
        backend: What `--moe-backend` says; None for what takes TRT-LLM's experts.
        form: What the tensors of its checkpoint hold.
    """

    sizes: tuple[int, int]
    ranks: Ranks = Ranks()  # noqa: RUF009
    larger: str = "w1"
    backend: str | None = None
    form: Form = Form.MATRIX


def split_layouts(
    model: Mapping[str, Any], scheme: str, count: int, whole: int
) -> list[dict[str, Any]]:
    """Return what a rank's kernel is given of split experts, for each method of a checkpoint.

    Args:
        count: The ranks over which each expert is split.
        whole: The intermediate size of the experts.

    Returns:
        See `targets.layouts.SplitAnswer`.

    Raises:
        Unsupported: The weights cannot be traced, or not split here.
    """
    names().require("layouts", scheme)
    if not factory.is_run(model):
        raise Unsupported(f"not judged: what makes a layer of vLLM {names().version} is not run")
    row = SCHEMES[scheme]
    callers = methods_of(row.methods, model) or methods_of(row.modular_methods, model)
    few, share = _with_few_experts(model, _EXPERTS // 2), Share(count, whole)
    return [_split(few, scheme, class_of(caller), share) for caller in callers]


def _split(model: Mapping[str, Any], scheme: str, method: Any, share: Share) -> dict[str, Any]:
    place, ranks, layer = _place(method), Ranks(share.count, split=True), None
    with surroundings(), on_one_gpu():
        try:
            layer = LoadedLayer(model, scheme, method, (_HIDDEN_OF_SPLIT, share.whole), ranks)
            layer.load()
            call = layer.call()
        except Unsupported:
            raise
        except Exception as error:
            if not isinstance(error, _DELIBERATE):
                # If it is raised without ranks as well, splitting is not the reason.
                _prepared(model, scheme, method, _Loading((_HIDDEN_OF_SPLIT, _HIDDEN_OF_SPLIT)))
            return {"method": place, "raised": raised(error), "is_refused": layer is None}
    _require_experts(scheme, layer, place, modular=not layer.method.is_monolithic)
    gated = model["experts"]["gated"]
    found = split_orders(scheme, call.arguments, layer.checkpoint, share, gated=gated)
    return {"method": place, "function": call.function, **found}


def _prepared(
    model: Mapping[str, Any], scheme: str, method: Any, loading: _Loading
) -> tuple[LoadedLayer, Reached]:
    """Return a layer whose experts are whole, and its call of a kernel.

    Raises:
        Unsupported: vLLM's code raises something.
    """
    try:
        sizes, ranks, backend, form = loading.sizes, loading.ranks, loading.backend, loading.form
        layer = LoadedLayer(model, scheme, method, sizes, ranks, backend=backend, form=form)
        layer.checkpoint.larger = loading.larger
        layer.load()
        return layer, layer.call()
    except Unsupported:
        raise
    except Exception as error:
        # Whatever vLLM's code raises: another reason than the weights cannot be excluded.
        raise Unsupported(
            f"not judged: {_place(method)} of vLLM {names().version} prepares no weights here: "
            f"{refusal(error)}"
        ) from error


def _require_experts(scheme: str, layer: LoadedLayer, place: str, *, modular: bool) -> None:
    """Raise `Unsupported` if a layer has other experts than the scheme's own."""
    experts, taken = experts_of(SCHEMES[scheme], modular=modular), layer.method.experts_cls
    if taken is not experts:
        raise Unsupported(f"not judged: {place} takes {taken.__name__}, not {experts.__name__}")


def layouts(model: Mapping[str, Any], scheme: str, modular: bool = False) -> list[dict[str, Any]]:
    """Return what lies otherwise than the kernel reads it, for each method of a checkpoint.

    Args:
        modular: In the experts that are given ids and weights, not in those that route.

    Returns:
        See `targets.layouts.LaidOutAnswer`.

    Raises:
        Unsupported: The weights cannot be loaded, prepared or traced.
    """
    names().require("modular" if modular else "verdicts", scheme)
    if not factory.is_run(model):
        raise Unsupported(f"not judged: what makes a layer of vLLM {names().version} is not run")
    names().require("layouts", scheme)
    row = SCHEMES[scheme]
    callers = methods_of(row.modular_methods if modular else row.methods, model)
    if not callers:
        raise Unsupported("no layer of this release calls such experts")
    few = _with_few_experts(model)
    # Unequal even if the model's are equal: most models of its kind have others.
    loadings = [_Loading((HIDDEN, INTERMEDIATE))]
    if scheme in _PADS and names().has(_PADS[scheme]):
        # Either half has the larger scales of inputs once: code that drops one of them shows.
        loadings.append(_Loading(_PADDED, larger="w3"))
    shared = _with_few_experts(model, 2 * _EXPERTS)
    count = shared_out_to(shared["router"]["num_experts"])
    found: list[dict[str, Any]] = []
    for method in map(class_of, callers):
        usual = [_laid_out(few, scheme, method, each, modular=modular) for each in loadings]
        if not modular and count > 1:
            loading = _Loading((HIDDEN, INTERMEDIATE), Ranks(count))
            usual.append(_laid_out(shared, scheme, method, loading, modular=modular))
        found += usual
        if not modular:
            found += _in_other_forms(shared, scheme, method, usual[0])
    return found


def _in_other_forms(
    model: Mapping[str, Any], scheme: str, method: Any, usual: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield what lies otherwise if a checkpoint has other tensors than one for each matrix.

    Args:
        usual: The answer about a checkpoint that has those: the same mistakes are not repeated.
    """
    gated = model["experts"]["gated"]
    key = "weight-forms" if gated else "weight-forms-ungated"
    if scheme not in _STACKED or model["experts"]["bias"] or not names().has(key):
        return
    loader = names().spelling("weight-forms")
    source = f"{loader.module.replace('.', '/')}.py"
    ranks = Ranks(shared_out_to(model["router"]["num_experts"]))
    for form in (Form.MERGED, Form.STACKED, Form.TRANSPOSED):
        if form is Form.MERGED and not gated:
            continue
        loading = _Loading((HIDDEN, INTERMEDIATE), ranks, form=form)
        at = f"{source} {loader.path} of a checkpoint with {form.value}"
        try:
            answer = _laid_out(model, scheme, method, loading, modular=False)
        except Unsupported as reason:
            if (error := reason.__cause__) is None:
                raise
            # The same layer was loaded before, of other tensors.
            wrong = [{"raised": raised(error)}]
            yield {"function": usual["function"], "method": at, "orders": [], "padding": wrong}
            continue
        orders = [each for each in answer["orders"] if each not in usual["orders"]]
        yield {**answer, "orders": orders, "padding": [], "method": at}


def _laid_out(
    model: Mapping[str, Any],
    scheme: str,
    method: Any,
    loading: _Loading,
    *,
    modular: bool,
) -> dict[str, Any]:
    place = _place(method)
    padding: list[dict[str, Any]] = []
    run: dict[str, None] = {}
    with surroundings(), on_one_gpu(), _taking(scheme, modular), noting(run):
        layer, call = _prepared(model, scheme, method, loading)
        if loading.sizes == _PADDED:
            padding = unlike_unpadded(layer)
    _require_experts(scheme, layer, place, modular=modular)
    arguments, gated = call.arguments, model["experts"]["gated"]
    checkpoint = layer.checkpoint.as_given(arguments)
    return {
        "function": call.function,
        "method": place,
        "orders": marked_weights.orders(scheme, arguments, checkpoint, gated=gated),
        "columns": marked_weights.columns(arguments),
        "padding": padding,
        "run": [*run, called_at(call)],
        **factors_of(arguments, checkpoint.halves_apart()),
    }


def other_layouts(model: Mapping[str, Any], scheme: str) -> list[dict[str, Any]]:
    """Return the same of experts that call other kernels than TRT-LLM's, where a server takes them.

    Returns:
        See `targets.layouts.LaidOutElsewhere`.

    Raises:
        Unsupported: The weights cannot be loaded, prepared or traced.
    """
    row = SCHEMES.get(scheme)
    if row is None or row.modular is None:
        return []
    for what in ("modular", "layouts"):
        names().require(what, scheme)
    if not factory.is_run(model):
        raise Unsupported(f"not judged: what makes a layer of vLLM {names().version} is not run")
    kinds = kinds_of(scheme)
    if not kinds:
        return []
    try:
        selector = selector_of(model, scheme, factory.classify(model)[0])
    except NoActivation:
        return []
    callers, few, found = methods_of(row.modular_methods, model), _with_few_experts(model), []
    if selector is None:
        raise Unsupported("no selector of this release chooses modular experts for the scheme")
    for (kind, stored), devices in kinds.items():
        ways: list[dict[str, Any]] = []
        for device in devices:
            with on_capability(*CAPABILITIES[device]):
                taken = taken_as(selector, kind, names().get(kind.key), Ranks())
            capability = "{}.{}".format(*CAPABILITIES[device])
            if taken and refused_on(kind.function, stored, capability) is None:
                ways.append({"device": device, "switches": taken[0]})
        if not ways:
            continue
        entry = given_experts(kind.function)
        if entry is not None and entry.group and model["architecture"].startswith(_ALTERNATING):
            gap = f"not judged: rows of gpt-oss as {kind.function} reads them"
            found.append({**ways[0], **_no_answer(kind.function, gap)})
            continue
        # Where sizes are limited, each GPU is asked: they have kernels of their own.
        are_limited = entry is not None and bool(entry.sizes)
        sizes = [(HIDDEN, INTERMEDIATE), *([_PADDED] if are_limited else ())]
        shown: list[Any] = []
        for way in sorted(ways, key=needs)[: None if are_limited else 1]:
            with on_capability(*CAPABILITIES[way["device"]]):
                for caller, size in product(callers, sizes):
                    loading = _Loading(size, backend=_backend(way["switches"]))
                    about = kind, stored, way["device"]
                    answer = _laid_out_elsewhere(few, scheme, class_of(caller), loading, about)
                    # What is the same on another GPU is one mistake.
                    parts = "orders", "scales", "padding"
                    known = answer["method"], *(answer[part] for part in parts)
                    if known in shown:
                        answer |= {"orders": [], "scales": {}, "padding": []}
                    shown.append(known)
                    found.append({**way, **answer})
    return found


def _backend(switches: Sequence[str]) -> str:
    """Return what `--moe-backend` says with some switches."""
    flags = [flag.removeprefix(_FLAG) for flag in switches if flag.startswith(_FLAG)]
    return flags[0] if flags else server_defaults.moe_backend()


def _no_answer(function: str, reason: str) -> dict[str, Any]:
    return {"function": function, "method": "", "orders": [], "unanswered": reason}


def _laid_out_elsewhere(
    model: Mapping[str, Any],
    scheme: str,
    method: Any,
    loading: _Loading,
    about: tuple[Kind, str, str],
) -> dict[str, Any]:
    """Return an answer about a kind, as what it stores the scheme, and the GPU."""
    kind, stored, device = about
    place, experts = _place(method), names().get(kind.key)
    padding: list[dict[str, Any]] = []
    run: dict[str, None] = {}
    with surroundings(), on_one_gpu(), noting(run):
        layer, call = _prepared(model, scheme, method, loading)
        if loading.sizes == _PADDED:
            padding = unlike_unpadded(layer)
    if layer.method.experts_cls is not experts:
        raise Unsupported(f"not judged: {place} takes {layer.method.experts_cls.__name__}")
    entry = given_experts(call.function)
    if entry is None or stored not in entry.orders:
        raise Unsupported(f"not judged: how {call.function} reads {stored}")
    gated = model["experts"]["gated"]
    return {
        "function": call.function,
        "method": place,
        "orders": orders_of_given(entry, stored, call.arguments, layer.checkpoint, gated=gated),
        "scales": scales_of(entry, stored, call.arguments),
        "sizes": sizes_of(entry, call.arguments),
        "capability": "{}.{}".format(*CAPABILITIES[device]),
        "padding": padding,
        "run": [*run, called_at(call)],
    }


def _place(method: Any) -> str:
    return f"{method.__module__.replace('.', '/')}.py {method.__name__}"


@contextmanager
def _taking(scheme: str, modular: bool) -> Iterator[None]:
    """Have vLLM's selector reject the experts that route, if others are asked about."""
    routing = experts_of(SCHEMES[scheme])
    rejects = staticmethod(lambda *_, **__: (False, "others are asked about"))
    with patch.object(routing, ALL, rejects if modular else getattr(routing, ALL)):
        yield


def _with_few_experts(model: Mapping[str, Any], experts: int = _EXPERTS) -> dict[str, Any]:
    """Return a model with fewer experts and groups, and the same kind of router."""
    router = dict(model["router"])
    limits = {
        "num_experts": experts,
        "top_k": _TOP_K,
        "n_group": _GROUPS,
        "topk_group": 1,
    }
    router |= {name: min(router[name], most) for name, most in limits.items() if router[name]}
    return {**model, "router": router}
