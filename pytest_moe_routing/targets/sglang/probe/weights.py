"""A layer of SGLang's as loading a checkpoint would have made it, as far as `apply` reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pytest_moe_routing.targets import scales
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.raised import is_of_stand_ins
from pytest_moe_routing.targets.sglang.probe.ranks import RANKS
from pytest_moe_routing.targets.sglang.probe.requests import PREPARES, requested

#: Arguments of the kernel that SGLang computes from a layer's config while it loads weights.
_ACTIVATION = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
#: Those that it computes from the scales of a checkpoint, in the spellings of FlashInfer.
_SCALARS = tuple(
    name.format(spelling)
    for name in ("output1_{}_scalar", "output1_{}_gate_scalar", "output2_{}_scalar")
    for spelling in ("scale", "scales")
)
#: Attributes of a layer with what comes of a checkpoint's scales.
_OF_SCALES = (
    *("g1_scale_c", "g1_alphas", "g1_alphas_up", "g2_alphas", "w13_input_scale_quant"),
    *("w2_input_scale_quant", "w13_input_scale", "w2_input_scale"),
    *_SCALARS,
)
#: Those of CUTLASS kernels alone.
_OF_CUTLASS = ("fc1_dequant", "fc1_input_dequant", "fc2_quant", "fc2_dequant")
#: Methods whose weights SGLang's own code prepares here from beginning to end.
_WHOLE = ("method-mxfp4", "method-mxfp4-experts", "method-mxfp4-cutlass")
#: Weights, as ModelOpt's and compressed-tensors' checkpoints have them.
_WEIGHTS = ("w13_weight", "w2_weight", "w13_weight_packed", "w2_weight_packed")
#: Rows and columns of weights while they are prepared: nobody reads them.
_SMALL = 32


class Seen(Protocol):
    """What was made while a block was built.

    Attributes:
        made: Its layers of experts.
        topks: Its routers.
    """

    made: list[Any]
    topks: list[Any]


class _Dispatcher:
    """Dispatch where nothing is sent: every rank has all tokens."""

    local_expert_mapping = None
    is_told = False

    def __init__(self, names: Names) -> None:
        self._output = names.get("dispatch-output")
        self.moe_ep_size, self.moe_ep_rank = RANKS.count, RANKS.count - 1

    def dispatch(self, hidden_states: Tensor, topk_output: Any, **_: Any) -> Any:
        return self._output(
            hidden_states=hidden_states, hidden_states_scale=None, topk_output=topk_output
        )

    def combine(self, combine_input: Any, **_: Any) -> Any:
        return combine_input.hidden_states

    def set_quant_config(self, _config: Any) -> None:
        """Note that the activation's parameters are computed: weights follow."""
        self.is_told = True


def stand_in_weights(names: Names, layer: Any) -> list[str]:
    """Prepare a layer, with scales that are recognized and no weights.

    Returns the arguments of the kernel's call whose values are none of SGLang's, as SGLang's own
    code that computes them does not run here.
    """
    _surround(names, layer)
    if (prepare := requested(PREPARES)) is not None:
        prepare(layer)
        return []
    _give(layer)
    loaded = {*layer._parameters}
    unprepared = _prepare(names, layer)
    added = (name for name in [*layer._parameters] if name not in loaded)
    for name in (*_ACTIVATION, *_OF_SCALES, *_OF_CUTLASS, *added):
        # A tensor of its own rather than a parameter or a buffer: those are zeroed.
        for registered in (layer._parameters, layer._buffers):
            if (value := registered.pop(name, None)) is not None:
                setattr(layer, name, value.data)
    if unprepared:
        for name in _OF_SCALES:
            if _held(layer, name) is None:
                setattr(layer, name, torch.ones(1))
    if (prepared := requested("prepared")) is not None:
        prepared(layer)
    return unprepared


def _surround(names: Names, layer: Any) -> None:
    """Give a layer what it has of SGLang's before its weights are loaded."""
    layer.dispatcher = _Dispatcher(names)
    layer.trtllm_padded_hidden_size = None
    for name in _ACTIVATION:
        setattr(layer, f"_flashinfer_trtllm_{name}", None)


def _is_given(name: str) -> bool:
    """Return whether a parameter of a layer of experts is a scale or a bias that it is given."""
    return name.startswith(("w13_", "w2_")) and ("scale" in name or "bias" in name)


def _give(layer: Any) -> None:
    """Give a layer its scales and biases, as a checkpoint would."""
    for name, parameter in layer.named_parameters():
        if not _is_given(name):
            continue
        kind = "a" if "input" in name else "w"
        each = scales.per_expert(
            f"{kind}{1 if name.startswith('w13') else 2}_scale", len(parameter)
        )
        if "bias" in name:
            each = each / 7
        if "global" in name:
            # compressed-tensors divides by its factors.
            each = 1 / each.float()
        parameter.data.copy_(each.view(-1, *[1] * (parameter.ndim - 1)))


