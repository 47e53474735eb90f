"""Asks the CUTLASS experts of a release whether they apply a router weight that the input has.

vLLM's step before the experts multiplies the input of a model that weighs it, such as Llama 4. The
experts are told so, and must not apply the weight again. They are those that a server takes for
`--moe-backend`, and run on marked tokens with vLLM's own steps before and after; only the compiled
operators are replaced.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import marked
from pytest_moe_routing.targets.marked import Marked
from pytest_moe_routing.targets.vllm.probe import release as release
from pytest_moe_routing.targets.vllm.probe.capture import on_one_gpu
from pytest_moe_routing.targets.vllm.probe.choice import selector_of
from pytest_moe_routing.targets.vllm.probe.config import NoActivation, quant_config
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES
from pytest_moe_routing.targets.vllm.probe.layer import HIDDEN, layer_of
from pytest_moe_routing.targets.vllm.probe.prepared import prepare_finalize
from pytest_moe_routing.targets.vllm.probe.ranks import TOKENS, Ranks
from pytest_moe_routing.targets.vllm.probe.rejections import Rejected, rejections
from pytest_moe_routing.targets.vllm.probe.release import names

_ONCE = "once"
#: The value of `--moe-backend` for the experts, and their key of `contract.yaml`.
_BACKENDS = {"cutlass": "modular-cutlass-nvfp4"}


def weight_on_input(model: Mapping[str, Any], scheme: str, method: str) -> dict[str, Any] | None:
    """Return what becomes of the request, as `around` does.

    None if the model weighs the output, or the server takes no such experts for its layers.

    Raises:
        Unsupported: The experts compute something else, with whatever weights.
    """
    found = list(_asked(model, scheme, method))
    if not found:
        return None
    wrong = [each for each in found if each[2] != _ONCE] or found[:1]
    return {
        "answer": "honored" if wrong[0][2] == _ONCE else "ignored",
        "why": "; ".join(f"with {each[0]}, it is applied {each[2]}" for each in wrong),
        "switches": [f"--moe-backend {wrong[0][1]}"],
        "source": wrong[0][3],
    }


def _asked(
    model: Mapping[str, Any], scheme: str, method: str
) -> Iterator[tuple[str, str, str, str]]:
    """Yield the experts, their `--moe-backend`, and how often they and vLLM apply the weight.

    File and line of the experts' code come last.
    """
    if model["router"]["weight_on"] != "input":
        return
    try:
        selector = selector_of(model, scheme, method)
    except NoActivation:
        return
    if selector is None:
        return
    for backend, key in _BACKENDS.items():
        with on_one_gpu():
            try:
                with rejections():
                    taken = selector(replace(selector.config, moe_backend=backend))
            except Rejected:
                continue
            if names().has(key) and taken is names().get(key):
                code = taken.apply.__code__
                source = f"{release.vllm_path(code.co_filename)}:{code.co_firstlineno}"
                yield taken.__name__, backend, _times(model, scheme, method, taken), source


def _times(model: Mapping[str, Any], scheme: str, method: str, experts: Any) -> str:
    """Return how often the weight is applied between a layer and the sum of its experts."""
    row = SCHEMES[scheme]
    layer = layer_of(model, row, method, Ranks())
    count = layer.global_num_experts
    given = Marked.make(TOKENS, HIDDEN, count, layer.top_k)
    fused = experts(layer.config, quant_config(row, count))
    kernel = names().get("kernel")(prepare_finalize(layer.config, fused), fused)
    operators = _Operators(given.ids, count)
    module = vars(sys.modules[experts.__module__])
    # Those of the probe: a class of vLLM does not define them.
    weights = vars(layer.asked)
    arguments = {
        "hidden_states": given.hidden.clone(),
        "w1": weights["w13_weight"],
        "w2": weights["w2_weight"],
        "topk_weights": given.weights.clone(),
        "topk_ids": given.ids.clone(),
        "activation": layer.asked.activation,
        "global_num_experts": count,
        "expert_map": None,
        "apply_router_weight_on_input": True,
    }
    accepted = names().accepted("kernel-call", arguments)
    with patch.dict(module, {"ops": operators}):
        output = names().get("kernel-call")(kernel, **accepted)
    again = replace(given, hidden=(given.hidden * given.weights).bfloat16())
    outputs = {
        _ONCE: given.output(0, count, on_input=True),
        "twice, on the input": again.output(0, count, on_input=True),
        "on the input and on the output": again.output(0, count, on_input=False),
        "on the output": given.output(0, count, on_input=False),
    }
    for times, wanted in outputs.items():
        if marked.times(output.float(), wanted) is not None:
            return times
    raise Unsupported(f"not judged: {experts.__name__} does not run here")


class _Operators:
    """Compiled operators, for tokens of one expert each: their rows need not be sorted."""

    def __init__(self, ids: Tensor, num_experts: int) -> None:
        self._ids, self._num_experts = ids, num_experts
        self._hidden: Tensor | None = None

    def _experts(self, hidden: Tensor, weights: Tensor) -> Tensor:
        return Marked(hidden, self._ids, weights).output(0, self._num_experts, on_input=False)

    def shuffle_rows(self, x: Tensor, rows: Tensor) -> Tensor:
        return x[rows.long()]

    def __getattr__(self, name: str) -> Any:
        if name.endswith("moe_mm_data"):
            return self._sort
        if name.endswith("experts_quant"):
            return self._quantize
        if name.endswith("moe_mm"):
            return self._multiply
        raise AttributeError(name)

    def _sort(self, ids: Tensor, *arguments: Any, **_: Any) -> None:
        """Sort no rows: the two maps of rows have a number for each slot."""
        for rows in arguments:
            if isinstance(rows, Tensor) and rows.shape == (ids.numel(),):
                rows.copy_(torch.arange(ids.numel()))

    def _quantize(self, x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self._hidden is None:
            self._hidden = x.float()
        return x, x

    def _multiply(self, out: Tensor, *_: Any, **__: Any) -> None:
        """Give what the experts compute; the first of two products is read by nobody."""
        out.zero_()
        if out.shape[1] == HIDDEN and self._hidden is not None:
            out.copy_(self._experts(self._hidden, torch.ones_like(self._ids, dtype=torch.float32)))
