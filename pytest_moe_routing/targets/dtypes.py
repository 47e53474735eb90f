"""The dtypes that a tensor has had since it was computed as a product, in any framework's code."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Nothing is compiled here, and to be left out torch's compiler would be imported."""
        return False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dtypes: dict[int, set[torch.dtype]] = {}
        #: What a tensor was made of without a product, and the factors of the product that it was,
        #: each with the dtypes through which it went.
        self._made_of: dict[int, dict[int, set[torch.dtype]]] = {}
        self._factors: dict[int, dict[int, set[torch.dtype]]] = {}
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
        self._trace(name in _PRODUCTS, [*_tensors((args, kwargs))], [*_tensors(result)])
        return result

    def _trace(self, is_product: bool, given: list[Tensor], made: list[Tensor]) -> None:
        """Note of what an operator made its results."""
        for tensor in made:
            if not tensor.is_floating_point():
                continue
            key = self._key(tensor)
            if is_product:
                self._made_of[key] = {}
                self._factors[key] = _joined(self._sources(each) for each in given)
                continue
            factors = _joined(self._factors.get(self._key(each), {}) for each in given)
            if factors:
                self._factors[key] = _joined([self._factors.get(key, {}), factors])
            sources = _joined(self._sources(each) for each in given if self._key(each) != key)
            if sources:
                before = self._made_of.get(key, {})
                through = {source: {*had, tensor.dtype} for source, had in sources.items()}
                self._made_of[key] = _joined([before, through])

    def _sources(self, tensor: Tensor) -> dict[int, set[torch.dtype]]:
        key = self._key(tensor)
        return self._made_of.get(key) or {key: {tensor.dtype}}

    def of_weight(self, tensor: Tensor, module: nn.Module) -> set[str]:
        """Return the dtypes that the weight of a tensor's product went through; none if unknown.

        The arguments are those of `weights_of`.
        """
        factors = self._factors.get(self._key(tensor), {})
        found = (factors[self._key(weight)] for weight in self.weights_of(tensor, module).values())
        return {str(dtype).removeprefix("torch.") for dtypes in found for dtype in dtypes}

    def weights_of(self, tensor: Tensor, module: nn.Module) -> dict[str, Tensor]:
        """Return the weights of the product that a tensor is, by name; none if they are not known.

        Args:
            module: What a weight is a parameter or a buffer of; a bias is none.
        """
        factors = self._factors.get(self._key(tensor), {})
        known = (*module.named_parameters(), *module.named_buffers())
        return {name: w for name, w in known if w.dim() > 1 and self._key(w) in factors}

    def of(self, tensor: Tensor) -> set[str]:
        """Return the names of dtypes that a tensor has had since it was a product."""
        return {str(dtype).removeprefix("torch.") for dtype in self._of(tensor)}

    def _of(self, tensor: Tensor) -> set[torch.dtype]:
        return self._dtypes[self._key(tensor)]

    def _key(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key: int = storage._cdata
        if key not in self._dtypes:
            self._alive.append(storage)
            self._dtypes[key] = set()
        return key


def _joined(
    several: Iterable[Mapping[int, set[torch.dtype]]],
) -> dict[int, set[torch.dtype]]:
    joined: dict[int, set[torch.dtype]] = {}
    for each in several:
        for key, dtypes in each.items():
            joined[key] = joined.get(key, set()) | dtypes
    return joined


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors([*value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
