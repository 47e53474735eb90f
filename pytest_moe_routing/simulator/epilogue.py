"""What the simulated kernels do with accumulators, in the kernels' own units.

The formulas are those of the batched GEMM's interface: scalars and limits come as arguments, and
whether they belong together is the caller's business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import gelu

from pytest_moe_routing.reference.quantization import dequantize, quantize
from pytest_moe_routing.schemes import Storage
from pytest_moe_routing.simulator.memory import Memory, stored_rows

#: float32 `[local_num_experts]` arguments, in any spelling.
PER_EXPERT = (
    *(f"output1_{scale}_scalar" for scale in ("scale", "scales")),
    *(f"output1_{scale}_gate_scalar" for scale in ("scale", "scales")),
    *(f"output2_{scale}_scalar" for scale in ("scale", "scales")),
    *("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit"),
)


@dataclass(frozen=True)
class Epilogue:
    """What one call does with the accumulators of its GEMMs, whatever the expert.

    Attributes:
        storage: What is stored in which format.
        kind: Member of `ActivationType`.
        given: The call's arguments.
    """

    storage: Storage
    kind: str
    given: dict[str, Any]

    @property
    def gated(self) -> bool:
        return self.kind in ("Swiglu", "SwigluStep", "Geglu")

    def run(
        self,
        x: Tensor,
        gemm1: Tensor,
        gemm2: Tensor,
        expert: int,
        memory: Memory,
        weight: Tensor | None,
    ) -> Tensor:
        """Return an expert's stored rows, bfloat16 `[tokens, hidden]`."""
        acc = x @ gemm1.T
        if weight is not None:
            acc = acc * weight.unsqueeze(1)
        acc = acc + self._bias("gemm1_bias", expert, acc.shape[1], self.gated, memory)
        if self.storage.gemm1 != "float32":
            acc = dequantize(quantize(acc, self.storage.gemm1))
        acc = self._store(self._activate(acc, expert)) @ gemm2.T
        acc = acc + self._bias("gemm2_bias", expert, acc.shape[1], False, memory)
        return (acc * self._scalar("output2", "scalar", expert)).to(torch.bfloat16)

    def _activate(self, acc: Tensor, expert: int) -> Tensor:
        scale_c = self._scalar("output1", "scalar", expert)
        scale_gate = self._scalar("output1", "gate_scalar", expert)
        if self.kind == "Relu2":
            return scale_c * (acc * scale_gate).clamp_min(0) ** 2
        linear, gate = acc.chunk(2, -1)
        limit = self._number("gemm1_clamp_limit", expert, float("inf"))
        if self.kind == "Geglu":
            return scale_c * linear * gelu(gate * scale_gate, approximate="tanh")
        if self.kind == "SwigluStep":
            if self.given.get("gemm1_clamp_limit") is None:
                limit = 7.0 / scale_gate
            gate = _silu(gate * scale_gate, 1.0).clamp_max(limit * scale_gate)
            return scale_c * linear.clamp(-limit, limit) * gate
        gate = _silu(gate.clamp_max(limit) * scale_gate, self._number("gemm1_alpha", expert, 1.0))
        beta = self._number("gemm1_beta", expert, 0.0)
        return scale_c * (linear.clamp(-limit, limit) + beta) * gate

    def _store(self, x: Tensor) -> Tensor:
        """Return the intermediate as the second GEMM reads it, in units of its static scale."""
        format = self.storage.intermediate
        if "bf16" in (self.storage.activated, format):
            x = x.to(torch.bfloat16).to(torch.float32)
        if format == "bf16":
            return x
        if format == "fp8":
            return x.clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32)
        if format == "nvfp4":
            return dequantize(quantize(x, format, global_scale=1.0))
        return dequantize(quantize(x, format))

    def _bias(
        self, name: str, expert: int, rows: int, gated: bool, memory: Memory
    ) -> Tensor | float:
        bias = self.given.get(name)
        if bias is None:
            return 0.0
        found: Tensor = bias[expert].index_select(0, stored_rows(rows, gated, memory))
        return found

    def _scalar(self, output: str, which: str, expert: int) -> float:
        for spelt in ("scale", "scales"):
            given = self.given.get(f"{output}_{spelt}_{which}")
            if given is not None:
                return float(given[expert])
        return 1.0

    def _number(self, name: str, expert: int, default: float) -> float:
        given = self.given.get(name)
        return default if given is None else float(given[expert])


def _silu(x: Tensor, alpha: float) -> Tensor:
    """With the kernels' sigmoid."""
    return x * (0.5 * torch.tanh(0.5 * alpha * x) + 0.5)
