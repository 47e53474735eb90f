"""A fused MoE written by someone else: tokens and slots in loops, one defect on request.

It shares with the package only the number formats, which other tests check bit for bit. It can
round as real kernels do (another order of summation, bfloat16 before quantizing, an approximate
sigmoid), and it can be wrong in the ways that real kernels have been.
"""

import math
from dataclasses import dataclass, field

import torch

from pytest_moe_routing.reference.quantization import dequantize, fake_quantize

#: What a kernel stores between the GEMMs and after the first one, by scheme.
STORED = {
    "bf16": ("bf16", None),
    "fp8_per_tensor": ("fp8", None),
    "fp8_block": ("fp8_1x128", "fp8_1x128"),
    "mxfp8": ("mxfp8", None),
    "nvfp4": ("nvfp4", None),
    "nvfp4_per_token": ("nvfp4_token", None),
    "mxfp4": ("mxfp8", None),
    "mxfp4_bf16": ("bf16", None),
    "mxint4": ("bf16", None),
    "fp8_per_channel": ("fp8_token", None),
}


@dataclass
class Toy:
    """One call: what is computed, what is wrong with it, and how it rounds."""

    scheme: str
    activation: str = "silu"
    top_k: int = 3
    scale: float = 2.5
    on_input: bool = False
    limit: float | None = None
    defect: str | None = None
    rounding: frozenset = frozenset()
    cache: dict = field(default_factory=dict)

    def __call__(self, hidden, experts, logits, bias):
        x = dequantize(hidden)
        if self.defect == "transposed scales":
            flat = hidden.scales.T.contiguous().view(hidden.scales.shape)
            x = dequantize(type(hidden)(hidden.format, hidden.data, flat, hidden.global_scale))
        out = torch.zeros_like(x)
        for token in range(len(x)):
            for expert, weight in self.choose(logits[token].tolist(), bias.tolist()):
                if self.defect == "next expert":
                    expert = (expert + 1) % len(experts)
                row = self.run(x[token], self.open(experts, expert), weight)
                on_output = self.on_input == (self.defect == "wrong side")
                out[token] += row * weight if on_output else row
        return out.to(torch.bfloat16)

    def choose(self, logits, bias):
        """Sigmoid, bias to choose only, top k, divided by the sum, scaled."""
        if self.defect == "rounded bias":
            bias = torch.tensor(bias).to(torch.bfloat16).tolist()
        if self.defect == "no bias":
            bias = [0.0] * len(bias)
        scores = [1 / (1 + math.exp(-z)) for z in logits]
        order = sorted(range(len(scores)), key=lambda e: (-(scores[e] + bias[e]), e))
        chosen = order[: self.top_k]
        total = sum(scores[e] for e in chosen)
        scale = {"no scale": 1.0, "scale twice": self.scale**2}.get(self.defect, self.scale)
        pairs = [(e, scores[e] / total * scale) for e in chosen]
        return pairs[:-1] if self.defect == "truncated" else pairs

    def open(self, experts, number):
        if number not in self.cache:
            e = experts[number]
            gemm1, gemm2 = e.gemm1, e.gemm2
            if self.defect == "scale row":
                rolled = torch.cat([gemm1.scales[-1:], gemm1.scales[:-1]])
                gemm1 = type(gemm1)(gemm1.format, gemm1.data, rolled, gemm1.global_scale)
            self.cache[number] = (dequantize(gemm1), dequantize(gemm2), e)
        return self.cache[number]

    def dot(self, matrix, x):
        """A matrix-vector product, summed from the far end in chunks of 16."""
        if "order" not in self.rounding:
            return matrix @ x
        partial = (matrix * x).flip(1).view(len(matrix), -1, 16).sum(2)
        total = torch.zeros(len(matrix))
        for k in range(partial.shape[1]):
            total = total + partial[:, k]
        return total

    def sigmoid(self, x):
        exact = 1 / (1 + torch.exp(-x))
        if "tanh" not in self.rounding:
            return exact
        return exact + 2.5e-4 * torch.sin(997 * x).sign()

    def run(self, x, opened, weight):
        gemm1, gemm2, e = opened
        y = self.dot(gemm1, x)
        if self.on_input != (self.defect == "wrong side"):
            y = y * weight
        if e.bias1 is not None and self.defect != "no expert bias":
            y = y + e.bias1
        between, after = STORED[self.scheme]
        if after:
            y = fake_quantize(y.unsqueeze(0), after)[0]
        h = self.activate(y)
        if "bf16" in self.rounding or between in ("fp8_token", "nvfp4_token"):
            h = h.to(torch.bfloat16).float()
        static = {}
        if between == "fp8":
            static = {"scales": torch.tensor([[e.intermediate_scale]])}
        if between == "nvfp4":
            static = {"global_scale": e.intermediate_scale}
        h = fake_quantize(h.unsqueeze(0), between, **static)[0]
        y = self.dot(gemm2, h)
        if e.bias2 is not None and self.defect != "no expert bias":
            y = y + e.bias2
        return y.to(torch.bfloat16).float()

    def activate(self, y):
        if self.activation == "relu2":
            return torch.where(y > 0, y, 0) ** 2
        half = len(y) // 2
        gate, up = y[:half], y[half:]
        if self.defect == "swapped":
            gate, up = up, gate
        limit = torch.inf if self.limit is None or self.defect == "no clamp" else self.limit
        if self.activation == "swiglustep":
            return torch.minimum(gate * self.sigmoid(gate), torch.tensor(limit)) * torch.clamp(
                up, -limit, limit
            )
        if self.activation == "gelu":
            return 0.5 * gate * (1 + torch.erf(gate / math.sqrt(2))) * up
        if self.activation == "gelu_tanh":
            inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
            return 0.5 * gate * (1 + torch.tanh(inner)) * up
        alpha, beta = (1.702, 1.0) if self.activation == "swigluoai" else (1.0, 0.0)
        gate = torch.minimum(gate, torch.tensor(limit))
        return gate * self.sigmoid(alpha * gate) * (torch.clamp(up, -limit, limit) + beta)
