"""One routing function of SGLang, run on all logits patterns and compared with its recipe."""

from __future__ import annotations

import ast
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from pytest_moe_routing.errors import RecipeError, Unsupported, place_of
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.oracle.routers import (
    NOT_JUDGED,
    Deviation,
    ImpossibleArguments,
    Output,
    WrongAnswer,
    compare_router,
)
from pytest_moe_routing.routing import Recipe
from pytest_moe_routing.syntax import parse
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.sglang.probe import main as blocks
from pytest_moe_routing.targets.stubs import source_of

#: Small, and other than any number of experts.
HIDDEN = 32
#: The intermediate size of experts, other than that; blocks of 16 and of 32 fit it.
INNER = 96
#: The sizes of blocks whose experts are not run.
NARROW = HIDDEN, INNER
#: What consumers of TopK's output take.
_OUTPUT = Output(weights=("float32", "bfloat16"))
#: Frames of these files are SGLang's routing.
_FILES = ("/layers/moe/topk.py", "/layers/moe/hash_topk.py")
_MODELS = "/srt/models/"
#: Functions that choose, prepare or finish, and compute no routing.
_NOT_ROUTING = (
    *("TopK.", "TopKConfig.", "HashTopK._", "HashTopK.num_", "select_experts"),
    *("resolve_routing_inputs", "fused_shared_expert"),
    *("_", "is_", "capture_", "routing_", "has_"),
)


#: Attributes of configs that blocks read besides, and that do not matter to routing.
_FURTHER: Mapping[str, Mapping[str, Any]] = {
    "GptOssForCausalLM": {"swiglu_limit": None, "dtype": None},
    "KimiK3ForConditionalGeneration": {
        "routed_expert_hidden_size": None,
        "latent_moe_use_norm": False,
        "topk_method": "noaux_tc",
    },
    "KimiLinearForCausalLM": {
        "routed_expert_hidden_size": None,
        "activation_situ_beta": 1.0,
        "activation_situ_linear_beta": 1.0,
    },
}


@dataclass(frozen=True)
class Case:
    """A routing function of SGLang: how it is called, and what it should compute.

    Attributes:
        forward: Takes hidden states and logits, and returns an object with `topk_weights` and
            `topk_ids`.
        config: The `TopKConfig` whose bias it reads; None if it reads none.
        shared_weight: What a shared expert in the last slot must weigh; None without such a slot.
        patterns: Names of logits patterns; None for all.
    """

    forward: Callable[[Tensor, Tensor], Any]
    config: Any
    recipe: Recipe
    num_experts: int
    dtype: torch.dtype
    way: str = "cuda"
    reach: str = "model"
    subject: str = ""
    shared_weight: float | None = None
    patterns: tuple[str, ...] | None = None


