"""A layer of SGLang's as loading a checkpoint would have made it, as far as `apply` reads it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.sglang.probe.world import EP_RANK, EP_SIZE

#: Arguments of the kernel that SGLang computes from a layer's config while it loads weights.
_ACTIVATION = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
#: Methods whose weights SGLang's own code prepares here from beginning to end.
_WHOLE = ("method-mxfp4", "method-mxfp4-experts")


class _Prepared(Exception):
    """All that depends on the layer's config is computed; weights would follow."""


class _Dispatcher:
    """Dispatch where nothing is sent: every rank has all tokens."""

    moe_ep_size, moe_ep_rank = EP_SIZE, EP_RANK
    local_expert_mapping = None
    #: Whether what prepares a layer ends where it would shuffle weights.
    ends_preparation = False

    def __init__(self, names: Names) -> None:
        self._output = names.get("dispatch-output")

    def dispatch(self, hidden_states: Tensor, topk_output: Any, **_: Any) -> Any:
        return self._output(
            hidden_states=hidden_states, hidden_states_scale=None, topk_output=topk_output
        )

    def combine(self, combine_input: Any, **_: Any) -> Any:
        return combine_input.hidden_states

    def set_quant_config(self, _config: Any) -> None:
        """Stop what prepares a layer, if it is to end here: before it shuffles weights."""
        if self.ends_preparation:
            raise _Prepared


def stand_in_weights(names: Names, layer: Any) -> list[str]:
    """Prepare a layer, with scales of 1 and no weights.

    Returns the arguments of the kernel's call whose values are none of SGLang's, as SGLang's own
    code that computes them does not run here.
    """
    layer.dispatcher = _Dispatcher(names)
    layer.trtllm_padded_hidden_size = None
    for name in _ACTIVATION:
        setattr(layer, f"_flashinfer_trtllm_{name}", None)
    scheme = None if layer.quant_config is None else layer.quant_config.get_name()
    is_prepared = _prepare(names, layer, scheme)
    for name in _ACTIVATION:
        # A vector of its own rather than a parameter: those are zeroed.
        if name in layer._parameters:
            setattr(layer, name, layer._parameters.pop(name).data)
    scalars = ("g1_scale_c", "g1_alphas", "g2_alphas", "w13_input_scale_quant", "w13_input_scale")
    scales = ("output1_scales_scalar", "output1_scales_gate_scalar", "output2_scales_scalar")
    for name in (*scalars, *scales):
        layer._parameters.pop(name, None)
        setattr(layer, name, torch.ones(1))
    if scheme == "modelopt_fp4":
        # Releases that shuffle weights into tensors of their own know the runner by them.
        for name in ("gemm1_weights", "gemm2_weights", "gemm1_scales", "gemm2_scales"):
            setattr(layer, f"{name}_fp4_shuffled", torch.zeros(1, dtype=torch.uint8))
    return [] if is_prepared else [*_ACTIVATION]


def _prepare(names: Names, layer: Any, scheme: str | None) -> bool:
    """Run what computes the activation's parameters; return whether it did not fail."""
    method = layer.quant_method
    if type(method).__name__ in [names.spelling(key).path for key in _WHOLE if names.has(key)]:
        method.process_weights_after_loading(layer)
        return True
    if scheme in ("fp8", "mxfp8") and names.has("prepare-fp8"):
        names.get("prepare-fp8")(layer.quant_method, layer)
    if scheme != "modelopt_fp4":
        # No other method of the TRT-LLM runner has such parameters.
        return True
    for name, scale in layer.named_parameters():
        if "scale" in name:
            scale.data.fill_(1)
    layer.dispatcher.ends_preparation = True
    try:
        names.get("prepare-fp4")(layer.quant_method, layer)
    except _Prepared:
        return True
    except Exception:
        # It runs on a GPU, in some releases.
        return False
    return False
