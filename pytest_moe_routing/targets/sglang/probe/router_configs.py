"""SGLang's torch routing functions, each with all of its switches.

A model's TopK reaches some of them only with a runner or a device that was asked for, or with a
bias for each token; the functions are called as `select_experts` calls them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets.contract import Names
from pytest_moe_routing.targets.mixers import UNTIED, WrongMixer, mixer_problem
from pytest_moe_routing.targets.sglang.probe.router_case import Case
from pytest_moe_routing.targets.sglang.probe.ways import PLAIN

_SCALE = 2.5


@dataclass(frozen=True)
class _Shape:
    """How many experts a router has, how many groups it has and keeps, and how many it chooses."""

    experts: int
    groups: tuple[int, int]
    top_k: int

    def __str__(self) -> str:
        groups = f", {self.groups[1]} of {self.groups[0]} groups" if self.groups[0] > 1 else ""
        return f"{self.top_k} of {self.experts} experts{groups}"


#: Within each limit of the kernels that a function chooses from, and past it.
_SHAPES = (
    _Shape(256, (8, 4), 8),
    _Shape(192, (8, 4), 4),
    _Shape(256, (16, 8), 9),
    _Shape(512, (8, 2), 8),
    _Shape(256, (8, 5), 8),
    _Shape(64, (8, 4), 4),
    _Shape(64, (1, 1), 1),
    _Shape(512, (1, 1), 1),
    _Shape(64, (1, 1), 6),
    _Shape(384, (1, 1), 8),
    _Shape(160, (1, 1), 12),
    _Shape(896, (1, 1), 16),
)


@dataclass(frozen=True)
class _Function:
    """A function of `topk.py`: what it routes by, who reaches it, and how.

    Attributes:
        score: Scoring functions that its callers ask it for.
        group_score: How it ranks groups; "" when it has none.
        shapes: Of its routers, if it chooses a kernel by them.
    """

    name: str
    score: tuple[str, ...]
    bias: bool
    way: str
    reach: str
    group_score: str = ""
    shapes: tuple[_Shape, ...] = ()


_ALL = ("softmax", "sigmoid", "sqrtsoftplus")
_UNUSED = "no caller in 0.5.23"
_ROUTED = "--moe-runner-backend flashinfer_trtllm_routed"
_FUNCTIONS = (
    _Function("grouped_topk_gpu", _ALL[:2], False, "cuda", "opt-in", "max"),
    _Function("biased_grouped_topk_impl", _ALL[1:2], True, "a bias a token", "opt-in", "top2_sum"),
    _Function(
        "biased_grouped_topk_gpu", _ALL[1:2], True, "cuda", "no known model", "top2_sum", _SHAPES
    ),
    _Function("kimi_k2_biased_topk_impl", _ALL[1:2], True, _UNUSED, "no known model"),
    _Function("biased_topk_impl", _ALL[1:], True, _UNUSED, "no known model"),
    _Function("fused_topk_torch_native", _ALL, False, "cpu", "opt-in"),
    _Function("fused_topk_torch_native", _ALL, True, "cpu", "opt-in"),
    _Function("fused_topk_softmax_torch_raw_logits", _ALL[:1], False, _ROUTED, "opt-in"),
)


def cases(names: Names) -> Iterator[Case]:
    """Yield every combination of switches that a function of the release has."""
    for row in _FUNCTIONS:
        key = f"router-functions.{row.name}"
        if not names.has(key):
            continue
        function = names.get(key)
        parameters = inspect.signature(function).parameters
        if row.bias and "correction_bias" not in parameters:
            continue
        scaling = (
            (False, True) if "apply_routed_scaling_factor_on_output" in parameters else (False,)
        )
        shared = (0, 1) if "num_fused_shared_experts" in parameters else (0,)
        usual = _Shape(64, (8, 4) if row.group_score else (1, 1), 4)
        switches = product(row.shapes or (usual,), row.score, (True, False), scaling, shared)
        for shape, score, normed, scaled, slots in switches:
            if len(row.score) > 1 and "scoring_func" not in parameters and score != row.score[0]:
                continue
            yield _case(row, function, shape, score, normed, scaled, slots)
    if names.has("router-phimoe"):
        yield _sparse_mixer(names.get("router-phimoe"))


def _sparse_mixer(function: Callable[..., Any]) -> Case:
    """Return Phi-3.5-MoE's routing function, whose weights a reference of its own judges."""
    recipe = Recipe(top_k=2, score="softmax")

    def forward(hidden: Tensor, logits: Tensor) -> Any:
        weights, ids = function(hidden, logits, recipe.top_k, renormalize=False)
        problem = mixer_problem(weights, ids, logits)
        if problem is not None:
            raise WrongMixer(problem)
        # No recipe has the weights.
        return SimpleNamespace(topk_weights=logits.softmax(-1).gather(-1, ids), topk_ids=ids)

    subject = "models.phimoe.phimoe_routing_function"
    return Case(forward, None, recipe, 16, torch.float32, subject=subject, patterns=UNTIED)


def _case(
    row: _Function,
    function: Callable[..., Any],
    shape: _Shape,
    score: str,
    normed: bool,
    scaled: bool,
    slots: int,
) -> Case:
    groups = shape.groups
    recipe = Recipe(
        top_k=shape.top_k,
        score=score,
        bias=row.bias,
        n_group=groups[0],
        topk_group=groups[1],
        group_score=row.group_score or "top2_sum",
        normalize="sum" if normed else "none",
        epsilon=1e-20 if normed else 0.0,
        scale=_SCALE if scaled else 1.0,
    )
    config = SimpleNamespace(
        correction_bias=torch.zeros(shape.experts, dtype=torch.float32) if row.bias else None
    )

    def forward(hidden: Tensor, logits: Tensor) -> Any:
        arguments = {
            "hidden_states": hidden,
            "gating_output": logits,
            "topk": shape.top_k + slots,
            "renormalize": normed,
            "num_expert_group": groups[0],
            "topk_group": groups[1],
            "scoring_func": score,
            "num_fused_shared_experts": slots,
            "routed_scaling_factor": _SCALE,
            "apply_routed_scaling_factor_on_output": scaled,
            "correction_bias": config.correction_bias,
        }
        names = inspect.signature(function).parameters
        weights, ids = function(**{k: v for k, v in arguments.items() if k in names})
        return SimpleNamespace(topk_weights=weights, topk_ids=ids)

    switches = [score, "bias" if row.bias else "no bias"]
    switches += ["renormalize" if normed else "no renormalize"]
    switches += ["scale on the output"] * scaled + ["a fused shared expert"] * bool(slots)
    switches += [str(shape)] * bool(row.shapes)
    return Case(
        forward,
        config if row.bias else None,
        recipe,
        shape.experts,
        torch.float32,
        row.way,
        row.reach,
        ", ".join(switches),
        shared_weight=(1.0 if scaled else 1 / _SCALE) if slots else None,
        patterns=PLAIN if row.shapes else None,
    )
