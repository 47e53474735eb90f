"""The forms in which checkpoints have the weights of experts, and the names that they have there.

vLLM's layers load all of them (`RoutedExperts.load_weights`): a tensor for each matrix of each
expert, as Mixtral has; gate and up rows of an expert in one tensor; or one tensor of all experts,
as Granite has, or with rows and columns exchanged, as Qwen3-VL and Aria have.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import Enum

import torch
from torch import Tensor

from pytest_moe_routing.targets.marked_checkpoint import MATRICES

#: Gate and up rows in one tensor.
_BOTH = "gate_up_proj"
#: The argument of the factory for tensors whose rows and columns are exchanged.
EXCHANGED = "is_fused_checkpoint_transposed"


class Form(Enum):
    """What a tensor of a checkpoint holds, in the words of a report."""

    MATRIX = "a matrix of an expert in a tensor"
    MERGED = "gate and up of an expert in one tensor"
    STACKED = "all experts in one tensor"
    TRANSPOSED = "all experts in one tensor, columns before rows"

    @property
    def arguments(self) -> dict[str, bool]:
        """The arguments of the factory that say so."""
        return {EXCHANGED: True} if self is Form.TRANSPOSED else {}


def named(
    parameter: str, parts: Mapping[str, Sequence[Tensor]], first: int, form: Form
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a parameter by the names that they have below a layer's experts.

    Args:
        parameter: A layer's parameter, such as `w13_weight`.
        parts: The tensors of the rank's experts: gate (`w1`) and up (`w3`), up alone, or down
            (`w2`).
        first: The rank's first expert. Tensors of experts before it are others than the rank's.
    """
    kind = parameter.partition("_")[2]
    only = "w2" if "w2" in parts else "w3"
    matrices = {"w1": MATRICES["w1"], "w3": MATRICES["w3"]}
    if len(parts) == 1:
        # vLLM's layers have the one matrix of experts without a gate in the place of the gate's.
        matrices = dict.fromkeys(parts, MATRICES[only])
    if form is Form.MATRIX:
        for part, tensors in parts.items():
            # A loader is given those of other ranks as well, and skips them.
            others = [(0, tensors[-1])] if first else []
            for expert, tensor in [*enumerate(tensors, first), *others]:
                yield f"{expert}.{matrices[part]}.{kind}", tensor
        return
    name = _BOTH if len(parts) > 1 else MATRICES[only]
    whole = _joined([_joined([*each], 0) for each in zip(*parts.values(), strict=True)])
    if form is Form.MERGED:
        for expert, tensor in enumerate(whole, first):
            yield f"{expert}.{name}.{kind}", tensor
        return
    if first:
        own = _bytes(whole)
        before = torch.cat([own.flip(0)] * -(-first // len(own)))[:first]
        whole = torch.cat([before, own]).view(whole.dtype)
    if form is Form.TRANSPOSED:
        whole = whole.transpose(-1, -2).contiguous()
    # Of weights, the name of the matrix is all.
    yield f"{name}{kind.removeprefix('weight')}", whole


def _joined(tensors: Sequence[Tensor], along: int | None = None) -> Tensor:
    """Return tensors after each other, or each in its row."""
    raw = [*map(_bytes, tensors)]
    joined = torch.stack(raw) if along is None else torch.cat(raw, along)
    return joined.view(tensors[0].dtype)


def _bytes(tensor: Tensor) -> Tensor:
    """Return a tensor as something that torch joins, whatever its format."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
