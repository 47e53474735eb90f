"""Runs a block with a layer of experts for each kind of token, such as text and images.

A mask tells the kinds apart: False is the first kind, True the second. Each kind has a gate of its
own, and its row of the one bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.dtypes import Dtypes
from pytest_moe_routing.targets.vllm.probe.layer_recorder import Recorder
from pytest_moe_routing.targets.vllm.probe.running import TOKENS, run


@dataclass(frozen=True)
class KindRun:
    """A block that was run with tokens of one kind.

    Attributes:
        name: That of the kind's layer in the block.
        layer: The layer that was called.
        logits: The router logits that it was handed.
        output: What the block returned.
        problem: How tokens of this kind are not routed by their own gate, bias and experts; None if
            they are.
    """

    name: str
    layer: Recorder
    logits: Tensor
    output: Tensor
    problem: str | None


@dataclass(frozen=True)
class TokenKinds:
    """The kinds of tokens that a block tells apart.

    Attributes:
        block: The block.
        layers: The layers that it made.
        row: `kinds` of its row in `blocks.yaml`.
        hidden_size: The width of hidden states.
        dtypes: Notes what the block computes.
    """

    block: nn.Module
    layers: Sequence[Recorder]
    row: Mapping[str, Any]
    hidden_size: int
    dtypes: Dtypes

    def runs(self) -> Iterator[KindRun]:
        """Yield a run of each kind.

        Raises:
            Unsupported: The block does not call one layer for tokens of one kind.
        """
        self._mark_rows()
        for kind, name in enumerate(self.row["layers"]):
            output = self._run(torch.full((TOKENS, 1), bool(kind)))
            called = [layer for layer in self.layers if layer.logits is not None]
            if len(called) != 1 or called[0].logits is None:
                raise Unsupported(f"tokens of the kind of {name} go to {len(called)} MoE layers")
            [layer], logits = called, called[0].logits
            problems = (*self._problems(kind, layer, logits), *self._without_mask(kind))
            alone = next(iter(problems), None)
            problem = alone or next(self._mixed(kind), None)
            yield KindRun(name, layer, logits, output, problem)

    def _mark_rows(self) -> None:
        """Have each row of a bias hold the number of its kind."""
        for parameter in self.block.parameters(recurse=False):
            if parameter.dim() == 2 and len(parameter) == len(self.row["layers"]):
                parameter.data.copy_(torch.arange(float(len(parameter))).unsqueeze(1))

    def _problems(self, kind: int, layer: Recorder, logits: Tensor) -> Iterator[str]:
        """Yield what of another kind routes the tokens of a layer's last call."""
        name, gate = self.row["layers"][kind], self.row["gates"][kind]
        if layer is not getattr(self.block, name):
            yield f"tokens of {name} go to another layer"
        weights = self.dtypes.weights_of(logits, self.block)
        if weights.keys() != {f"{gate}.weight"}:
            yield f"the logits of {name} are those of {', '.join(sorted(weights)) or 'no gate'}"
        bias = layer.arguments.get("e_score_correction_bias")
        if bias is not None and not bool((bias == kind).all()):
            yield f"{name} has the bias of another kind of tokens"

    def _without_mask(self, kind: int) -> Iterator[str]:
        """Yield what is wrong with tokens of the first kind that come without a mask."""
        if not kind:
            self._run(None)
            first = getattr(self.block, self.row["layers"][kind])
            if [layer for layer in self.layers if layer.logits is not None] != [first]:
                yield "tokens without a mask go to another layer"

    def _mixed(self, kind: int) -> Iterator[str]:
        """Yield what is wrong with the tokens of a kind among those of the others."""
        name = self.row["layers"][kind]
        mask = torch.arange(TOKENS).unsqueeze(1) % 3 == 0
        marks = (mask + 1).to(torch.bfloat16).expand(-1, self.hidden_size)
        for number, layer in enumerate(self.row["layers"], 1):
            getattr(self.block, layer).returned = torch.tensor(number, dtype=torch.bfloat16)
        try:
            output = self._run(mask, hidden_states=marks.clone())
        finally:
            for layer in self.layers:
                layer.returned = torch.ones(())
        called = getattr(self.block, name)
        if called.logits is None or called.hidden_states is None:
            yield f"{name} is not called for a batch of several kinds"
            return
        yield from self._problems(kind, called, called.logits)
        own = marks[mask[:, 0] == bool(kind)]
        if not torch.equal(called.hidden_states, own):
            yield f"{name} is given other tokens in a batch of several kinds"
        if not torch.equal(output[mask[:, 0] == bool(kind)].to(own.dtype), own):
            yield f"tokens of {name} get another output in a batch of several kinds"

    def _run(self, mask: Tensor | None, **arguments: Any) -> Tensor:
        for layer in self.layers:
            layer.forget()
        return run(self.block, self.hidden_size, **{self.row["mask"]: mask}, **arguments)
