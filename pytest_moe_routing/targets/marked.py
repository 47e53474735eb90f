"""Marked activations, experts and weights, and a kernel whose output shows which it was given.

An activation is a power of two by its token and its block of columns, a weight one by its token and
its slot, so that both stay exact in every number format, however often a weight is applied. An
expert adds the bits of its number, each to columns of its own: a weight on the input and one on the
output differ, and so do any two experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.flashinfer.given import GivenExperts
from pytest_moe_routing.reference.layouts import swizzle_scales

#: Columns of one activation that are equal: no block that shares a scale is larger.
BLOCK = 128
#: Bits that are enough for any expert id.
_BITS = 16
#: The code of 1 in both halves of a byte of e2m1.
_ONE_E2M1 = 0x22
_UE8M0_BIAS = 127
#: How often a factor may be applied, for all that is told apart.
_TIMES = (0, 1, 2)


class UnusableArgumentError(Exception):
    """An argument that a kernel cannot compute with."""

    def __init__(self, name: str, wanted: str, got: str) -> None:
        super().__init__(f"{name} is {got}, not {wanted}")
        self.name, self.wanted, self.got = name, wanted, got


@dataclass(frozen=True)
class Marked:
    """What a layer hands to its experts.

    Attributes:
        hidden: bfloat16, [tokens, columns].
        ids: int32, [tokens, top_k].
        weights: float32, [tokens, top_k].
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor

    @classmethod
    @lru_cache(16)
    def make(cls, tokens: int, columns: int, experts: int, top_k: int) -> Marked:
        """Mark so many tokens, whose experts lie on every rank; nobody may change them."""
        token, slot = torch.arange(tokens).unsqueeze(1), torch.arange(top_k)
        stride = experts // tokens + 1
        return cls(
            hidden=hidden_states(tokens, columns),
            ids=((token * stride + slot * (experts // top_k)) % experts).int(),
            weights=torch.exp2(-1.0 - (token + slot) % 4),
        )

    def gathered(self) -> Marked:
        """Return it behind the tokens of another rank, which are the same in reverse."""
        return Marked(*(in_reverse(x) for x in (self.hidden, self.ids, self.weights)))

    def packed(self) -> Tensor:
        """Ids and bfloat16 weights in one int32."""
        return pack(self.ids, self.weights)

    def output(self, first: int, local: int, *, on_input: bool) -> Tensor:
        """Return what the experts of one rank give, weighed once: float32, [tokens, columns]."""
        weights = torch.ones_like(self.weights) if on_input else self.weights
        hidden = self.hidden.float()
        if on_input:
            hidden = hidden * self.weights
        return _experts(hidden, self.ids, weights, first, local)


@dataclass(frozen=True)
class Received:
    """What a kernel was given, and what it computed with that: float32, ids int64."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    output: Tensor


@lru_cache(16)
def hidden_states(tokens: int, columns: int) -> Tensor:
    """Return the activations of so many tokens: each time the same, so that nobody may change them.

    Returns:
        bfloat16, [tokens, columns].
    """
    token, block = torch.arange(tokens).unsqueeze(1), torch.arange(columns) // BLOCK
    return torch.exp2((token + block) % 4).bfloat16()


def in_reverse(x: Tensor) -> Tensor:
    """Return the rows of another rank, which are these in reverse, and then these."""
    order = [*reversed(range(len(x))), *range(len(x))]
    if x.dtype.itemsize == 1:
        return x.view(torch.uint8)[order].view(x.dtype)
    return x[order]


def pack(ids: Tensor, weights: Tensor) -> Tensor:
    """Pack ids and weights as FlashInfer takes them in one int32."""
    bits = weights.bfloat16().view(torch.int16).to(torch.int32) & 0xFFFF
    return (ids.to(torch.int32) << 16) | bits


def block_scales(x: Tensor, block: int) -> Tensor:
    """Return the magnitudes that blocks of columns share, as their scale: every element is 1.

    Returns:
        float32, [tokens, columns / block].
    """
    return x.float().unflatten(1, (-1, block)).abs().amax(2)


def ones_e2m1(tokens: int, columns: int) -> Tensor:
    """Return elements that are 1, two a byte."""
    return torch.full((tokens, columns // 2), _ONE_E2M1, dtype=torch.uint8)


def to_ue8m0(scales: Tensor) -> Tensor:
    """Return scales that are powers of two, or 0, as uint8."""
    exponents = torch.where(scales > 0, scales.log2() + _UE8M0_BIAS, 0.0)
    return exponents.to(torch.uint8)


def times(got: Tensor, base: Tensor, *factors: Tensor | float) -> list[int] | None:
    """Return how often each factor is in what is `base` without them; None if that is not so.

    A factor that is 1 everywhere is not in anything.
    """
    if got.shape != base.shape:
        return None
    for counts in product(_TIMES, repeat=len(factors)):
        wanted = base
        for factor, count in zip(factors, counts, strict=True):
            wanted = wanted * factor**count
        # A product with a factor that is no power of two is rounded.
        if torch.allclose(got, wanted, rtol=2**-7, atol=0):
            return list(counts)
    return None


def routed(arguments: Mapping[str, Any]) -> Received:
    """Compute what an entry point that is given experts and weights computes.

    Experts of other ranks are left out; the weights are applied on the output, and no scaling
    factor is, as FlashInfer ignores it where experts are given.

    Raises:
        UnusableArgumentError: An argument does not have the shape or dtype that kernels read.
    """
    ids, weights = _chosen(arguments["topk_ids"])
    hidden = activations(arguments["hidden_states"], arguments.get("hidden_states_scale"))
    _require_tokens("hidden_states", hidden, len(ids))
    place = {name: arguments[name] for name in ("local_expert_offset", "local_num_experts")}
    for name, value in place.items():
        _require_integer(name, value)
    output = _experts(hidden, ids, weights, *place.values())
    return Received(hidden, ids, weights, output)


def given(arguments: Mapping[str, Any], entry: GivenExperts) -> Received:
    """Compute the same for another entry point than TRT-LLM's.

    Raises:
        UnusableArgumentError: An argument does not have the shape or dtype that kernels read.
    """
    ids, weights = arguments[entry.ids], arguments[entry.weights]
    for name, tensor, dtypes in (
        (entry.ids, ids, entry.id_dtypes),
        (entry.weights, weights, entry.weight_dtypes),
    ):
        _require(name, tensor, *(getattr(torch, dtype) for dtype in dtypes))
    if ids.shape != weights.shape:
        raise UnusableArgumentError(entry.weights, _shape(ids), _shape(weights))
    hidden, scale = arguments[entry.hidden], arguments[entry.scale]
    if scale is not None and scale.ndim > hidden.ndim and scale.is_contiguous():
        # Kernels of CuTe DSL are handed the address; they take scales with a last dimension of 1.
        scale = scale.flatten()
    if scale is None and hidden.dtype == torch.float8_e4m3fn:
        # One scale for all of them, which is 1 here, is among the other scales.
        hidden = hidden.float()
    else:
        is_tiled = "rows" not in entry.inputs.values() and bool(arguments.get(entry.tiled, True))
        names = entry.hidden, entry.scale
        hidden = activations(hidden, scale, names=names, is_tiled=is_tiled)
    _require_tokens(entry.hidden, hidden, len(ids))
    local, name = len(arguments[entry.experts]), entry.offset or entry.rank
    _require_integer(name, arguments[name])
    first = arguments[name] * (1 if entry.offset else local)
    output = _experts(hidden, ids.long(), weights, first, local)
    return Received(hidden, ids.long(), weights, output)


def _experts(hidden: Tensor, ids: Tensor, weights: Tensor, first: int, local: int) -> Tensor:
    here = (ids >= first) & (ids < first + local)
    weighed = (weights * here).unsqueeze(2)
    # Every `_BITS` columns have the same bits.
    bits = ((ids.long().unsqueeze(2) + 1) >> torch.arange(_BITS)) & 1
    of_bits = (weighed * bits).sum(1).repeat(1, -(-hidden.shape[1] // _BITS))
    return hidden * weighed.sum(1) + of_bits[:, : hidden.shape[1]]


def _chosen(topk_ids: Any) -> tuple[Tensor, Tensor]:
    """Ids and weights, which come as two tensors or packed in one."""
    if isinstance(topk_ids, Tensor):
        _require("topk_ids", topk_ids, torch.int32)
        weights = (topk_ids & 0xFFFF).to(torch.int16).view(torch.bfloat16)
        return (topk_ids >> 16).long(), weights.float()
    ids, weights = topk_ids
    _require("topk_ids", ids, torch.int32)
    _require("topk_weights", weights, torch.float32, torch.bfloat16)
    if ids.shape != weights.shape:
        raise UnusableArgumentError("topk_weights", _shape(ids), _shape(weights))
    return ids.long(), weights.float()


def activations(
    hidden: Tensor,
    scale: Tensor | None,
    *,
    names: tuple[str, str] = ("hidden_states", "hidden_states_scale"),
    is_tiled: bool = False,
) -> Tensor:
    """Return activations as the kernels read them: dtypes and shapes of FlashInfer's launchers.

    Args:
        names: The arguments, for errors.
        is_tiled: Whether scales lie in tiles, see `layouts.swizzle_scales`.
    """
    if hidden.dtype == torch.bfloat16:
        return hidden.float()
    tokens = len(hidden)
    if hidden.dtype == torch.uint8:
        block, elements = 16, (hidden == _ONE_E2M1).float().repeat_interleave(2, 1)
    else:
        _require(names[0], hidden, torch.float8_e4m3fn)
        elements = hidden.float()
        block = BLOCK if scale is not None and scale.dtype == torch.float32 else 32
    if scale is None:
        raise UnusableArgumentError(names[1], "a tensor", "none")
    wanted = (tokens, elements.shape[1] // block)
    if is_tiled:
        scale = _untiled(names[1], scale, wanted)
    if block == BLOCK:
        # Scales of 128 columns lie with the tokens last.
        wanted = wanted[::-1]
    if tuple(scale.shape) != wanted and not (
        block != BLOCK and scale.ndim == 1 and scale.numel() == wanted[0] * wanted[1]
    ):
        raise UnusableArgumentError(names[1], "x".join(map(str, wanted)), _shape(scale))
    values = scale.reshape(wanted)
    if block == BLOCK:
        values = values.t()
    elif block == 16:
        values = values.view(torch.float8_e4m3fn).float()
    else:
        values = torch.exp2(values.view(torch.uint8).float() - _UE8M0_BIAS)
    return elements * values.repeat_interleave(block, 1)


def _untiled(name: str, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return scales that lie in tiles in rows and columns."""
    count = math.prod(shape)
    places = swizzle_scales(torch.arange(1, count + 1, dtype=torch.int32).reshape(shape))
    flat = scale.contiguous().view(torch.uint8).flatten()
    if flat.numel() != places.numel():
        raise UnusableArgumentError(name, f"{places.numel()} scales in tiles", _shape(scale))
    found = torch.empty(count, dtype=torch.uint8)
    found[places[places > 0].long() - 1] = flat[places > 0]
    return found.reshape(shape)


def _require_tokens(name: str, hidden: Tensor, tokens: int) -> None:
    if len(hidden) != tokens:
        raise UnusableArgumentError(name, f"{tokens} tokens", f"{len(hidden)} tokens")


def _require_integer(name: str, value: Any) -> None:
    if not isinstance(value, int):
        raise UnusableArgumentError(name, "an integer", str(value))


def _require(name: str, tensor: Tensor, *dtypes: torch.dtype) -> None:
    if tensor.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise UnusableArgumentError(name, wanted, str(tensor.dtype).removeprefix("torch."))


def _shape(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))
