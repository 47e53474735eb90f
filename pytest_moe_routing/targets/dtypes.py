"""The dtypes that a tensor has had since it was computed as a product, in any framework's code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Operators whose result has no dtypes but its own: what its factors had before is theirs.
_PRODUCTS = frozenset(
    ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "_scaled_mm", "sum")
)


class Dtypes(TorchDispatchMode):
    """Notes the floating-point dtypes through which tensors go, while it is entered.

    All operators of torch are seen, whether a module, `F.linear`, `@` or `einsum` calls them. What
    holds for a tensor holds for its views.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtypes: dict[int, set[torch.dtype]] = {}
        #: Storages are known by their addresses, so none may be freed.
        self._alive: list[Any] = []

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = str(func).split(".")[1]
        before: set[torch.dtype] = set()
        if name not in _PRODUCTS:
            for tensor in _tensors((args, kwargs)):
                before |= self._of(tensor)
        if before or name in _PRODUCTS:
            for tensor in _tensors(result):
                if tensor.is_floating_point():
                    self._of(tensor).update({*before, tensor.dtype})
        return result

    def of(self, tensor: Tensor) -> set[str]:
        """Return the names of dtypes that a tensor has had since it was a product."""
        return {str(dtype).removeprefix("torch.") for dtype in self._of(tensor)}

    def _of(self, tensor: Tensor) -> set[torch.dtype]:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._dtypes:
            self._alive.append(storage)
        return self._dtypes.setdefault(storage._cdata, set())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
