"""Where the elements of a marked checkpoint lie in what a kernel is given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import QuantizationError, Unsupported
from pytest_moe_routing.reference.kernel_layouts import Layout, layout_of
from pytest_moe_routing.reference.layouts import (
    fold_scales,
    interleave_for_hopper,
    interleave_groups,
    swap_halves,
    swizzle_scales,
)
from pytest_moe_routing.schemes import KernelSpec, kernel_of
from pytest_moe_routing.targets.bits import have_same_bits
from pytest_moe_routing.targets.marked_checkpoint import (
    EXPONENTS,
    KINDS,
    MarkedCheckpoint,
    Padded,
    kind_of,
)

#: Tokens that fill a tile of scales: no order of rows of fewer tokens is the same.
TOKENS = 256
_SEED = 12
#: The first experts, which are compared.
_EXPERTS = 2
_INPUT = "hidden_states_scale"
#: Elements in a byte of hidden states in e2m1.
_PACKED = 2
#: FlashInfer's `WeightLayout`, whose numbers have never moved.
LAYOUTS = ("MajorK", "MajorMn", "BlockMajorK")
#: Tiles of rows that may be shuffled.
_TILES = (0, 64, 128)
#: Groups of up and gate rows that may alternate.
_GROUPS = (64, 0, 128, 32, 16, 8)


@dataclass(frozen=True)
class Order:
    """How a matrix of a checkpoint lies in memory.

    Attributes:
        up_first: The up rows precede the gate rows, in halves or in pairs.
        interleaved: Up and gate rows alternate.
        group: Groups of so many up and gate rows alternate; 0 if none do.
        tile: Rows are shuffled for an epilogue of so many; 0 for not at all.
        weight_layout: A number of FlashInfer's `WeightLayout`, see `LAYOUTS`.
        tiled: Scales lie in 128x4 tiles.
        hopper: `weights` or `scales` that lie as Hopper's mixed-input GEMM reads these; else empty.
        dtype: That of biases, where the kernel does not look at it; else empty.
    """

    up_first: bool = False
    interleaved: bool = False
    tile: int = 0
    weight_layout: int = 0
    tiled: bool = False
    hopper: str = ""
    dtype: str = ""
    group: int = 0

    def lay(self, matrix: Tensor, *, gated: bool) -> Tensor:
        """Return a matrix `[rows, columns]`, gate before up, in this order."""
        layout = Layout(self.tile, self.interleaved, LAYOUTS[self.weight_layout] == "BlockMajorK")
        given = swap_halves(matrix) if gated and not self.up_first else matrix
        if gated and self.group:
            # `elements` would swap halves, too.
            given, gated = interleave_groups(swap_halves(given), self.group), False
        laid = layout.elements(given, gated)
        if LAYOUTS[self.weight_layout] == "MajorMn":
            laid = laid.transpose(-2, -1).contiguous()
        if self.hopper:
            return fold_scales(laid) if self.hopper == "scales" else interleave_for_hopper(laid)
        return swizzle_scales(laid) if self.tiled else laid


@dataclass(frozen=True)
class Argument:
    """A tensor of a call, the parameter that it is made of, and the order in which it is read.

    Attributes:
        is_padded: Whether its kernel may need padding. If so, an argument with more elements than
            the parameter cannot be compared; if not, its order is one that is not known.
    """

    name: str
    value: Any
    parameter: str | None
    read: Order
    gated: bool
    is_padded: bool = True

    def order(self, checkpoint: MarkedCheckpoint, padded: Padded) -> Order | None:
        """Return the order that is found; None for one that is not known.

        Raises:
            Unsupported: The argument cannot be compared with the checkpoint.
        """
        name, value = self.name, self.value
        if self.parameter is None or not isinstance(value, Tensor):
            raise Unsupported(f"{name} cannot be compared with the layer's parameters")
        # The last one shows whether experts are in their order.
        few = {*range(len(value))[:_EXPERTS], len(value) - 1}
        matrices = {at: checkpoint.matrix(self.parameter, at, padded) for at in few}
        pairs = [(value[expert], matrix) for expert, matrix in matrices.items()]
        kind = kind_of(self.parameter)
        if kind == "bias":
            # Kernels take them in another dtype than checkpoints have.
            pairs = [(part, matrix.to(part.dtype)) for part, matrix in pairs]
        if self.is_padded and any(part.numel() > matrix.numel() for part, matrix in pairs):
            raise Unsupported(f"{name} has more elements than the checkpoint")
        # Whatever scales zeros have, they stay zeros.
        is_open = kind == "scale" and padded
        is_tiled = self.read.tiled and not self.is_padded
        whole = [(part, swizzle_scales(m) if is_tiled and is_open else m) for part, m in pairs]
        if is_open and any(part.numel() != matrix.numel() for part, matrix in whole):
            raise Unsupported(f"{name} is not padded as the weights are")
        known = checkpoint.known(self.parameter, padded) if is_open else None
        found = _order_of(pairs, self.read, known, gated=self.gated)
        if found is None or not self.read.dtype:
            return found
        return replace(found, dtype=str(value.dtype).removeprefix("torch."))


def orders(
    scheme: str, arguments: Mapping[str, Any], checkpoint: MarkedCheckpoint, *, gated: bool
) -> list[dict[str, Any]]:
    """Return where a call's weights and scales lie otherwise than the kernel reads them.

    Returns:
        For each such argument its `name`, the order that is `read` and the one that is `found`, as
        fields of `Order`; None for an order that is not known. `told` are the flags of the call.

    Raises:
        Unsupported: An argument cannot be compared with the checkpoint.
    """
    kernel = kernel_of(scheme)
    flags = ("use_shuffled_weight", "weight_layout")
    told = {name: int(arguments[name]) for name in flags if name in arguments}
    found, padded = [], checkpoint.padded(arguments)
    for gemm, kind in product(("gemm1", "gemm2"), KINDS):
        parameter = checkpoint.named(gemm, kind)
        if kind == "scale" and kernel.weight_scales not in ("tiles", "square"):
            continue
        name = f"{gemm}_{kernel.scale_argument if kind == 'scale' else kind}"
        if kind == "bias" and (parameter is None or name not in arguments):
            continue
        halves = gated and gemm == "gemm1"
        read = _read(kernel, told, kind, gated=halves)
        found.append(Argument(name, arguments.get(name), parameter, read, halves))
    return [
        *wrong_orders(found, checkpoint, padded, told),
        *_order_of_activations(arguments, kernel),
    ]


def columns(arguments: Mapping[str, Any]) -> list[int]:
    """Return how many columns a call's hidden states have, and how many its weights are for."""
    hidden, weights = arguments["hidden_states"], arguments["gemm2_weights"]
    return [hidden.shape[-1] * (_PACKED if hidden.dtype == torch.uint8 else 1), weights.shape[-2]]


