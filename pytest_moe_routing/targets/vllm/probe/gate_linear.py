"""Runs vLLM's linear layer of a router, which computes logits in one of many kernels of a GPU.

Which kernel it is depends on the GPU, the dtypes, the sizes and the number of tokens. In the place
of each kernel runs what it is for: a product that is summed up in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pytest_moe_routing.oracle.routers import PRECISION, Deviation
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.probe.router_case import Case

_LAYER = "gate-linear"
#: Hidden size and experts: small ones, and those of MiniMax-M2, which have a kernel of their own.
_SIZES = ((64, 32), (3072, 256))
#: One token, more than 16 (the limit of `ll_bf16_gemm`), and more than 32 (that of all others).
_TOKENS = (1, 24, 64)
#: Names of GPUs, with their compute capabilities.
_GPUS = {"Hopper": (9, 0), "Blackwell": (10, 0)}
#: What of the sum of all magnitudes the order of a float32 sum may change; and half a step of
#: bfloat16, of the sum itself.
_SUM, _ROUNDED = 1e-5, 2.0**-8


class _Linear(nn.Module):
    """The base class of vLLM's layer: a product without a bias."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *_: Any,
        params_dtype: torch.dtype | None = None,
        return_bias: bool = True,
        **__: Any,
    ) -> None:
        super().__init__()
        dtype = params_dtype or torch.bfloat16
        self.weight = nn.Parameter(torch.zeros(output_size, input_size, dtype=dtype))
        self.weight.requires_grad_(False)
        self.quant_method, self.return_bias = _Method(), return_bias

    def forward(self, x: Tensor) -> Any:
        output = nn.functional.linear(x, self.weight)
        return (output, None) if self.return_bias else output


class _Method:
    """The method of linear layers that are not quantized."""


