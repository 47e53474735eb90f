"""One router of vLLM, run on all logits patterns and compared with what it should compute."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cache
from types import FrameType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from pytest_moe_routing.errors import RecipeError, Unsupported, place_of
from pytest_moe_routing.logits import make_case
from pytest_moe_routing.oracle.routers import (
    NOT_JUDGED,
    Deviation,
    ImpossibleArguments,
    Output,
    compare_router,
    output_problem,
)
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.vllm.probe import release

_HIDDEN = 64
_TOKENS = 24
#: Functions that decide or prepare, and compute no routing.
_HELPERS = (
    *("valid_grouping", "dispatch", "_get_padding", "can_use", "_aiter", "_convert"),
    *("<", "fast_topk"),
)
_BASES = ("BaseRouter.", "FusedMoERouter.")
#: Frames below these name the function that computed a routing.
_FILES = (
    *("/fused_moe/router/", "/fused_moe/fused_moe.py", "/fused_moe/cpu_fused_moe.py"),
    *("/model_executor/models/", "/vllm/models/"),
)


@dataclass(frozen=True)
class Case:
    """A router to run: how it is made for a bias, and what it should compute."""

    make: Callable[[Tensor | None], Any]
    recipe: Recipe
    num_experts: int
    dtype: torch.dtype
    way: str
    subject: str
    reach: str
    switches: Mapping[str, str] = field(default_factory=dict)
    #: What a router with other outputs than the recipe's is judged by instead.
    judge: Callable[[Case], list[Deviation]] | None = None
    #: The function of vLLM that is judged, where it is not the last routing function that runs.
    function: str = ""
    #: Its class, where that is not told by what is made.
    router: str = ""


#: What such a function is told of a model's router, besides its bias.
_SELECTION = (
    *("top_k", "use_grouped_topk", "renormalize", "topk_group", "num_expert_group"),
    *("custom_routing_function", "scoring_func", "routed_scaling_factor"),
)


#: What is told of it to an object that chooses among groups.
_GROUPED = (
    *("renormalize", "topk_group", "num_expert_group"),
    *("scoring_func", "routed_scaling_factor"),
)


class SelectExperts:
    """A function of a release without routers, called with what a layer gives it.

    Args:
        key: Its row of the contract.
        arguments: What the model's code says of its router.
    """

    def __init__(self, key: str, arguments: Mapping[str, Any]) -> None:
        self._key, self._arguments = key, arguments
        self.e_score_correction_bias = arguments["e_score_correction_bias"]

    @property
    def takes_dtype(self) -> bool:
        """Whether it is told the dtype of the ids."""
        row = f"{self._key}(indices_type)"
        names = release.names()
        return row in names.contract.rows and names.has(row)

    def __call__(
        self, hidden_states: Tensor, logits: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        arguments = {
            **{name: self._arguments[name] for name in _SELECTION},
            "hidden_states": hidden_states,
            "router_logits": logits,
            "e_score_correction_bias": self.e_score_correction_bias,
            **({"indices_type": dtype} if self.takes_dtype else {}),
        }
        names = release.names()
        # Some return as a third value what zero experts compute.
        weights, ids, *_ = names.get(self._key)(**names.accepted(self._key, arguments))
        return weights, ids


class LayerMethod(SelectExperts):
    """A layer's method that routes, called with a stand-in for the layer.

    Raises:
        Unsupported: The layer refuses such a router, which is then not reached.
    """

    takes_dtype = True

    def __init__(self, arguments: Mapping[str, Any]) -> None:
        super().__init__("router-method", arguments)
        # vllm/model_executor/layers/fused_moe/layer.py of 0.12.0 and 0.14.1, FusedMoE.__init__.
        is_flat = not arguments["use_grouped_topk"] and arguments["custom_routing_function"] is None
        if is_flat and arguments["scoring_func"] != "softmax":
            raise Unsupported("without groups, the layer accepts no scoring function but softmax")

    def __call__(
        self, hidden_states: Tensor, logits: Tensor, dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        names = release.names()
        asked = {name: self._arguments[name] for name in _SELECTION}
        grouped = None
        if asked["use_grouped_topk"] and names.has("router-method-grouped"):
            words = {name: asked[name] for name in _GROUPED}
            grouped = names.get("router-method-grouped")(topk=asked["top_k"], **words).forward_cuda
        layer = SimpleNamespace(
            **asked,
            global_num_experts=logits.shape[1],
            e_score_correction_bias=self.e_score_correction_bias,
            quant_method=SimpleNamespace(topk_indices_dtype=dtype),
            enable_eplb=False,
            zero_expert_num=None,
            zero_expert_type=None,
            vllm_config=SimpleNamespace(model_config=None),
            _grouped_topk_impl=grouped,
        )
        # The third value, of some releases, is what zero experts compute.
        weights, ids, *_ = names.get("router-method")(layer, hidden_states, logits)
        return weights, ids


def compare(case: Case, output: Output) -> dict[str, Any]:
    """Run a case on all logits patterns; an answer of `oracle.routers.RouterRun`."""
    called: dict[str, str] = {}
    with patch.dict(os.environ, case.switches):
        deviations = _deviations(case, output, called)
    function = case.function or innermost(called)
    return {
        # A mistake may keep it from being made: then that is the deviation.
        "router": case.router or type(case.make(None)).__name__,
        "function": function,
        "source": called.get(function, ""),
        "way": case.way,
        "subject": case.subject,
        "reach": case.reach,
        "called": list(called),
        "deviations": [asdict(deviation) for deviation in deviations],
    }


def _deviations(case: Case, output: Output, called: dict[str, str]) -> list[Deviation]:
    def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        stubs.Stub.asked.clear()
        try:
            with noting(called):
                return select(case.make(bias), logits)
        except Unsupported:
            raise
        except RecipeError as error:
            raise ImpossibleArguments(error) from error
        except Exception as error:
            if stubs.Stub.asked or not _by_vllm(error):
                raise Unsupported(f"{innermost(called)} does not run here: {error}") from error
            raise

    try:
        if case.judge is not None:
            with noting(called):
                try:
                    return case.judge(case)
                except RecipeError as error:
                    wrong = ImpossibleArguments(error)
                    return [Deviation(wrong.kind, "any", str(wrong), str(wrong))]
        found = compare_router(route, case.recipe, case.num_experts, case.dtype, output)
        return found if any(d.kind == "crash" for d in found) else [*found, *_other_dtypes(case)]
    except Unsupported as reason:
        return [Deviation(NOT_JUDGED, "", str(reason), str(reason))]


def select(router: Any, logits: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """Return the weights and ids of a router that is asked for ids of a dtype."""
    hidden = torch.zeros(len(logits), _HIDDEN, dtype=torch.bfloat16)
    answer: tuple[Tensor, Tensor]
    if isinstance(router, SelectExperts):
        answer = router(hidden, logits, dtype)
    elif release.names().has("router-call(topk_indices_dtype)"):
        answer = router.select_experts(hidden, logits, dtype)
    else:
        release.names().spelling("router-base.indices_type_getter")
        router.indices_type_getter = lambda: dtype
        answer = router.select_experts(hidden, logits)
    return answer


def _other_dtypes(case: Case) -> list[Deviation]:
    """Compare the ids' dtype with what fused experts ask for."""
    router = case.make(None)
    if isinstance(router, SelectExperts) and not router.takes_dtype:
        return []
    recipe, experts = case.recipe, case.num_experts
    plain = make_case("plain", recipe, num_tokens=_TOKENS, num_experts=experts)
    bias = None if plain.bias is None else plain.bias.to(getattr(torch, recipe.bias_dtype))
    for dtype in (torch.int32, torch.int64):
        try:
            weights, ids = select(case.make(bias), plain.logits.to(case.dtype), dtype)
        except Unsupported:
            raise
        except Exception:
            # A router may take only one of them.
            continue
        output = Output(ids=(str(dtype).removeprefix("torch."),))
        if problem := output_problem(weights, ids, output):
            return [Deviation("output", "plain", problem, problem)]
    return []


def _by_vllm(error: BaseException) -> bool:
    """Whether vLLM's own code raised an error, and no stand-in of ours."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and "/vllm/" in trace.tb_frame.f_code.co_filename


@contextmanager
def noting(called: dict[str, str]) -> Iterator[None]:
    """Note vLLM's routing functions that run, in order, by name: file and line of each."""

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        if event == "call" and _routes(frame.f_code.co_filename):
            called[frame.f_code.co_qualname] = place_of(frame, frame.f_code.co_firstlineno)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


@cache
def _routes(file: str) -> bool:
    """Return whether a file's functions compute routings; cached, as each call of Python asks."""
    return any(part in file for part in _FILES)


def innermost(called: Mapping[str, str]) -> str:
    """Return the last function that was called, helpers left out."""
    names = [
        name
        for name in called
        if not (name.startswith(_BASES) or name.rpartition(".")[2].startswith(_HELPERS))
    ]
    return names[-1] if names else "?"
