"""What a framework's own model code asks of its MoE layer, compared with the model's router."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.routing import Recipe, recipe_of

if TYPE_CHECKING:
    from pytest_moe_routing.compare.equivalence import Counterexample

#: Precision of the factor that is measured on what a block returns.
_MEASURED = 1e-3
#: Fields of a recipe that are compared, in the order of computation, as a reader names them.
_NAMES = {
    "score": "scoring function",
    "weigh_by": "score of the weights",
    "bias": "correction bias",
    "n_group": "n_group",
    "topk_group": "topk_group",
    "group_score": "group score",
    "top_k": "top_k",
    "normalize": "renormalize",
    "scale": "scale",
    "weight_on": "router weight on",
}


@dataclass(frozen=True)
class LayerRequest:
    """What a model's MoE block asks of its MoE layer, when both are built and run.

    Attributes:
        block: The class that was built.
        num_experts: Routed experts.
        recipe: What the layer computes when asked this way; its scale is what the layer applies,
            to weights or to the output of the routed experts.
        passed: The arguments behind a field of the recipe, as the model code passes them.
        told_dtype: dtype of the router logits that the layer prepares for.
        logits_dtype: dtype of those that it is handed, for bfloat16 hidden states.
        gate_dtype: dtype in which the gate gave them, where that is lesser.
        output_factor: What the model code multiplies the layer's output by.
        shared_experts: Whether the layer's output has the shared experts in it.
        own_factor: The part of `output_factor` that is not the router's, but for all experts.
        otherwise: How the layer routes otherwise than the model, where its recipe does not say it.
        rounds_logits: Why logits of lesser precision than the model's are no defect.
    """

    block: str
    num_experts: int
    recipe: Recipe
    passed: Mapping[str, str]
    told_dtype: str
    logits_dtype: str
    gate_dtype: str
    output_factor: float = 1.0
    shared_experts: bool = False
    own_factor: float = 1.0
    otherwise: str | None = None
    rounds_logits: str | None = None


@dataclass(frozen=True)
class Findings:
    """Where a request and a model's router disagree: in meaning, or in precision alone."""

    model: ModelSpec
    request: LayerRequest
    #: What layer and model code compute together.
    asked: Recipe
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    counterexample: Counterexample | None = None

    def lines(self) -> list[str]:
        lines = [f"{self.model}: {self.request.block} and the model's router disagree"]
        lines += [f"  problem  {text}" for text in self.problems]
        if self.counterexample is not None:
            lines += [
                f"  router   {recipe_of(self.model.router)}",
                f"  asked    {self.asked}",
                *[f"    {line}" for line in self.counterexample.lines()],
            ]
        return lines + [f"  note     {text}" for text in self.notes]


def compare_request(model: ModelSpec, request: LayerRequest) -> Findings:
    """Find where model code asks for another routing than the model's router.

    Arguments that mean the same, such as no groups and one group, are no difference.

    Raises:
        Unsupported: No recipe computes the model's router.
    """
    from pytest_moe_routing.compare.equivalence import counterexample

    router = model.router
    if router.not_expressible is not None:
        raise Unsupported(f"no recipe computes {model}'s router: {router.not_expressible}")
    wanted = recipe_of(router)
    factor = request.output_factor / request.own_factor
    scale = request.recipe.scale * factor
    if math.isclose(scale, wanted.scale, rel_tol=_MEASURED):
        scale = wanted.scale
    asked = replace(request.recipe, scale=scale)

    problems: list[str] = []
    example = None
    if request.num_experts != router.num_experts:
        problems.append(
            f"num_experts: the model has {router.num_experts}, "
            f"the model code asks for {request.num_experts}"
        )
    elif request.otherwise is not None:
        problems.append(request.otherwise)
    else:
        example = counterexample(wanted, asked, router.num_experts)
    if example is not None:
        problems += _differences(_canonical(wanted), _canonical(asked), request)
    if not math.isclose(factor, 1.0, rel_tol=_MEASURED) and request.shared_experts:
        problems.append(
            f"shared experts: the model code multiplies what the layer returns by {factor:.4g}, "
            "and the shared experts with it"
        )
    if wanted.bias and (wanted.bias_dtype, asked.bias_dtype) == ("float32", "bfloat16"):
        problems.append("correction bias: the model has float32, the model code passes bfloat16")
    unequal, notes = _logits(router.logits_dtype, request)
    return Findings(model, request, asked, (*problems, *unequal), tuple(notes), example)


def _logits(wanted: str, request: LayerRequest) -> tuple[list[str], list[str]]:
    """Problems and notes of the router logits' dtype."""
    problems, notes = [], []
    if request.told_dtype != request.logits_dtype:
        problems.append(
            f"router logits: the layer is told {request.told_dtype} "
            f"({request.passed['logits_dtype']}), and is handed {request.logits_dtype}"
        )
    if wanted == "float32" and "bfloat16" in (request.logits_dtype, request.gate_dtype):
        text = "router logits: the model has float32, the model code rounds them to bfloat16"
        if request.rounds_logits is None:
            problems.append(text)
        else:
            notes.append(f"{text}; {request.rounds_logits}")
    return problems, notes


def _canonical(recipe: Recipe) -> Recipe:
    """One way to write a softmax over the chosen, as `recipe_of` has two."""
    plain = not recipe.bias and not recipe.grouped
    if plain and (recipe.score, recipe.weigh_by, recipe.normalize) == ("softmax", "softmax", "sum"):
        return replace(recipe, score="identity", weigh_by="identity", normalize="softmax")
    return recipe


def _differences(wanted: Recipe, asked: Recipe, request: LayerRequest) -> Iterator[str]:
    both_grouped = wanted.grouped and asked.grouped
    for field, name in _NAMES.items():
        ours, theirs = getattr(wanted, field), getattr(asked, field)
        # What follows from a difference that was named before.
        follows = {
            "n_group": not (wanted.grouped or asked.grouped),
            "topk_group": wanted.n_group != asked.n_group or wanted.n_group == 1,
            "group_score": not both_grouped,
            "weigh_by": wanted.score != asked.score,
        }
        if ours == theirs or follows.get(field, False):
            continue
        if field == "scale":
            theirs = f"{theirs:.4g} in all"
        said = request.passed.get(field)
        yield f"{name}: the model has {_word(ours)}, the model code asks for {_word(theirs)}" + (
            f" ({said})" if said else ""
        )


def _word(value: object) -> str:
    return {True: "one", False: "none"}[value] if isinstance(value, bool) else str(value)
