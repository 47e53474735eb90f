"""What tests of the routing kernels and of the fused ones share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.flashinfer import FlashInfer, KernelCall
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.exact import kernel_call
from pytest_moe_routing.suite.skips import unsupported_is_skipped
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

if TYPE_CHECKING:
    import torch


class Compared(Enum):
    """One of the comparisons of a call, in words where a message names the other side."""

    CHOICE = "the experts and weights of the reference"
    LABEL = "bfloat16"
    PERMUTATION = "a permutation of the chosen experts"
    LOCAL_EXPERTS = "the experts of the whole that are local"
    LOCAL_WEIGHTS = "the weights of the whole"
    OUTPUT = "the output of the reference"
    SUM = "the sum of its rows"
    TWIN = "the routed twin"
    TACTIC = "that of the first tactic"


def dtype(name: str) -> torch.dtype:
    """Return the torch dtype of this name."""
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def call_of(
    model: ModelSpec,
    flashinfer: FlashInfer,
    logits_dtype: str = "float32",
    bias_dtype: str = "",
    *,
    scheme: str = "",
) -> KernelCall:
    """Return the call that serves a model, with these dtypes, in one of its quantizations."""
    method = BuiltinTarget(flashinfer).classify(model).method
    call = kernel_call(model.router, scheme or model.checkpoints[0], method, flashinfer)
    return replace(call, logits_dtype=logits_dtype, bias_dtype=bias_dtype or call.bias_dtype)


def require(flashinfer: FlashInfer, call: KernelCall) -> None:
    """Skip where this release's kernels are known not to run a call."""
    from pytest_moe_routing.kernels.routing import require

    with unsupported_is_skipped():
        require(flashinfer, call)


def explained(run: Callable[[Any], Any], got: Any, flashinfer: FlashInfer) -> list[str]:
    """Lines that name the known faults which explain a result."""
    from pytest_moe_routing.simulator.explain import explain

    return explain(run, got, flashinfer)
