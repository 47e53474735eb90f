"""The one algebra: a router, and a fused kernel's routing method, are both a *recipe*.

    score -> (+ bias, for choosing only) -> (keep topk_group of n_group groups) -> top_k
          -> weigh by the unbiased score -> normalize -> scale -> apply on output or input

`reference.routing.route` runs any recipe. Known mistakes of routers and kernels are recipes too:
`mask`, `weigh_by: selection` and the dtypes are there for them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from math import inf
from typing import Any

from pytest_moe_routing.errors import RecipeError
from pytest_moe_routing.models import RouterConfig

SCORES = ("identity", "softmax", "sigmoid", "sqrtsoftplus")
#: `selection` is the score that experts are selected by, bias included.
WEIGHTS = (*SCORES, "selection")
NORMALIZATIONS = ("none", "sum", "softmax")
_DTYPES = ("float32", "bfloat16")

_CHOICES = {
    "score": SCORES,
    "weigh_by": WEIGHTS,
    "normalize": NORMALIZATIONS,
    "group_score": ("top2_sum", "max"),
    "weight_on": ("output", "input"),
    "score_dtype": _DTYPES,
    "bias_dtype": _DTYPES,
    "normalize_dtype": _DTYPES,
    "weight_dtype": _DTYPES,
}

#: Fields that say something only where they are not at their default.
_UNUSUAL = ("mask", "score_dtype", "normalize_dtype")


@dataclass(frozen=True)
class Recipe:
    """What is computed for each token, from its router logits.

    Attributes:
        top_k: Experts per token: the largest selection scores, ties to the lower expert index.
        score: Applied to the logits of all experts, to choose by.
        weigh_by: Score gathered at the chosen experts as their weight; defaults to `score`.
            Llama4 chooses by `identity` and weighs by `sigmoid`. `selection` weighs by the score
            with its bias, before groups are excluded.
        bias: An `e_score_correction_bias` is added to the score, for choosing only.
        n_group, topk_group: Experts lie in `n_group` equal groups; all but the best `topk_group`
            are excluded.
        group_score: A group's rank: the sum of its two best selection scores, or the best one.
        per_group: Each of the `n_group` groups, none of which is excluded, contributes its best
            `top_k / n_group` experts (Intern-S1-Pro).
        mask: Selection score given to the experts of excluded groups, at most 0. Any number but
            -inf lets them win over kept experts whose biased score is lower.
        normalize: `sum` divides the weights by their sum plus `epsilon`; `softmax` is taken over
            the chosen weights.
        scale: The total factor on the weights, `routed_scaling_factor`, whoever applies it.
        weight_on: What the weight multiplies: the expert's `output`, or its `input` (Llama4).
        score_dtype: Precision to which scores are rounded before anything is made of them.
        bias_dtype: Precision to which the bias is rounded before it is added.
        normalize_dtype: Precision in which weights are normalized, before they are scaled.
        weight_dtype: Precision to which the finished weights are rounded.

    Raises:
        RecipeError: A field has a value that no recipe can have.
    """

    top_k: int = 1
    score: str = "softmax"
    weigh_by: str = ""
    bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "top2_sum"
    per_group: bool = False
    mask: float = -inf
    normalize: str = "none"
    epsilon: float = 0.0
    scale: float = 1.0
    weight_on: str = "output"
    score_dtype: str = "float32"
    bias_dtype: str = "float32"
    normalize_dtype: str = "float32"
    weight_dtype: str = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weigh_by", self.weigh_by or self.score)
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                found, valid = getattr(self, name), ", ".join(choices)
                raise RecipeError(f"Recipe.{name}: found {found!r}, expected one of {valid}")
        if self.top_k < 1 or not 1 <= self.topk_group <= self.n_group:
            raise RecipeError(
                "Recipe: expected top_k >= 1 and 1 <= topk_group <= n_group, found "
                f"top_k {self.top_k}, topk_group {self.topk_group}, n_group {self.n_group}"
            )
        if self.per_group and (self.grouped or self.top_k % self.n_group):
            raise RecipeError(
                "Recipe.per_group: expected topk_group = n_group and a multiple of it as top_k, "
                f"found top_k {self.top_k}, topk_group {self.topk_group}, n_group {self.n_group}"
            )
        if not self.mask <= 0:
            raise RecipeError(f"Recipe.mask: found {self.mask}, expected -inf or a number up to 0")

    @property
    def grouped(self) -> bool:
        """Whether the groups can exclude anything."""
        return self.topk_group < self.n_group

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that matter for this recipe, as plain data."""
        usual = {f.name: f.default for f in fields(self) if f.name in _UNUSUAL}
        return {
            name: value
            for name, value in self._with_meaning().items()
            if name not in usual or value != usual[name]
        }

    def _with_meaning(self) -> dict[str, Any]:
        """Return the fields that can have an effect: those of groups need groups."""
        groups = {"n_group", "topk_group", "per_group", "group_score", "mask"}
        unused = {"group_score", "mask"} if self.per_group else {"per_group"}
        void = groups if self.n_group == 1 else unused
        return {name: value for name, value in asdict(self).items() if name not in void}

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Return the fields in which two recipes differ, as written: (ours, theirs)."""
        ours, theirs = self._with_meaning(), other._with_meaning()
        names = [f.name for f in fields(self)]
        return {
            name: (ours.get(name, "-"), theirs.get(name, "-"))
            for name in names
            if ours.get(name, "-") != theirs.get(name, "-")
        }

    def __str__(self) -> str:
        """In words, in the order of computation: `sigmoid -> + bias -> top 8 -> / sum -> x 2.5`."""
        steps = [] if self.score == "identity" else [self.score]
        if self.bias:
            steps.append("+ bias to choose")
        if self.grouped:
            steps.append(f"best {self.topk_group} of {self.n_group} groups by {self.group_score}")
            if self.mask != -inf:
                steps.append(f"mask the others with {self.mask:g}")
        if self.per_group:
            each = self.top_k // self.n_group
            steps.append(f"top {each} of each of {self.n_group} groups")
        else:
            steps.append(f"top {self.top_k}")
        if self.weigh_by == "selection":
            steps.append("weigh with the bias")
        elif self.weigh_by != self.score:
            steps.append(self.weigh_by)
        if self.normalize != "none":
            steps.append("softmax of the chosen" if self.normalize == "softmax" else "/ sum")
        if self.scale != 1.0:
            steps.append(f"x {self.scale:g}")
        if self.weight_on == "input":
            steps.append("weight on the expert input")
        return " -> ".join(steps)


@lru_cache(maxsize=1 << 16)
def recipe_of(router: RouterConfig) -> Recipe:
    """Return the recipe that a model's router computes.

    A softmax taken after top-k is the same as one taken over all experts and divided by the sum
    of the chosen; it is written as the former, which needs no sum over experts.
    """
    score, weigh_by, normalize = router.scoring_func, "", "sum" if router.renormalize else "none"
    if router.topk_before_score:
        score = "identity"
        if router.scoring_func == "softmax":
            normalize = "softmax"
        else:
            weigh_by = router.scoring_func
    return Recipe(
        top_k=router.top_k,
        score=score,
        weigh_by=weigh_by,
        bias=router.correction_bias is not None,
        n_group=router.router_n_groups or router.n_group or 1,
        topk_group=router.router_n_groups or router.topk_group or 1,
        per_group=(router.router_n_groups or 1) > 1,
        group_score=router.group_score or "top2_sum",
        normalize=normalize,
        epsilon=router.renormalize_epsilon,
        scale=router.routed_scaling_factor,
        weight_on=router.weight_on,
        bias_dtype=router.correction_bias or "float32",
    )
