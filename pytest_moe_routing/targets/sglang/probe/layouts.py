"""Loads marked weights into a layer of SGLang's, and says how its kernel is given them.

SGLang's own code loads them, prepares them and hands them over; what it calls of FlashInfer is in
`flashinfer.preparation`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer.given import given_experts
from pytest_moe_routing.targets import marked_weights
from pytest_moe_routing.targets.given_weights import orders_of_given, scales_of
from pytest_moe_routing.targets.marked_checkpoint import MATRICES, MarkedCheckpoint
from pytest_moe_routing.targets.recorder import factors_of, input_scale
from pytest_moe_routing.targets.sglang.probe.device import BLACKWELL
from pytest_moe_routing.targets.sglang.probe.handed_over import router
from pytest_moe_routing.targets.sglang.probe.other_ways import Blocks, Told, accepted, unjudged
from pytest_moe_routing.targets.sglang.probe.raised import verdict_on
from pytest_moe_routing.targets.sglang.probe.ranks import RANKS, splitting
from pytest_moe_routing.targets.sglang.probe.requests import (
    INNER,
    MARKED,
    PREPARES,
    TOKENS,
    Own,
    requesting,
)
from pytest_moe_routing.targets.shares import Share, split_orders, whole_blocks

#: The config class of checkpoints that have the weights of all experts in one tensor. The code of
#: models whose checkpoints have not may make one as well, such as that of Kimi-K3.
_WHOLE = "config-mxfp4"
#: What makes a layer.
_MAKER = "sglang/srt/layers/moe/fused_moe_triton/layer.py FusedMoE"
#: The intermediate size of experts that are laid out: code that takes one dimension of a matrix for
#: another gives another result with it, as gate and up rows together are as many as no other is.
_WIDTH = 768
#: Parameters whose scales of gate and up rows, or of their inputs, SGLang assumes to be equal.
#: `_load_single_value` in `fused_moe_triton/layer.py` says so of inputs;
#: `compressed_tensors_w4a4_nvfp4_moe.py` takes the scales of gate rows, and warns that "accuracy
#: may be affected" if others differ.
_TIED = ("w13_input_scale", "w13_weight_global_scale")
#: The same of ModelOpt's, but for TRT-LLM's kernels of releases that keep both: "single-alpha
#: backends" have that of the gate (`_compute_gemm1_alphas` in `modelopt_quant.py`).
_TIED_OF_GATES = "w13_weight_scale_2"
#: Part of the names of parameters that no checkpoint has: they are made of others.
_DERIVED = "swizzled"


def layouts(
    blocks: Blocks,
    *,
    stored: str = "",
    options: Mapping[str, str] = MappingProxyType({}),
    **question: Any,
) -> dict[str, Any]:
    """Return what lies otherwise than the kernel reads it, given the arguments of `capture`.

    Args:
        stored, options: Those of a way to a kernel that is not TRT-LLM's.

    Returns:
        `function`, the entry point; `method`, the code that prepares the weights; and `orders`, see
        `marked_weights.orders`.

    Raises:
        Unsupported: The weights cannot be loaded, prepared or traced.
    """
    blocks.names.require("layouts", question["scheme"])
    loaded = _Loaded(_tied(blocks, stored), is_whole=_is_whole(question))
    calls = blocks.calls
    with requesting(**_requests(blocks, loaded, _WIDTH), **options):
        answer = blocks.capture(**_with_width(question, _WIDTH))
    if answer["failed"] or len(calls) != 1:
        raise Unsupported(answer["failed"] or answer["refused"] or "no kernel is called")
    ((function, arguments),) = calls
    entry, checkpoint = given_experts(function), loaded.checkpoint.as_given(arguments)
    marked = arguments, checkpoint
    if entry is None:
        found = marked_weights.orders(question["scheme"], *marked, gated=loaded.is_gated)
        factors = factors_of(arguments, checkpoint.halves_apart())
    else:
        found = orders_of_given(entry, stored, *marked, gated=loaded.is_gated)
        factors = {"scales": scales_of(entry, stored, arguments), **input_scale()}
    return {"function": function, "method": loaded.method, "orders": found, **factors}


def other_layouts(blocks: Blocks, *, told: Told, **question: Any) -> list[dict[str, Any]]:
    """Return the same of kernels that are not TRT-LLM's, with the `device` and the `switches`.

    A way on which the weights cannot be traced, or that is not asked about, has `unanswered`, the
    reason.
    """
    found, empty = list[dict[str, Any]](), {"function": "", "method": "", "orders": []}
    for way, switches in accepted(blocks, told):
        stored, options = way["stored"], way["options"]
        answer: dict[str, Any] = {}
        try:
            answer = layouts(
                blocks, stored=stored, options=options, runner=way["runner"], **question
            )
        except Unsupported as reason:
            answer = {**empty, "unanswered": str(reason)}
        found.append({**answer, "device": way["device"], "switches": switches})
    for flags in unjudged(blocks, told, **question):
        text = f"not judged: what the kernels of {' '.join(flags)} are given"
        found.append({**empty, "unanswered": text, "device": BLACKWELL, "switches": flags})
    return found


def split_layouts(blocks: Blocks, count: int, whole: int, **question: Any) -> list[dict[str, Any]]:
    """Return what a rank's kernel is given of split experts, given the arguments of `capture`.

    Args:
        count: The ranks over which each expert is split.
        whole: The intermediate size of the experts.

    Returns:
        See `targets.layouts.SplitAnswer`.

    Raises:
        Unsupported: The weights cannot be loaded, prepared or traced.
    """
    blocks.names.require("layouts", question["scheme"])
    if _is_whole(question):
        raise Unsupported("not judged: how checkpoints of gpt-oss are split")
    share, calls = Share(count, whole), blocks.calls
    loaded = _Loaded(_tied(blocks), share)
    reason, raised_in = "", ""
    try:
        with requesting(**_requests(blocks, loaded, whole)), splitting(count):
            answer = blocks.capture(**_with_width(question, whole))
        if not answer["by_choice"]:
            reason = answer["failed"] or answer["refused"] or ""
            raised_in = answer.get("raised_in", "")
    except Unsupported:
        # A block that is not whole has no answer; what preparing its layer raised is known.
        if loaded.raised is None:
            raise
    if isinstance(loaded.raised, Unsupported):
        raise loaded.raised
    if loaded.raised is not None:
        kind, reason, raised_in = verdict_on(loaded.raised, is_built=False)
        if kind == "unknown":
            raise Unsupported(reason)
    if raised_in:
        # If it is raised without ranks as well, splitting is not the reason.
        layouts(blocks, **question)
        kind, _, message = reason.partition(": ")
        raised = {"type": kind, "message": message, "where": "", "code": raised_in}
        is_refused = not loaded.method
        method = loaded.method or _MAKER
        return [{"method": method, "raised": raised, "is_refused": is_refused}]
    if len(calls) != 1:
        raise Unsupported(reason or "no kernel is called")
    ((function, arguments),) = calls
    if given_experts(function) is not None:
        raise Unsupported(f"not judged: how experts of {function} are split")
    found = split_orders(
        question["scheme"], arguments, loaded.checkpoint, share, gated=loaded.is_gated
    )
    return [{"method": loaded.method, "function": function, **found}]


def _is_whole(question: Mapping[str, Any]) -> bool:
    """Return whether the checkpoint has the weights of all experts in one tensor."""
    quantization = question["quantization"]
    return quantization is not None and quantization["name"] == _WHOLE


def _tied(blocks: Blocks, stored: str = "") -> tuple[str, ...]:
    """Return the parameters of gate and up rows whose scales SGLang assumes to be equal.

    Args:
        stored: What the call of a kernel that is not TRT-LLM's is stored as.
    """
    are_apart = blocks.names.has("halves-fp4") and not stored
    return _TIED if are_apart else (*_TIED, _TIED_OF_GATES)


def _requests(blocks: Blocks, loaded: _Loaded, width: int) -> dict[str, Any]:
    """Return what a block is built and run with, so that experts of a width load marked weights."""
    return {
        PREPARES: loaded,
        TOKENS: marked_weights.TOKENS,
        MARKED: Own(blocks.names),
        INNER: width,
        "router": router(blocks.names, []),
    }


def _with_width(question: Mapping[str, Any], width: int) -> dict[str, Any]:
    """Return the arguments of `capture` with another intermediate size of the experts."""
    config = {name: _with_whole(name, value, width) for name, value in question["config"].items()}
    return {**question, "config": config}


def _with_whole(name: str, value: Any, whole: int) -> Any:
    """Return an attribute of a config, with another size for the experts."""
    if "intermediate" not in name and name != "share_expert_dim":
        return value
    return [whole] * len(value) if isinstance(value, list) else whole


class _Loaded:
    """Loads a layer as a checkpoint's loader does, and prepares it as SGLang does then.

    Args:
        tied: Parameters whose scales of both halves are equal.
        share: How its experts are split, if they are.
        is_whole: Whether the checkpoint has the weights of all experts in one tensor.

    Attributes:
        raised: What SGLang's code raised meanwhile.
    """

    def __init__(
        self, tied: Collection[str], share: Share | None = None, *, is_whole: bool = False
    ) -> None:
        self.checkpoint, self.is_gated, self.method = MarkedCheckpoint(), True, ""
        self._share, self._tied, self._is_whole = share, tied, is_whole
        self.raised: Exception | None = None

    def __call__(self, layer: Any) -> None:
        try:
            self._prepare(layer)
        except Exception as error:
            self.raised = error
            raise

    def _prepare(self, layer: Any) -> None:
        self.is_gated = bool(layer.moe_runner_config.is_gated)
        for name, parameter in [*layer._parameters.items()]:
            if isinstance(parameter, Tensor):
                self._load(layer, name, parameter)
        method = layer.quant_method
        scheme = getattr(layer, "scheme", None)
        kind = type(method if scheme is None else scheme)
        self.method = f"{kind.__module__.replace('.', '/')}.py {kind.__name__}"
        method.process_weights_after_loading(layer)
        for registered in (layer._parameters, layer._buffers):
            for name, value in [*registered.items()]:
                # Tensors of their own rather than parameters or buffers: those are zeroed.
                if isinstance(value, Tensor):
                    del registered[name]
                    setattr(layer, name, value.data)

    def _load(self, layer: Any, name: str, parameter: Any) -> None:
        data = parameter.data
        if self._is_whole and (data.ndim == 3 or "bias" in name):
            self._load_whole(layer, name, parameter)
            return
        is_first = name.startswith("w13")
        parts = ("w1", "w3") if is_first and self.is_gated else ("w1",) if is_first else ("w2",)
        if "scale" in name and data.ndim in (1, 2) and data.numel():
            self._load_factors(layer, name, parameter, parts)
            return
        if data.ndim != 3 or "bias" in name or (self._share and _DERIVED in name):
            data.copy_(torch.ones_like(data))
            return
        rows = data.shape[1] // len(parts)
        if is_first and not self.is_gated:
            # Some releases have room for a gate that such experts do not have.
            room = layer.w13_weight.shape[1] // layer.intermediate_size_per_partition
            if self._share is not None and room > 1:
                raise Unsupported("not judged: how weights with room for a gate are split")
            rows //= room
        for part in parts:
            like = data[0, :rows] if self._share is None else self._of_checkpoint(layer, name)
            made = self.checkpoint.make(name, part, len(data), like)
            _load_part(layer, name, parameter, part, made)

    def _load_factors(self, layer: Any, name: str, parameter: Any, parts: tuple[str, ...]) -> None:
        """Load the scales of whole tensors."""
        are_apart = len(parts) == parameter.ndim == 2 and name not in self._tied
        for part in parts:
            made = self.checkpoint.make_factors(name, part, len(parameter), are_apart=are_apart)
            _load_part(layer, name, parameter, part, made)

    def _of_checkpoint(self, layer: Any, name: str) -> Tensor:
        """Return a tensor of the shape and dtype of a part of a parameter, of all ranks."""
        assert self._share is not None
        data, is_first = layer._parameters[name].data, name.startswith("w13")
        other = name.replace(*("w13", "w2") if is_first else ("w2", "w13"))
        # The other parameter of its kind has the same blocks along the hidden size.
        blocks = Fraction(layer._parameters[other].shape[1 if is_first else 2], layer.hidden_size)
        inner = whole_blocks(self._share.whole * blocks)
        shape = (inner, data.shape[2]) if is_first else (data.shape[1], inner)
        return data.new_empty(shape)

    def _load_whole(self, layer: Any, name: str, parameter: Any) -> None:
        """Load all experts at once, gate and up rows alternating as in gpt-oss' checkpoints."""
        data = parameter.data
        parts = ("w1", "w3") if name.startswith("w13") else ("w2",)
        like = data[0, : data.shape[1] // len(parts)]
        made = [torch.stack(self.checkpoint.make(name, part, len(data), like)) for part in parts]
        whole = torch.stack(made, 2).flatten(1, 2)
        layer.weight_loader(
            parameter, whole, weight_name=f"experts.{name}", shard_id=None, expert_id=None
        )


def _load_part(layer: Any, name: str, parameter: Any, part: str, tensors: Sequence[Tensor]) -> None:
    """Load a part of a parameter of each expert, as a checkpoint numbers the experts."""
    routed = len(tensors) - layer.num_fused_shared_experts
    # Experts lie in order, and each rank has as many. Of inputs, it may have the scales of all.
    first = (RANKS.count - 1) * routed if len(tensors) < layer.num_experts else 0
    numbered = [*enumerate(tensors, first)]
    # A loader is given those of other ranks as well, and skips them.
    numbered += [(0, tensors[-1])] if first else []
    kind = name.partition("_")[2]
    names = [MATRICES[each] for each in ("w1", "w2", "w3")]
    mapping = layer.make_expert_params_mapping(*names, layer.num_experts)
    places = {weight: (f"{start}{kind}", shard, number) for start, weight, number, shard in mapping}
    for expert, tensor in numbered:
        # As the models' loaders find the place of a weight.
        place, shard, number = places[f"experts.{expert}.{MATRICES[part]}."]
        if place != f"experts.{name}":
            raise Unsupported(f"not judged: SGLang loads {MATRICES[part]} into {place}")
        layer.weight_loader(parameter, tensor, place, shard, number)
