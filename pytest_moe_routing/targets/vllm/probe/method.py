"""What stands for a layer's quantization method, and the experts that vLLM's code makes with it."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.targets import scales
from pytest_moe_routing.targets.vllm.probe.experts import ServedScheme
from pytest_moe_routing.targets.vllm.probe.release import names

#: The member of a method that makes the quantization config of its experts.
_MAKES_CONFIG = "get_fused_moe_quant_config"
#: Those of a tile of block scales.
_ROWS = 128
#: Rows of the contract about methods for the checkpoints of gpt-oss alone, which take no other.
_GPT_OSS = "gpt-oss"


#: Rows of the contract: what a layer has as its backend when TRT-LLM's experts are chosen for it.
_OF_TRTLLM: Mapping[str, str] = {
    "unquantized_backend": "chosen-unquantized",
    "fp8_backend": "chosen-fp8",
    "mxfp8_backend": "chosen-fp8",
    "nvfp4_backend": "chosen-nvfp4",
    "mxfp4_backend": "chosen-mxfp4",
    "wna16_backend": "chosen-mxint4",
}


class Caller:
    """What the layer's method is a method of: whatever the method reads from itself.

    The attributes are those that a method of these experts has in the scheme's checkpoints.

    Args:
        kernel: vLLM's kernel around the experts, if they are made already.
        config: vLLM's config of the layer.
        backend: What vLLM's selector has chosen for the layer; None if that is TRT-LLM's.
    """

    def __init__(
        self,
        kernel: Any,
        row: ServedScheme,
        config: Any,
        *,
        is_monolithic: bool = True,
        backend: Any = None,
    ) -> None:
        self.moe_kernel = kernel
        self.moe = config
        self.is_monolithic = is_monolithic
        self._backend = backend
        block = row.quantization[2]
        self.block_quant = block is not None
        self.weight_block_size = list(block) if block else None
        self.moe_block_shape = self.weight_block_size
        self.weight_scale_name = "weight_scale_inv" if block else "weight_scale"
        # In compressed-tensors: of blocks, tokens are quantized when they come.
        self.input_quant = SimpleNamespace(strategy="group" if block else "tensor")
        self.num_bits, self.group_size = 4, block[1] if block else 0
        self.per_act_token_quant = self.use_a16 = False

    def __getattr__(self, name: str) -> Any:
        """Return the layer's backend, which each method has under a name of its own."""
        if name not in _OF_TRTLLM:
            raise AttributeError(name)
        return self._backend or names().get(_OF_TRTLLM[name])

    def forward(self, **arguments: Any) -> Any:
        """Run what a custom operator of vLLM runs on CUDA: only the unquantized method is one."""
        return names().get("runs-unquantized.forward_cuda")(self, **arguments)

    def forward_native(self, *arguments: Any) -> Any:
        return names().get("runs-unquantized.forward_native")(self, *arguments)


def methods_of(keys: Iterable[str], model: Mapping[str, Any]) -> list[Any]:
    """Return the methods of a model's layers that call experts, as functions."""
    found: list[Any] = []
    own: list[Any] = []
    for key in keys:
        for member in names().contract.members(key):
            if not member.key.endswith(_MAKES_CONFIG) and names().has(member.key):
                (own if _GPT_OSS in key else found).append(names().get(member.key))
                break
    return own if own and model["architecture"].startswith("GptOss") else found


def class_of(method: Any) -> Any:
    """Return the class in which a method is defined, of the plain function that it is here."""
    return getattr(sys.modules[method.__module__], method.__qualname__.partition(".")[0])


def experts_made(experts: Any, method: Any, asked: Caller, layer: Any) -> Any:
    """Return a layer's experts, with the quantization config that its method makes for them.

    Args:
        experts: A class of vLLM.
        method: A method that calls the experts, as a function.
        asked: What the method is a method of.
        layer: What the methods of the layer are given.

    Returns:
        None if the method makes no such config: it calls the kernel itself.
    """
    made = class_of(method).get_fused_moe_quant_config(asked, layer)
    if made is None:
        return None
    found = experts(asked.moe, made)
    if names().has("experts-loaded"):
        found.process_weights_after_loading(layer)
    return found


@cache
def loaded(row: ServedScheme, experts: int, has_bias: bool) -> Mapping[str, Tensor | None]:
    """Return the scales and biases of so many experts, by the names that methods read."""
    found: dict[str, Tensor | None] = {}
    for gemm, name in (("1", "w13"), ("2", "w2")):
        each = scales.per_expert(f"w{gemm}_scale", experts)
        if row.block_scales:
            # Some experts read four of them as one number. Where there are whole scales as well,
            # some view them as tiles of 128 rows.
            tile = (1, _ROWS if row.whole_scales else 1, 4)
            blocks = each.to(getattr(torch, row.block_scales)).reshape(-1, 1, 1).repeat(tile)
            found[f"{name}_weight_scale"] = found[f"{name}_weight_scale_inv"] = blocks
        found[f"{name}_input_scale"] = None
        if row.whole_scales:
            found[f"{name}_{row.whole_scales}"] = each
            of_input = scales.per_expert(f"a{gemm}_scale", experts)
            # The largest of all experts; where there are no blocks, it is loaded as one number.
            found[f"{name}_input_scale"] = of_input if row.block_scales else of_input[0]
        if has_bias:
            found[f"{name}_bias"] = each.unsqueeze(1) / 7
    return found
