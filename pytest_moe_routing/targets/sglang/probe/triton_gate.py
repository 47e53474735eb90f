"""Runs SGLang's Triton router on a CPU, with torch functions in the place of Triton's.

Both the host code and the kernel that it launches are the release's own: a number or a flag that
the host code passes means what the kernel does with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.stubs import known, source_of

#: The kernel, and its argument that says how many rows a program computes.
_KERNEL, _ROWS = "_router_triton_kernel", "BLOCK_M"


@dataclass(frozen=True)
class _Pointer:
    """Elements of a tensor, by their offsets in its memory."""

    tensor: Tensor
    offsets: Any = 0

    def __add__(self, offsets: Any) -> _Pointer:
        return _Pointer(self.tensor, self.offsets + offsets)

    def _among(self, mask: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Return the memory, the offsets, and which of them are meant."""
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        memory = self.tensor.as_strided((size,), (1,), 0)
        offsets = torch.as_tensor(self.offsets) + self.tensor.storage_offset()
        given = torch.as_tensor(True if mask is None else mask)
        offsets, given = torch.broadcast_tensors(offsets, given)
        return memory, offsets, given

    def load(self, mask: Any = None, other: Any = 0) -> Tensor:
        memory, offsets, given = self._among(mask)
        return torch.where(given, memory[offsets.where(given, 0)], other).to(memory.dtype)

    def store(self, value: Any, mask: Any = None) -> None:
        memory, offsets, given = self._among(mask)
        values = torch.as_tensor(value).to(memory.dtype).broadcast_to(offsets.shape)
        memory[offsets[given]] = values[given]


def _max(x: Tensor, axis: int) -> Tensor:
    """Return the largest numbers; as in Triton, a NaN is less than any number."""
    return (
        x.nan_to_num(-torch.inf, torch.inf, -torch.inf).amax(axis)
        if x.is_floating_point()
        else x.amax(axis)
    )


def _tensor(value: Any, other: Any) -> Tensor:
    """Return a tensor, a number in the other operand's dtype."""
    return value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=other.dtype)


def language() -> Any:
    """Return what kernels use of `triton.language`, for a single program that computes all rows."""
    return SimpleNamespace(
        **{name: getattr(torch, name) for name in ("float32", "bfloat16", "int32", "int16")},
        **{name: getattr(torch, name) for name in ("sigmoid", "exp", "log", "abs", "sqrt")},
        constexpr=object,
        program_id=lambda axis: 0,
        arange=torch.arange,
        zeros=lambda shape, dtype: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype: torch.full(shape, value, dtype=dtype),
        where=torch.where,
        # As in Triton, a NaN is less than any number.
        maximum=lambda x, y: torch.fmax(_tensor(x, y), _tensor(y, x)),
        max=_max,
        min=lambda x, axis: x.amin(axis),
        sum=lambda x, axis: x.sum(axis),
        broadcast_to=torch.broadcast_to,
        static_range=range,
        load=lambda pointer, **options: pointer.load(**options),
        store=lambda pointer, value, **options: pointer.store(value, **options),
    )


class _Launched:
    """A kernel, launched as `kernel[grid](...)`."""

    def __init__(self, kernel: Callable[..., None]) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *arguments, **named: self._run(grid, arguments, named)

    def _run(self, grid: tuple[int, ...], given: tuple[Any, ...], named: dict[str, Any]) -> None:
        code = self._kernel.__code__
        names = code.co_varnames[: code.co_argcount]
        # Other names, such as `num_warps`, are options of the compiler.
        values = {
            **dict(zip(names, given, strict=False)),
            **{name: value for name, value in named.items() if name in names},
        }
        # Rows do not depend on each other, so one program computes those of all programs.
        values[_ROWS] *= grid[0]
        pointers = {n: _Pointer(v) for n, v in values.items() if isinstance(v, Tensor)}
        bound = signature(self._kernel).bind(**{**values, **pointers})
        try:
            self._kernel(*bound.args, **bound.kwargs)
        except Exception as error:
            # A kernel in Triton raises nothing: it uses what is not here.
            text = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{_KERNEL} does not run on a CPU: {text}") from error


def gate(root: str, module: str, name: str) -> Callable[..., Any]:
    """Return the function that routes, from a module of a release.

    Raises:
        Unsupported: The module has no such function, or no kernel that is known here.
    """
    space: dict[str, Any] = {"__name__": module}
    exec(compile(source_of(root, module), module, "exec", dont_inherit=True), space)
    if (
        name not in space
        or _KERNEL not in space
        or _ROWS not in space[_KERNEL].__code__.co_varnames
    ):
        raise Unsupported(
            f"not judged: {module} has no {name} that launches {_KERNEL} with {_ROWS}"
        )
    math = SimpleNamespace(log1p=torch.log1p, exp=torch.exp, sqrt=torch.sqrt)
    space.update(
        triton=SimpleNamespace(
            next_power_of_2=lambda n: 1 << max(n - 1, 0).bit_length(), cdiv=lambda x, y: -(-x // y)
        ),
        tl=language(),
        libdevice=math,
        is_arch_support_pdl=lambda: False,
        # A CUDA kernel, which serves some shapes instead of this one, does not run here.
        moe_route_radix=known("moe_route_radix", covered=lambda *_: False),
    )
    space[_KERNEL] = _Launched(space[_KERNEL])
    function: Callable[..., Any] = space[name]
    return function