def wrong_orders(
    arguments: Iterable[Argument],
    checkpoint: MarkedCheckpoint,
    padded: Padded,
    told: Mapping[str, int],
) -> list[dict[str, Any]]:
    """Return the arguments that lie otherwise than they are read; see `orders`."""
    found = []
    for argument in arguments:
        order, read = argument.order(checkpoint, padded), argument.read
        if order != read:
            as_found = None if order is None else vars(order)
            found.append(
                {"name": argument.name, "read": vars(read), "found": as_found, "told": {**told}}
            )
    return found


def activation_scales(tokens: int, blocks: int, dtype: torch.dtype, is_tiled: bool) -> Tensor:
    """Return scales of activations that are known by their place, uint8 or float32.

    Args:
        is_tiled: Whether they lie in 128x4 tiles.
    """
    random = torch.Generator().manual_seed(_SEED)
    scales = torch.randint(*EXPONENTS, (tokens, blocks), generator=random).to(dtype)
    return swizzle_scales(scales) if is_tiled else scales


def _order_of_activations(
    arguments: Mapping[str, Any], kernel: KernelSpec
) -> Iterator[dict[str, Any]]:
    """Yield how the scales of hidden states lie otherwise than the kernel reads them."""
    if kernel.input_scales:
        read = Order(weight_layout=int(kernel.input_scales == "block"))
        yield from order_of_activations(_INPUT, arguments.get(_INPUT), read)


