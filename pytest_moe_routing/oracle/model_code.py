"""What a framework's own model code asks of its MoE layer, compared with the model's router."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.models.spec import NEARLY
from pytest_moe_routing.oracle.calls import PARAMETERS
from pytest_moe_routing.oracle.finding import NOT_LOADED, Finding, Kind, Value, are_slight, nearly
from pytest_moe_routing.routing import Recipe, recipe_of

if TYPE_CHECKING:
    from pytest_moe_routing.compare.equivalence import Counterexample

#: Precision of the factor that is measured on what a block returns.
_MEASURED = 1e-3
#: What becomes of a float32 tensor that is rounded to the dtype of a model.
_ROUNDED = ("float32", "bfloat16")
#: Fields of a recipe that are compared, in the order of computation.
_FIELDS = (
    "score",
    "weigh_by",
    "bias",
    "n_group",
    "topk_group",
    "group_score",
    "per_group",
    "top_k",
    "normalize",
    "scale",
    "weight_on",
)
#: Keys of `ExpertsConfig` that mean something else in a recipe.
_EXPERTS = {"bias": "biases of the experts"}
#: What the parameters of an activation are when they change nothing, by key of `ExpertsConfig`.
_NEUTRAL = dict(PARAMETERS.values())


@dataclass(frozen=True)
class LayerRequest:
    """What a model's MoE block asks of its MoE layer, when both are built and run.

    Attributes:
        block: The class that was built.
        config_class: File, line and name of the class by which the target reads the model's config;
            empty unless it has one of its own.
        num_experts: Routed experts.
        recipe: What the layer computes when asked this way; its scale is what the layer applies,
            to weights or to the output of the routed experts.
        passed: The arguments behind a field of the recipe, as the model code passes them.
        told_dtype: dtype of the router logits that the layer prepares for.
        logits_dtype: dtype of those that it is handed, for bfloat16 hidden states.
        gate_dtype: dtype in which they were computed, or to which they were cast on the way, where
            that is lesser.
        router_weight_dtype: The least precise dtype that the router's weight had before the
            product; empty where the product could not be traced to a weight.
        output_factor: What the model code multiplies the layer's output by.
        shared_experts: Whether the layer's output has the shared experts in it.
        own_factor: The part of `output_factor` that is not the router's, but for all experts.
        otherwise: How the layer routes otherwise than the model, where its recipe does not say it.
        judges_step: Whether `otherwise` also says it of a step that no recipe can say. The recipe
            then is the nearest one.
        unanswered: Why `otherwise` is not judged; None if it is.
        rounds_logits: Why logits of lesser precision than the model's are no defect.
        switch: What a server is started with for this code to run; empty if nothing is needed.
        bias_is_loaded: Whether loading a checkpoint fills the bias that the layer reads.
        experts: What the model code states of the experts, by key of `ExpertsConfig`: their
            activation, whether they are gated and have biases, and the activation's parameters,
            None where it states that there is none.
        sizes: Hidden and intermediate size, by key of `ExpertsConfig`: that of the config of which
            the block was built, which is not the model's, and that which its layer has.
        when: When it does so, if it asks for something else at other times; empty if it does not.
        further: What the block asks of further layers that it has for other kinds of tokens, or at
            other times.
    """

    block: str
    num_experts: int
    recipe: Recipe
    passed: Mapping[str, str]
    told_dtype: str
    logits_dtype: str
    gate_dtype: str
    router_weight_dtype: str = ""
    output_factor: float = 1.0
    shared_experts: bool = False
    own_factor: float = 1.0
    otherwise: str | None = None
    judges_step: bool = False
    unanswered: str | None = None
    rounds_logits: str | None = None
    bias_is_loaded: bool = True
    switch: str = ""
    when: str = ""
    config_class: str = ""
    experts: Mapping[str, Value] = field(default_factory=dict)
    sizes: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    further: tuple[LayerRequest, ...] = ()


@dataclass(frozen=True)
class SplitExperts:
    """Shared experts whose weights are split over ranks that have other tokens, so nobody sums.

    Attributes:
        block: The class that was built.
        layers: Its linear layers that are split.
        switches: What a user has to switch on for such ranks.
    """

    block: str
    layers: tuple[str, ...]
    switches: tuple[str, ...]


@dataclass(frozen=True)
class CodeJudgement:
    """Where a request and a model disagree: in meaning, or in precision alone."""

    model: ModelSpec
    request: LayerRequest
    #: What layer and model code compute together.
    asked: Recipe
    findings: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    counterexample: Counterexample | None = None

    def by_effect(self) -> Iterator[CodeJudgement]:
        """Yield what is wrong, then what changes next to nothing: each is a cause of its own."""
        slight = tuple(finding for finding in self.findings if are_slight([finding]))
        rest = tuple(finding for finding in self.findings if finding not in slight)
        if rest:
            yield replace(self, findings=rest)
        if slight:
            yield replace(self, findings=slight, counterexample=None)

    @property
    def unanswered(self) -> str | None:
        """Why a block's choice or the router's weight is not judged; None if both are.

        Nothing is judged of a weight whose dtype is not known.
        """
        if self.request.unanswered is not None:
            return self.request.unanswered
        if self.model.router.router_weight_dtype is None or self.request.router_weight_dtype:
            return None
        return f"{self.request.block} computes logits of no weight that can be traced"


def compare_requests(model: ModelSpec, request: LayerRequest) -> Iterator[CodeJudgement]:
    """Yield `compare_request` of a request and of its further ones."""
    return (compare_request(model, each) for each in (request, *request.further))


def compare_request(model: ModelSpec, request: LayerRequest) -> CodeJudgement:
    """Find where model code asks for another routing or activation than the model has.

    Arguments that mean the same, such as no groups and one group, are no difference. A router that
    no recipe can say is compared without the step in question, which `request` judges.

    Raises:
        Unsupported: No recipe computes the model's router, and the request does not judge why.
    """
    from pytest_moe_routing.compare.equivalence import counterexample

    router = model.router
    if router.not_expressible is not None and not request.judges_step:
        raise Unsupported(f"no recipe computes {model}'s router: {router.not_expressible}")
    wanted = recipe_of(router)
    factor = request.output_factor / request.own_factor
    scale = request.recipe.scale * factor
    if math.isclose(scale, wanted.scale, rel_tol=_MEASURED):
        scale = wanted.scale
    asked = replace(request.recipe, scale=scale)

    findings: list[Finding] = []
    example = None
    if request.num_experts != router.num_experts:
        wrong = Finding(Kind.RECIPE, "num_experts", router.num_experts, request.num_experts)
        findings.append(wrong)
    elif request.otherwise is not None:
        findings.append(Finding(Kind.RECIPE, "routing function", fact=request.otherwise))
    else:
        example = counterexample(wanted, asked, router.num_experts)
    if example is not None:
        findings += _differences(_canonical(wanted), _canonical(asked), request)
    if not math.isclose(factor, 1.0, rel_tol=_MEASURED) and request.shared_experts:
        findings.append(Finding(Kind.ARGUMENT, "factor on the shared experts", 1.0, factor))
    if wanted.bias and asked.bias and not request.bias_is_loaded:
        findings.append(NOT_LOADED)
    if wanted.bias and (wanted.bias_dtype, asked.bias_dtype) == _ROUNDED:
        findings.append(Finding(Kind.DOWNCAST, "bias", *_ROUNDED))
    findings += _experts(model, request)
    for name, (ours, theirs) in request.sizes.items():
        if ours != theirs:
            findings.append(Finding(Kind.RECIPE, name, ours, theirs, f"{name}={theirs}"))
    unequal, notes = _logits(router.logits_dtype, request)
    if not unequal and (router.router_weight_dtype, request.router_weight_dtype) == _ROUNDED:
        unequal.append(Finding(Kind.DOWNCAST, "router weight", *_ROUNDED))
    return CodeJudgement(model, request, asked, (*findings, *unequal), tuple(notes), example)


def _experts(model: ModelSpec, request: LayerRequest) -> Iterator[Finding]:
    """Yield what the model code states otherwise of the experts."""
    for name, theirs in request.experts.items():
        ours = getattr(model.experts, name)
        values: list[Any] = [_NEUTRAL.get(name) if v is None else v for v in (ours, theirs)]
        is_same = math.isclose(*values) if name in _NEUTRAL else ours == theirs
        # Whether there is a gate follows from the activation.
        follows = name == "gated" and request.experts.get("activation") != model.experts.activation
        if not is_same and not follows:
            field = _EXPERTS.get(name, name)
            passed = request.passed.get(field, "")
            if name == "activation" and theirs == NEARLY.get(ours):
                yield nearly(ours, NEARLY[ours], passed)
            else:
                yield Finding(Kind.RECIPE, field, ours, theirs, passed)


def _logits(wanted: str, request: LayerRequest) -> tuple[list[Finding], list[Finding]]:
    """Return findings and notes about the dtype of the router logits."""
    findings, notes = [], []
    if request.told_dtype != request.logits_dtype:
        told = f"{request.told_dtype} ({request.passed['logits_dtype']})"
        wrong = Finding(Kind.ARGUMENT, "dtype of the router logits", told, request.logits_dtype)
        findings.append(wrong)
    given = (request.logits_dtype, request.gate_dtype)
    lesser = next((dtype for dtype in given if dtype not in ("float32", "float64")), None)
    if wanted == "float32" and lesser is not None:
        downcast = Finding(Kind.DOWNCAST, "logits", "float32", lesser)
        if request.rounds_logits is None:
            findings.append(downcast)
        else:
            notes.append(replace(downcast, fact=request.rounds_logits))
    return findings, notes


def _canonical(recipe: Recipe) -> Recipe:
    """One way to write a softmax over the chosen, as `recipe_of` has two."""
    plain = not recipe.bias and not recipe.grouped
    if plain and (recipe.score, recipe.weigh_by, recipe.normalize) == ("softmax", "softmax", "sum"):
        return replace(recipe, score="identity", weigh_by="identity", normalize="softmax")
    return recipe


def _differences(wanted: Recipe, asked: Recipe, request: LayerRequest) -> Iterator[Finding]:
    both_grouped = wanted.grouped and asked.grouped
    for name in _FIELDS:
        ours, theirs = getattr(wanted, name), getattr(asked, name)
        # What follows from a difference that was named before.
        follows = {
            "n_group": not (wanted.grouped or asked.grouped),
            "topk_group": wanted.n_group != asked.n_group or wanted.n_group == 1,
            "group_score": not both_grouped,
            "weigh_by": wanted.score != asked.score,
        }
        if ours != theirs and not follows.get(name, False):
            yield Finding(Kind.RECIPE, name, ours, theirs, request.passed.get(name, ""))