def named_of_experts(layer: Any) -> dict[str, Tensor | None]:
    """Return the tensors that a kernel may be given of the experts of a layer."""
    found: dict[str, Tensor | None] = {}
    for gemm, name in (("gemm1", "w13"), ("gemm2", "w2")):
        of_weights = (f"{name}_weight_scale_inv", f"{name}_weight_scale")
        for key, attributes in (
            (f"{gemm} scales", (f"{gemm}_scales_fp4_shuffled", *of_weights)),
            (f"{gemm} bias", (f"{name}_weight_bias", f"{name}_bias")),
        ):
            values = (_held(layer, attribute) for attribute in attributes)
            found[key] = next((value for value in values if value is not None), None)
    return found


def _held(layer: Any, name: str) -> Tensor | None:
    """Return a tensor that a layer holds, as a parameter or not."""
    value = layer._parameters.get(name)
    value = vars(layer).get(name) if value is None else value
    return value if isinstance(value, Tensor) else None


def _prepare(names: Names, layer: Any) -> list[str]:
    """Run what prepares a layer for its kernel; return arguments that it does not compute here."""
    method = layer.quant_method
    scheme = None if layer.quant_config is None else layer.quant_config.get_name()
    if type(method).__name__ in [names.spelling(key).path for key in _WHOLE if names.has(key)]:
        method.process_weights_after_loading(layer)
    elif any("input" in name for name, _ in layer.named_parameters()):
        return _prepare_scales(layer)
    elif scheme in ("fp8", "mxfp8") and names.has("prepare-fp8"):
        names.get("prepare-fp8")(method, layer)
    elif scheme is None and requested("prepared") is not None:
        method.process_weights_after_loading(layer)
    return []


def _prepare_scales(layer: Any) -> list[str]:
    """Run what computes factors of a checkpoint's scales, and the activation's parameters."""
    weights = {n: p for n, p in layer._parameters.items() if n in _WEIGHTS}
    is_packed = any(weight.dtype == torch.uint8 for weight in weights.values())
    if not is_packed:
        # Nobody reads them, and they are quantized again, expert by expert.
        for name, weight in weights.items():
            small = weight.data[:, :: weight.shape[1] // _SMALL, :_SMALL].contiguous()
            layer._parameters[name] = nn.Parameter(small, requires_grad=False)
    try:
        layer.quant_method.process_weights_after_loading(layer)
    except Exception as error:
        # In some releases, or for some runners, it needs a GPU.
        if not is_of_stand_ins(error):
            raise
        computed = "g1_scale_c" if is_packed else "output1_scales_scalar"
        missing = [] if layer.dispatcher.is_told else _ACTIVATION
        for name in ("gemm1_weights", "gemm2_weights", "gemm1_scales", "gemm2_scales"):
            # Releases that shuffle weights into tensors of their own know the runner by them.
            if is_packed and _held(layer, f"{name}_fp4_shuffled") is None:
                setattr(layer, f"{name}_fp4_shuffled", torch.zeros(1, dtype=torch.uint8))
        return [*missing, *((*_SCALARS, "input_scale") if _held(layer, computed) is None else ())]
    finally:
        layer._parameters.update(weights)
    # What is prepared for CUTLASS' kernels has nothing of TRT-LLM's.
    is_for_cutlass = is_packed and _held(layer, "g1_scale_c") is None
    return [*_SCALARS] if is_for_cutlass else []


def fill(block: nn.Module, seen: Seen, values: Mapping[str, Any], size: int) -> None:
    """Zeros, so that all but the experts adds nothing; a bias that shows when it is rounded.

    What widens the experts' output again takes its mean.

    Args:
        size: The width of the layer's output.
    """
    given = {id(p) for layer in seen.made for n, p in layer.named_parameters() if _is_given(n)}
    for tensor in (*block.parameters(), *block.buffers()):
        if id(tensor) not in given:
            tensor.zero_()
    latent = values.get("routed_expert_hidden_size")
    for tensor in block.parameters():
        if latent and tensor.shape == (size, latent):
            tensor.fill_(1 / latent)
    for topk in seen.topks:
        bias = topk.topk_config.correction_bias
        if isinstance(bias, Tensor):
            bias.copy_(recognisable(len(bias)))


def recognisable(*shape: int) -> Tensor:
    """Values all different, also between neighbors in bfloat16."""
    count = torch.Size(shape).numel()
    return (torch.arange(count, dtype=torch.float64) / 7 + 1 / 3).to(torch.float32).reshape(shape)
