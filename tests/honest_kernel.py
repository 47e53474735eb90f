"""Fused MoE kernels that are right, each in its own way, and as fast as torch makes them.

They share with the package the number formats alone, which other tests check bit for bit. What they
choose for themselves: the order of summation, the length of partial sums, whether the activation's
result is rounded to bfloat16 before it is quantized, and the error of their sigmoid.
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import gelu
from toy_kernel import STORED

from pytest_moe_routing.reference.quantization import dequantize, fake_quantize

#: Just within what CUDA documents for `tanh.approx.f32`: half of 2**-10.987.
_TANH = 0.98 * 2**-11 / 2


@dataclass(frozen=True)
class Honest:
    """One kernel.

    Attributes:
        seed: Of its order of summation.
        chunk: How many products are summed at a time.
        bf16: It rounds the activation's result.
        sigmoid: Share of the largest error of a sigmoid made of `tanh.approx.f32` that its own has:
            from -1 to 1.
        wiggle: The error changes its sign along the axis, as that of a piecewise fit does.
    """

    seed: int = 0
    chunk: int = 64
    bf16: bool = False
    sigmoid: float = 0.0
    wiggle: bool = False

    @classmethod
    def drawn(cls, seed):
        """A kernel by number: all combinations come up."""
        return cls(
            seed,
            (16, 32, 64, 128)[seed % 4],
            bool(seed // 4 % 2),
            (0.0, 1.0, -1.0, 1.0)[seed // 8 % 4],
            seed // 8 % 4 == 3,
        )

    def __call__(self, problem, opened=None, raw=False):
        """The output `[tokens, hidden]`, bfloat16, or float32 as it is before it is stored.

        `opened` keeps the real weights from one call to the next.
        """
        opened = {} if opened is None else opened
        x = dequantize(problem.hidden)
        ids, weights = problem.routing.topk_ids, problem.routing.topk_weights.float()
        out = torch.zeros_like(x)
        for expert in ids.unique().flip(0).tolist():
            if problem.shard is not None and expert not in problem.shard.experts:
                continue
            token, slot = (ids == expert).nonzero(as_tuple=True)
            if expert not in opened:
                e = problem.experts[expert]
                opened[expert] = dequantize(e.gemm1), dequantize(e.gemm2), e
            weight = weights[token, slot].unsqueeze(1)
            on_input = problem.layer.weight_on == "input"
            rows = self.expert(x[token], *opened[expert], problem.layer, weight if on_input else 1)
            out[token] += rows if on_input else rows * weight
        return out if raw else out.to(torch.bfloat16)

    def expert(self, x, gemm1, gemm2, e, layer, weight):
        """Stored rows of one expert, as float32."""
        y = self.dot(x, gemm1) * weight
        if e.bias1 is not None:
            y = y + e.bias1
        between, after = STORED[layer.scheme]
        if after:
            y = fake_quantize(y, after)
        h = self.activate(y, layer.activation)
        if self.bf16:
            h = h.to(torch.bfloat16).float()
        static = {}
        if between == "fp8":
            static = {"scales": torch.tensor([[e.intermediate_scale]])}
        if between == "nvfp4":
            static = {"global_scale": e.intermediate_scale}
        y = self.dot(fake_quantize(h, between, **static), gemm2)
        if e.bias2 is not None:
            y = y + e.bias2
        return y.to(torch.bfloat16).float()

    def dot(self, x, matrix):
        """`x @ matrix.T`, in chunks of a permuted axis, one after the other."""
        order = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(self.seed))
        x, matrix = x[:, order], matrix[:, order]
        total = x.new_zeros(len(x), len(matrix))
        for start in range(0, x.shape[1], self.chunk):
            part = slice(start, start + self.chunk)
            total += x[:, part] @ matrix[:, part].T
        return total

    def activate(self, y, act):
        if act.function == "relu2":
            return y.clamp_min(0) ** 2
        gate, up = y.chunk(2, -1)
        limit = torch.inf if act.limit is None else act.limit
        if act.function == "silu":
            bounded = gate if act.clamp_after else gate.clamp_max(limit)
            value = bounded * self.approximate(act.alpha * bounded)
            value = value.clamp_max(limit) if act.clamp_after else value
        else:
            approximate = "tanh" if act.function == "gelu_tanh" else "none"
            value = gelu(gate.clamp_max(limit), approximate=approximate)
        return value * (up.clamp(-limit, limit) + act.beta)

    def approximate(self, x):
        """A sigmoid of tanh, whose error is relative to tanh."""
        half = torch.tanh(x / 2)
        error = _TANH * self.sigmoid * half
        if self.wiggle:
            error = error * torch.sin(997 * x).sign()
        return 0.5 * half + 0.5 + error
