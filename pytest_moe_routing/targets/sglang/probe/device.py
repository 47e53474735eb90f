"""The GPU that SGLang's code finds, which is one of the Blackwell family unless another is named.

What SGLang's modules note of it when they are imported (which kernel multiplies a router's logits)
does not change with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch.overrides import TorchFunctionMode

BLACKWELL = "Blackwell"
#: Compute capabilities, by what reports call the GPUs.
DEVICES = {BLACKWELL: (10, 0), "Hopper": (9, 0), "RTX Blackwell": (12, 0)}
_found = [BLACKWELL]


@contextmanager
def on(device: str) -> Iterator[None]:
    """Have SGLang's code find another GPU for a while."""
    before, _found[0] = _found[0], device
    try:
        yield
    finally:
        _found[0] = before


def capability() -> tuple[int, int]:
    """Return the compute capability of the GPU."""
    return DEVICES[_found[0]]


class OnCpu(TorchFunctionMode):
    """Makes tensors on a CPU while it is entered, where code names the GPU."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if str(named.get("device", "")).startswith("cuda"):
            named["device"] = "cpu"
        return func(*args, **named)