def compare(case: Case) -> dict[str, Any]:
    """Run a case on its logits patterns; an answer of `oracle.routers.RouterRun`."""
    called: dict[str, str] = {}

    def route(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        if case.config is not None:
            give_bias(case.config, bias)
        stubs.Stub.asked.clear()
        hidden = torch.zeros(len(logits), HIDDEN, dtype=torch.bfloat16)
        try:
            with noting(called):
                output = case.forward(hidden, logits)
        except (Unsupported, WrongAnswer):
            raise
        except RecipeError as error:
            # Whatever stubs were asked: SGLang's own code gives a compiled operator its arguments.
            raise ImpossibleArguments(error) from error
        except Exception as error:
            if stubs.Stub.asked:
                asked = ", ".join(dict.fromkeys(stubs.Stub.asked))
                raise Unsupported(f"{error}, after stubs: {asked}") from error
            raise
        weights, ids = output.topk_weights, output.topk_ids
        if case.shared_weight is None:
            return weights, ids
        _check_shared(weights, ids, case)
        return weights[:, :-1], ids[:, :-1]

    try:
        deviations = compare_router(
            route, case.recipe, case.num_experts, case.dtype, _OUTPUT, case.patterns
        )
    except Unsupported as reason:
        deviations = [Deviation(NOT_JUDGED, "", str(reason), str(reason))]
    routing = [name for name in called if not name.startswith(_NOT_ROUTING)]
    return {
        "router": routing[0] if routing else "?",
        "function": routing[-1].partition(".<locals>")[0] if routing else "?",
        "source": called[routing[-1]] if routing else "",
        "way": case.way,
        "subject": case.subject,
        "reach": case.reach,
        "called": list(called),
        "deviations": [asdict(deviation) for deviation in deviations],
    }


def not_judged(like: Mapping[str, Any], way: str, reason: str) -> dict[str, Any]:
    """Return the answer about a way on which a router cannot be run.

    Args:
        like: The answer about the same router on another way.
    """
    deviation = Deviation(NOT_JUDGED, "", reason, reason)
    return {**like, "way": way, "reach": "model", "deviations": [asdict(deviation)]}


def give_bias(config: Any, bias: Tensor | None) -> None:
    """Put a bias into a TopK's config, in the dtype and shape that the model's code gives it.

    A routing function of the model's may have it as an argument that is given already.
    """
    like = config.correction_bias
    if bias is not None and like is not None:
        config.correction_bias = bias.to(like.dtype).view_as(like)
    function = getattr(config, "custom_routing_function", None)
    if bias is not None and isinstance(function, partial):
        for value in function.keywords.values():
            if isinstance(value, Tensor) and value.numel() == bias.numel():
                value.data.copy_(bias.view_as(value))


def _check_shared(weights: Tensor, ids: Tensor, case: Case) -> None:
    """Raise `WrongAnswer` unless the last slot is the shared expert, with its weight."""
    wanted = case.shared_weight
    assert wanted is not None
    # Where all chosen scores underflow, or are not finite, nothing is said of it.
    alive = weights[:, :-1].float().sum(1) > 0
    slot, weight = ids[alive, -1], weights[alive, -1].float()
    if not bool((slot == case.num_experts).all()):
        raise WrongAnswer(f"the last slot holds expert {int(slot[0])}, not the shared one")
    if not torch.allclose(weight, torch.tensor(wanted, dtype=torch.float32), rtol=2**-8):
        raise WrongAnswer(f"the shared expert weighs {float(weight[0]):.6g}, not {wanted:.6g}")


@contextmanager
def noting(called: dict[str, str]) -> Iterator[None]:
    """Note SGLang's routing functions that run, in order, by name: file and line of each."""

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and (file.endswith(_FILES) or _MODELS in file):
            called[frame.f_code.co_qualname] = place_of(frame, frame.f_code.co_firstlineno)

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def values_of(architecture: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a model's config, with the widths that routers are run with."""
    widths = {name: _width(name, value) for name, value in config.items() if "size" in name}
    return {**_FURTHER.get(architecture, {}), **config, **widths}


def _width(name: str, value: Any) -> Any:
    """Return an attribute that has a size of the block that is built, or one for each kind."""
    if isinstance(value, list):
        return [_width(name, each) for each in value]
    if value not in blocks._SIZES:
        return value
    return INNER if "intermediate" in name or "ffn" in name else HIDDEN


def runs_of(
    known: dict[str, list[dict[str, Any]]],
    model: Mapping[str, Any],
    config: Mapping[str, Any],
    route: Callable[[str, dict[str, Any], RouterConfig], Iterable[dict[str, Any]]],
) -> list[dict[str, Any]]:
    """Return a model's runs; models that share a block and a config share its runs.

    Args:
        known: The runs so far, to which new ones are added.
        route: Runs the block of an architecture with the attributes of a config, for a router.

    Raises:
        Unsupported: No recipe computes the router, or whatever `route` raises.
    """
    architecture, router = model["architecture"], RouterConfig(**model["router"])
    if router.not_expressible is not None:
        raise Unsupported(f"no recipe computes the router: {router.not_expressible}")
    values = values_of(architecture, config)
    key = json.dumps([architecture, router.logits_dtype, values], sort_keys=True)
    if key not in known:
        known[key] = list(route(architecture, values, router))
    return [{**run, "subject": model["id"]} for run in known[key]]


def exact(factor: float, scale: float) -> float:
    """Return a factor that was measured in bfloat16: the config's scale if that is near."""
    return scale if math.isclose(scale, factor, rel_tol=2**-8) else factor


def rest(scale: float, factor: float) -> float:
    """Return the rest of a scale after a factor that was measured in bfloat16."""
    return scale / exact(factor, scale)


def function_of(root: str, module: str, name: str) -> Any:
    """Return a function that needs nothing but torch, out of a module that is not imported."""
    tree = parse(source_of(root, module))
    tree.body = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name]
    space: dict[str, Any] = {"torch": torch}
    exec(compile(tree, module, "exec"), space)
    return space.get(name, stubs.Stub(name))