def order_of_activations(name: str, scales: Any, read: Order) -> Iterator[dict[str, Any]]:
    """Yield how the scales of hidden states lie otherwise than they are read; see `orders`.

    Raises:
        Unsupported: They are none that are known by their place.
    """
    if not isinstance(scales, Tensor) or len(scales.float().unique()) == 1:
        raise Unsupported(f"{name} cannot be compared with the scales of activations")
    dtype = torch.uint8 if scales.element_size() == 1 else torch.float32
    rows = activation_scales(TOKENS, scales.numel() // TOKENS, dtype, is_tiled=False)
    candidates = (read, Order(), Order(weight_layout=1), Order(tiled=True))
    laid = ((order, order.lay(rows, gated=False)) for order in candidates)
    found = next((order for order, scale in laid if _same_bytes(scales, scale)), None)
    if found != read:
        as_found = None if found is None else vars(found)
        yield {"name": name, "read": vars(read), "found": as_found, "told": {}}


def _read(kernel: KernelSpec, told: Mapping[str, int], kind: str, *, gated: bool) -> Order:
    """Return the order in which a kernel reads a matrix, or its scales or biases."""
    if kind == "scale" and kernel.weight_scales == "square":
        return Order(up_first=gated)
    usual = layout_of(kernel)
    is_shuffled = told.get("use_shuffled_weight", usual.tile)
    number = told.get("weight_layout", LAYOUTS.index("BlockMajorK") if usual.block_major else 0)
    tile = (128 if kernel.fused_activation else 64) if is_shuffled else 0
    interleaved = bool(gated and is_shuffled and kernel.fused_activation)
    layout = number if kind == "weights" else 0
    # trtllm_fused_moe_kernel_launcher.cu casts the pointers of biases to float.
    dtype = "float32" if kind == "bias" else ""
    return Order(gated, interleaved, tile, layout, tiled=kind == "scale", dtype=dtype)


def _order_of(
    pairs: list[tuple[Tensor, Tensor]], first: Order, known: Tensor | None, *, gated: bool
) -> Order | None:
    """Return the order that tensors have of their matrices; None for one that is not known.

    Args:
        first: The order that is tried first.
        known: Which elements of a matrix are compared: not 0 there; None for all.
    """
    width = pairs[0][1].element_size()
    for order in (first, *_likely(first, gated=gated)):
        try:
            laid = [(part, order.lay(matrix, gated=gated)) for part, matrix in pairs]
            if known is not None:
                elements = order.lay(known, gated=gated).flatten() != 0
                only = elements.repeat_interleave(width)
                laid = [(_bytes(part)[only], _bytes(made)[only]) for part, made in laid]
            if all(_same_bytes(*pair) for pair in laid):
                return order
        except QuantizationError:
            # Rows or columns do not fill the blocks of this order.
            continue
    return None


def _likely(read: Order, *, gated: bool) -> Iterator[Order]:
    """Yield orders, those that differ least from the right one first."""
    swapped = (True, False) if gated else (False,)
    if read.group:
        choices = [
            replace(read, up_first=up_first, group=group, tiled=tiled)
            for up_first, group, tiled in product(swapped, _GROUPS, {read.tiled, False})
        ]
    else:
        choices = [
            Order(*choice)
            for choice in product(
                swapped,
                swapped,
                _TILES,
                (0,) if read.tiled or read.hopper else range(len(LAYOUTS)),
                (True, False) if read.tiled else (False,),
                (read.hopper, "") if read.hopper else ("",),
            )
        ]

    def distance(order: Order) -> int:
        return sum(vars(order)[name] != value for name, value in vars(read).items())

    yield from sorted(choices, key=distance)


def _same_bytes(one: Tensor, other: Tensor) -> bool:
    if one.element_size() == 1 and other.dtype == torch.float32:
        other = other.to(torch.float8_e8m0fnu)
    return have_same_bits(*map(_bytes, (one, other)))


def _bytes(tensor: Tensor) -> Tensor:
    # The stride of a single column may be anything.
    return tensor.contiguous().flatten().view(torch.uint8)
