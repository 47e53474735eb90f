"""Stand-ins for what lies around the experts in the MoE blocks of models, in every framework.

A block is a framework's own code; its config object, linear layers and activations are these.
Linear layers hold zeros, so that all but the experts adds nothing to a block's output.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import stubs

#: What stands before `Linear` in the names of a framework's parallel linear layers.
KINDS_OF_LINEAR = ("Replicated", "ColumnParallel", "MergedColumnParallel", "RowParallel")


class Config:
    """A config object: what is not in it, it does not have."""

    #: Whose code reads which config, for the error.
    reads: ClassVar[str] = "the code reads {!r} of the model's config"

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(self.reads.format(name))


class ZeroLinear(nn.Module):
    """A linear layer without a bias: zeros of the right shape, in the dtype that was asked for.

    Args:
        output_sizes: Sizes of the parts of a merged layer, or that of a layer.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int = 0,
        *_: Any,
        output_sizes: Any = None,
        params_dtype: torch.dtype | None = None,
        **__: Any,
    ) -> None:
        super().__init__()
        sizes = output_sizes or output_size
        size = sizes if isinstance(sizes, int) else sum(sizes)
        dtype = params_dtype or torch.get_default_dtype()
        self.weight = nn.Parameter(torch.zeros(size, input_size, dtype=dtype))
        self.bias: nn.Parameter | None = None
        self.quant_method = stubs.Stub("quant_method")
        self.input_size, self.output_size = input_size, size

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Any:
        return functional.linear(x.to(self.weight.dtype), self.weight, self.bias), None


class Activation(nn.Module):
    """An activation, or a norm, that changes nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x


class GatedActivation(Activation):
    """An activation that halves the width."""

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        return x[..., : x.shape[-1] // 2]


def first_of(output: Any) -> Any:
    """Return a block's output, also where it hands on more to the next layer."""
    return output[0] if isinstance(output, tuple) else output


def factor_of(output: Any) -> float | None:
    """Return by what a block multiplies its experts' output of ones; None if by no one number."""
    first = output.flatten()[0] if isinstance(output, Tensor) else 0.0
    is_number = first and bool((output == first).all())
    return float(first) if is_number else None


def is_loaded(tensor: Tensor, block: nn.Module, router: nn.Module | None = None) -> bool:
    """Return whether a tensor that a router reads is one that the weights of a checkpoint fill.

    Loading copies weights into the block's parameters and buffers, so it must share the memory of
    one. A copy that was made when the block was built keeps what it was made of.

    Args:
        router: The module that reads the tensor; what only this module has is no parameter of the
            model.
    """
    inner = set() if router is None else {id(module) for module in router.modules()}
    filled = {
        each.untyped_storage()._cdata
        for module in block.modules()
        if id(module) not in inner
        for each in (*module._parameters.values(), *module._buffers.values())
        if each is not None
    }
    return tensor.untyped_storage()._cdata in filled


def loaded_dtype(tensor: Tensor, block: nn.Module) -> torch.dtype:
    """Return the dtype that a tensor's weights have on their way from a checkpoint in float32.

    It is the tensor's own, unless the loader that the block gives to its parameter rounds them.

    Raises:
        Unsupported: The loader makes something else of them.
    """
    memory = tensor.untyped_storage()._cdata
    for parameter in block.parameters():
        loader = getattr(parameter, "weight_loader", None)
        is_read = parameter.untyped_storage()._cdata == memory
        if loader is None or not is_read or parameter.dtype != torch.float32:
            continue
        # Most of them have no bfloat16 of their own.
        given = torch.linspace(0.101, 0.907, parameter.numel(), dtype=torch.float32)
        given, kept = given.reshape(parameter.shape), parameter.detach().clone()
        loader(parameter, given.clone())
        got = parameter.detach().clone()
        parameter.data.copy_(kept)
        if torch.equal(got, given):
            continue
        if torch.equal(got, given.bfloat16().float()):
            return torch.bfloat16
        raise Unsupported(f"what {loader.__qualname__} makes of a bias is not known")
    return tensor.dtype
