"""The activation between the two GEMMs of an expert: one formula, and one row for each kind.

    gated:      f(min(gate, limit)) * (clamp(up, -limit, limit) + beta)
    not gated:  f(x)

Semantics: FlashInfer 0.7.2.post1 (`trtllm_fused_moe_dev_kernel.cu`, `trace/templates/moe.py`),
transformers 5.19.0 (`gpt_oss`, `step3p7`, `nemotron_h`). Step clamps after the function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_moe_routing.errors import LayerError

Sigmoid = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Activation:
    """What stands between the GEMMs.

    Attributes:
        name: Its key in `ACTIVATIONS`.
        function: `silu` (with `alpha`: x * sigmoid(alpha * x)), `gelu`, `gelu_tanh` or `relu2`.
        gated: Whether the first GEMM yields a gate and an up half.
        alpha: Factor within the sigmoid.
        beta: Added to the up half.
        limit: Gate and up are clamped to it, the gate from above only; None for no clamp.
        clamp_after: The gate is clamped after the function (Step), not before (gpt-oss).
    """

    name: str
    function: str
    gated: bool = True
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    clamp_after: bool = False

    def __call__(self, x: Tensor, sigmoid: Sigmoid = torch.sigmoid) -> Tensor:
        """Apply it to `[tokens, 2 * intermediate]`, gate first, or `[tokens, intermediate]`.

        Args:
            x: Result of the first GEMM, any floating dtype; the result has the same.
            sigmoid: Another sigmoid, to see what an approximate one does.
        """
        if not self.gated:
            return self.apply(x, sigmoid)
        gate, up = x.chunk(2, -1)
        return self.apply(gate, sigmoid) * self.linear(up)

    def apply(self, gate: Tensor, sigmoid: Sigmoid = torch.sigmoid) -> Tensor:
        """Compute the nonlinear factor."""
        if self.limit is not None and not self.clamp_after:
            gate = gate.clamp_max(self.limit)
        value = self._function(gate, sigmoid)
        if self.limit is not None and self.clamp_after:
            value = value.clamp_max(self.limit)
        return value

    def linear(self, up: Tensor) -> Tensor:
        """Compute the linear factor."""
        if self.limit is not None:
            up = up.clamp(-self.limit, self.limit)
        return up + self.beta if self.beta else up

    def _function(self, x: Tensor, sigmoid: Sigmoid) -> Tensor:
        if self.function == "silu":
            if self.alpha == 1 and sigmoid is torch.sigmoid:
                return torch.nn.functional.silu(x)
            return x * sigmoid(x * self.alpha if self.alpha != 1 else x)
        if self.function == "relu2":
            return x.relu().square()
        approximate = "tanh" if self.function == "gelu_tanh" else "none"
        return torch.nn.functional.gelu(x, approximate=approximate)


#: By the names that models use; `with_limit` adds a checkpoint's own clamp.
ACTIVATIONS: Mapping[str, Activation] = {
    a.name: a
    for a in (
        Activation("silu", "silu"),
        Activation("gelu", "gelu"),
        Activation("gelu_tanh", "gelu_tanh"),
        Activation("relu2", "relu2", gated=False),
        Activation("swigluoai", "silu", alpha=1.702, beta=1.0, limit=7.0),
        Activation("swiglustep", "silu", limit=7.0, clamp_after=True),
    )
}


def activation(name: str, *, limit: float | None = None) -> Activation:
    """Return the activation of this name; `limit` replaces its clamp.

    Raises:
        LayerError: There is no activation of this name.
    """
    if name not in ACTIVATIONS:
        raise LayerError(f"unknown activation {name!r}; activations: {', '.join(ACTIVATIONS)}")
    found = ACTIVATIONS[name]
    return found if limit is None else replace(found, limit=limit)
