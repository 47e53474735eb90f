"""The weights of a layer in its model's own size, of which only the experts in use are prepared.

A layer of DeepSeek-R1 has 11 GB of weights, a few tokens reach some of them. On a CPU its tensors
are mapped and take memory where they are written; on a GPU they are allocated.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from math import prod

import torch
from torch import Tensor

from pytest_moe_routing.kernels.weights import Prepared, prepare
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.weights import Experts
from pytest_moe_routing.schemes import KernelSpec

#: Linux: pages that are not written need no memory behind them.
_NORESERVE = 0x4000


@dataclass
class ReachedExperts:
    """A layer whose experts are prepared when a token reaches them.

    Attributes:
        experts: The layer; padded, where the kernel needs it.
        prepared: The arguments of the whole layer; zeros for experts that no token has reached.
        done: The experts that are prepared.
    """

    experts: Experts
    kernel: KernelSpec
    gated: bool
    device: str = "cpu"
    layout: str = ""
    done: set[int] = field(default_factory=set)
    _prepared: Prepared | None = None

    @property
    def prepared(self) -> Prepared:
        if self._prepared is None:
            self.reach([0])
        assert self._prepared is not None
        return self._prepared

    def reach(self, experts: Iterable[int]) -> bool:
        """Prepare those of these experts that are not yet; return whether there were any."""
        missing = sorted(set(experts) - self.done)
        for number in missing:
            one = prepare(
                self.experts,
                self.kernel,
                gated=self.gated,
                layout=self.layout,
                shard=Shard(number, 1),
                device=self.device,
            )
            if self._prepared is None:
                self._prepared = _empty(one, len(self.experts))
            _write(one, self._prepared, number)
        self.done.update(missing)
        return bool(missing)


def _parts(prepared: Prepared) -> dict[str, Tensor | None]:
    names = ("gate", "up", "down", "intermediate", "bias1", "bias2")
    return {**prepared.tensors, **{name: getattr(prepared, name) for name in names}}


def _empty(one: Prepared, count: int) -> Prepared:
    """Return a whole layer's arguments, after those of one expert."""
    made = {
        name: None if part is None else _zeros((count, *part.shape[1:]), part)
        for name, part in _parts(one).items()
    }
    # Factors divide the biases of experts that were not prepared, too.
    factors = {n: torch.ones_like(getattr(one, n)).repeat(count) for n in _FACTORS}
    tensors = {name: made[name] for name in one.tensors}
    biases = {name: made[name] for name in ("bias1", "bias2")}
    return replace(one, shard=Shard.whole(count), tensors=tensors, **biases, **factors)  # type: ignore[arg-type]


_FACTORS = ("gate", "up", "down", "intermediate")


def _write(one: Prepared, whole: Prepared, number: int) -> None:
    to = _parts(whole)
    for name, part in _parts(one).items():
        target = to[name]
        if part is not None and target is not None:
            # As bytes, as not every quantized dtype can be assigned.
            target.view(torch.uint8)[_bytes_of(target, number)] = part.view(torch.uint8)[
                _bytes_of(part, 0)
            ]


def _bytes_of(tensor: Tensor, number: int) -> slice | int:
    """Where an expert lies, in bytes, along the first dimension."""
    size = tensor.element_size()
    return slice(number * size, (number + 1) * size) if tensor.ndim == 1 else number


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    if like.device.type != "cpu":
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    size = prod(shape) * like.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
    mapped = mmap.mmap(-1, max(size, 1), flags=flags)
    return torch.frombuffer(mapped, dtype=torch.uint8, count=size).view(like.dtype).view(shape)
