"""Experts that sign their work: from an output one reads which experts made it, and how much.

Every token is a row of ones, and every expert answers with its own pattern of signs, orthogonal to
all others (Sylvester's Hadamard matrix). All numbers are powers of two, which every format holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_moe_routing.errors import LayerError
from pytest_moe_routing.reference.moe import MoELayer, real_input, run_expert
from pytest_moe_routing.reference.quantization import Quantized, quantize
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.weights import Expert

#: A share of the largest weight below which an expert counts as not used.
_TRACE = 0.02


@dataclass(frozen=True)
class FingerprintExperts:
    """Experts with recognizable outputs, for `hidden`; a weights provider.

    Attributes:
        num_experts, hidden_size, intermediate_size: Shape of the layer. There must be a hidden
            element for each expert, rounded up to a power of two.
        layer: Formats and activation.
        intermediate_scale: As in `Expert`.
    """

    num_experts: int
    hidden_size: int
    intermediate_size: int
    layer: MoELayer
    intermediate_scale: float | None = None

    def __post_init__(self) -> None:
        if self.hidden_size < 1 << (self.num_experts - 1).bit_length():
            raise LayerError(
                f"fingerprints: found hidden_size {self.hidden_size}, which is too small to tell "
                f"{self.num_experts} experts apart"
            )

    def __len__(self) -> int:
        return self.num_experts

    def __getitem__(self, expert: int, /) -> Expert:
        if not 0 <= expert < self.num_experts:
            raise IndexError(f"expert {expert} of {self.num_experts}")
        halves = 2 if self.layer.activation.gated else 1
        # The gate sums up to about 2 and the up half to 1, so that swapping them shows.
        size = 2.0 ** -(self.hidden_size.bit_length() - 1)
        gemm1 = torch.full((halves * self.intermediate_size, self.hidden_size), size)
        gemm1[: self.intermediate_size] *= 2
        size = 2.0 ** -(self.intermediate_size.bit_length() - 1)
        gemm2 = (size * self.signs(expert)).unsqueeze(1).expand(-1, self.intermediate_size)
        weight = self.layer.storage.weight
        return Expert(
            quantize(gemm1, weight),
            quantize(gemm2, weight),
            intermediate_scale=self.intermediate_scale,
        )

    def hidden(self, tokens: int) -> Quantized:
        """Hidden states for this many tokens, as the kernel takes them."""
        return quantize(torch.ones(tokens, self.hidden_size), self.layer.storage.input)

    def signs(self, expert: int) -> Tensor:
        """An expert's pattern, `[hidden]` of 1 and -1: the parity of the bits in common."""
        common = torch.arange(self.hidden_size) & expert
        signs = torch.ones(self.hidden_size)
        for bit in range(expert.bit_length()):
            signs = torch.where((common >> bit) & 1 == 1, -signs, signs)
        return signs

    def read(self, output: Tensor) -> Tensor:
        """The weight of each expert in an output `[tokens, hidden]`: `[tokens, num_experts]`.

        Weights on the input are read as what they do to the output.
        """
        x = real_input(self.hidden(1), self.layer, torch.float64)
        answers = torch.cat([run_expert(x, self[e], self.layer).output for e in range(len(self))])
        # Orthogonal, but for what the formats round: least squares through the normal equations.
        gram = answers @ answers.T
        weights: Tensor = torch.linalg.solve(gram, answers @ output.to(torch.float64).T).T
        return weights

    def explain(self, output: Tensor, routing: Routing) -> list[str]:
        """For each token whose experts or weights are not the routing's: wanted and used."""
        used, wanted = self.read(output), routing.dense(self.num_experts).to(torch.float64)
        scale = wanted.abs().amax(1, keepdim=True)
        lines = []
        for token in ((used - wanted).abs() > _TRACE * scale).any(1).nonzero().flatten().tolist():
            shown = [
                "  ".join(
                    f"{e}: {w:.3g}"
                    for e, w in enumerate(row.tolist())
                    if abs(w) > _TRACE * scale[token, 0]
                )
                for row in (wanted[token], used[token])
            ]
            lines.append(f"token {token}: wanted {shown[0]}, used {shown[1]}  (expert: weight)")
        return lines