@dataclass(frozen=True)
class _Kernel:
    """A kernel of a GPU that sums up in float32.

    Attributes:
        name: That of the operator.
        weight: The dtype of weights that it reads.
        tokens: The most tokens that it takes; None if it takes any number.
    """

    name: str
    weight: torch.dtype
    tokens: int | None = None

    def __call__(self, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        if weight.dtype != self.weight:
            raise ValueError(f"{self.name} reads a weight in {self.weight}, not {weight.dtype}")
        if self.tokens is not None and len(x) > self.tokens:
            raise ValueError(f"{self.name} takes at most {self.tokens} tokens, not {len(x)}")
        return x.float() @ weight.float().T

    def register_warmup(self, **_: Any) -> None:
        """Compile nothing."""


#: By key of the contract. From the classes that launch them, in vLLM 0.33.0.
_KERNELS: dict[str, Callable[..., Any]] = {
    "gate-linear-bf16.ll_bf16_gemm": _Kernel("ll_bf16_gemm", torch.bfloat16),
    "gate-linear-bf16.is_available": lambda: True,
    "gate-linear-fp32w.LL_FP32W_GEMM_KERNEL": _Kernel("ll_fp32w_gemm", torch.float32),
    "gate-linear-fp32w.is_available": lambda: True,
    "gate-linear-fp32.fp32_router_gemm": _Kernel("fp32_router_gemm", torch.float32, 32),
    "gate-linear-bf16x3.bf16x3_router_gemm": _Kernel("bf16x3_router_gemm", torch.float32),
    "gate-linear-bf16x3._bf16x3_router_gemm": _Kernel("bf16x3_router_gemm", torch.float32),
}
_mm = torch.mm


def _mm_on_a_cpu(x: Tensor, y: Tensor, out_dtype: torch.dtype | None = None, **more: Any) -> Tensor:
    return _mm(x, y, **more) if out_dtype is None else _mm(x.to(out_dtype), y.to(out_dtype))


def gate_cases() -> Iterator[Case]:
    """Yield the layer on each GPU, for each dtype of its weight and of the logits.

    Models make it with these dtypes: a float32 weight and logits in float32, and a bfloat16 weight
    with logits in either dtype; the dtype of the logits may be set later.
    """
    if not release.names().has(_LAYER):
        return
    for gpu, capability in _GPUS.items():
        for weight, logits, is_late in (
            (torch.bfloat16, None, False),
            (torch.bfloat16, torch.float32, False),
            (torch.bfloat16, torch.float32, True),
            (torch.float32, torch.float32, False),
        ):
            gate = _Gate(capability, weight, logits, is_late)
            yield Case(
                gate.make, Recipe(top_k=1), _SIZES[0][1], torch.float32, f"cuda, {gpu}", str(gate),
                "model", judge=gate.judge, function="GateLinear.forward", router="GateLinear",
            )  # fmt: skip


@dataclass(frozen=True)
class _Gate:
    """A layer with these dtypes, on a GPU of this compute capability."""

    capability: tuple[int, int]
    weight: torch.dtype
    logits: torch.dtype | None
    is_late: bool

    def __str__(self) -> str:
        logits = "no dtype of logits" if self.logits is None else f"{_name(self.logits)} logits"
        late = ", asked for after the layer is made" if self.is_late else ""
        return f"a {_name(self.weight)} weight and {logits}{late}"

    def make(self, _bias: Tensor | None = None, sizes: tuple[int, int] = _SIZES[0]) -> Any:
        dtypes: dict[str, Any] = {"params_dtype": self.weight}
        if self.logits is not None and not self.is_late:
            dtypes["out_dtype"] = self.logits
        layer = _layer_class()(*sizes, **dtypes)
        if self.is_late:
            layer.set_out_dtype(self.logits)
        return layer

    def judge(self, _case: Case) -> list[Deviation]:
        """Return the first deviation of logits from the product with the weight."""
        for sizes in _SIZES:
            for tokens in _TOKENS:
                with _on_gpu(self.capability):
                    try:
                        layer = self.make(sizes=sizes)
                        noise = torch.Generator().manual_seed(tokens)
                        layer.weight.copy_(torch.randn(layer.weight.shape, generator=noise))
                        x = torch.randn(tokens, sizes[0], generator=noise).bfloat16()
                        logits = layer(x)[0]
                    except (RuntimeError, TypeError, ValueError) as error:
                        text = f"{type(error).__name__}: {error}"
                        return [Deviation("crash", f"{tokens} tokens", text, text)]
                found = self._problem(logits, x, layer.weight)
                if found is not None:
                    kind, text = found
                    where = f"{tokens} tokens, hidden size {sizes[0]}, {sizes[1]} experts"
                    return [Deviation(kind, f"{tokens} tokens", f"{text}: {where}", text)]
        return []

    def _problem(self, logits: Tensor, x: Tensor, weight: Tensor) -> tuple[str, str] | None:
        """Return kind and text of what is wrong with logits; None if nothing is."""
        asked = self.logits or self.weight
        if logits.dtype != asked:
            return "output", f"logits are {_name(logits.dtype)}, {_name(asked)} was asked for"
        exact, size = _product(x, weight), _product(x.abs(), weight.abs())
        is_narrow = asked == torch.bfloat16
        narrower = _product(x, weight.bfloat16())
        for cause, wanted, is_rounded in (
            ("", exact, is_narrow),
            ("the logits are rounded to bfloat16", exact, True),
            ("the router's weight is rounded to bfloat16", narrower, is_narrow),
            ("the router's weight and the logits are rounded to bfloat16", narrower, True),
        ):
            allowed = _SUM * size + (_ROUNDED * wanted.abs() if is_rounded else 0)
            if logits.shape == wanted.shape and bool(((logits - wanted).abs() <= allowed).all()):
                return (PRECISION, cause) if cause else None
        return "logits", "the logits are not the product with the router's weight"


def _product(x: Tensor, weight: Tensor) -> Tensor:
    return x.double() @ weight.double().T


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _on_gpu(capability: tuple[int, int]) -> Iterator[None]:
    with release.on_device(*capability), patch.object(torch, "mm", _mm_on_a_cpu):
        yield


@cache
def _layer_class() -> Any:
    """Return vLLM's class, on a base class of ours, with all of its kernels computed on a CPU."""
    names = release.names()
    stand_ins = {"gate-linear-base": _Linear, "gate-linear-method": _Method, **_KERNELS}
    for key, value in stand_ins.items():
        if names.has(key):
            spelling = names.spelling(key)
            # What a kernel's own module imports is not here.
            module = sys.modules.setdefault(spelling.module, ModuleType(spelling.module))
            setattr(module, spelling.path, value)
    # Made once more, on this base class.
    spelling = names.spelling(_LAYER)
    return getattr(stubs.run_apart(spelling.module), spelling.path)
