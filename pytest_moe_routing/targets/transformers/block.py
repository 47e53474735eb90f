"""A MoE block of transformers, run as a router: its experts note what they are called with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import RouterConfig

#: Relative precision of the factor that is measured on a block's output.
_MEASURED = 1e-4


class _Experts(nn.Module):
    """In the place of a block's experts: notes ids and weights, and returns a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0.0
        self.called_with: list[tuple[Tensor, Tensor]] = []

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        ids = [x for x in given if not x.is_floating_point()]
        weights = [x for x in given if x.is_floating_point()]
        if len(ids) != 1 or len(weights) != 1 or ids[0].shape != weights[0].shape:
            raise Unsupported("the block does not call its experts with ids and weights")
        self.called_with.append((ids[0], weights[0]))
        return torch.full_like(hidden, self.value)


class Block:
    """A model's MoE block, as a router.

    Its gate has a row for each expert, and may have more for shared experts, whose logits are 0.
    """

    def __init__(self, block: nn.Module, router: RouterConfig, shared_experts: int = 0) -> None:
        num_experts = router.num_experts
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module):
            raise Unsupported(f"{type(block).__name__} has no experts of its own")
        self.name = type(block).__qualname__
        self._block, self._experts = block, _Experts()
        block.experts = self._experts
        tensors = tensors_of(block)
        rows = {num_experts, num_experts + shared_experts}
        gates = [x for _, x in tensors if x.shape[1:] == (num_experts,) and len(x) in rows]
        if len(gates) != 1:
            raise Unsupported(f"{self.name} has {len(gates)} gates, not one")
        biases = [x for name, x in tensors if is_bias(name) and x.numel() == num_experts]
        expected = int(router.correction_bias is not None)
        if len(biases) != expected:
            raise Unsupported(f"{self.name} has {len(biases)} correction biases, not {expected}")
        self._bias = biases[0] if biases else None
        for _, tensor in tensors:
            tensor.zero_()
        gates[0].copy_(torch.eye(*gates[0].shape))

    def route(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weights and ids, with what the block multiplies the experts' output by."""
        if self._bias is not None and bias is not None:
            self._bias.copy_(bias.view_as(self._bias))
        nothing, one = (self._output(logits, value) for value in (0.0, 1.0))
        factors = (one - nothing).flatten()
        factor = factors[0]
        if not torch.allclose(factors, factor.expand_as(factors), rtol=_MEASURED):
            raise Unsupported(f"{self.name} does more than scale what its experts return")
        ids, weights = self._experts.called_with[-1]
        return weights.reshape(len(logits), -1) * factor, ids.reshape(len(logits), -1)

    def chosen(self, logits: Tensor) -> Tensor:
        """Return the experts of each token without a bias, by number."""
        if self._bias is not None:
            self._bias.zero_()
        self._output(logits, 0.0)
        return self._experts.called_with[-1][0].reshape(len(logits), -1).sort(dim=1).values

    def _output(self, logits: Tensor, value: float) -> Tensor:
        self._experts.value = value
        self._experts.called_with.clear()
        output = self._block(logits.unsqueeze(0))
        if len(self._experts.called_with) != 1:
            raise Unsupported(
                f"{self.name} calls its experts {len(self._experts.called_with)} times"
            )
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, Tensor)
        return first


def tensors_of(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return a module's parameters and buffers, with their names."""
    return [*module.named_parameters(), *module.named_buffers()]


def is_bias(name: str) -> bool:
    """Return whether a parameter or buffer of this name is a router's correction bias."""
    return name.rpartition(".")[2] in ("e_score_correction_bias", "expert_bias", "moe_statics")
