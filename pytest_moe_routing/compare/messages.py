"""What a failure says of one token: what is wrong with it, why, and both routings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pytest_moe_routing.compare.rows import Beaten, Rows, Weights
from pytest_moe_routing.reference import routing as reference


@dataclass(frozen=True)
class Difference:
    """One token that is routed wrongly."""

    token: int
    problem: str
    wanted: str
    got: str
    #: How far beyond the allowance, for ranking; structural problems come first.
    excess: float
    #: What proves it wrong, where the problem does not say it itself.
    because: str = ""

    def lines(self) -> list[str]:
        return [
            f"  token {self.token}: {self.problem}",
            *([f"    because {self.because}"] if self.because else []),
            f"    wanted {self.wanted}",
            f"    got    {self.got}",
        ]


def structural(rows: Rows, token: int, ids: Tensor) -> Difference:
    """Describe an expert that does not exist or is chosen twice."""
    num_experts, chosen = rows.keys.shape[1], ids.tolist()
    outside = [e for e in chosen if not 0 <= e < num_experts]
    repeated = sorted({e for e in chosen if chosen.count(e) > 1})
    problem = (
        f"expert {outside[0]} is not one of {num_experts}"
        if outside
        else f"expert {repeated[0]} is chosen {chosen.count(repeated[0])} times"
    )
    return Difference(token, problem, str(rows.ids[token].tolist()), str(chosen), torch.inf)


def wrong_experts(rows: Rows, token: int, ids: Tensor, beaten: Beaten) -> Difference:
    """Experts that no rounding explains."""
    wanted, got, keys = rows.ids[token].tolist(), ids.tolist(), rows.keys[token]
    extra = [e for e in got if e not in wanted]
    lacking = [e for e in wanted if e not in got]
    if beaten.excess == torch.inf:
        because = _beyond_groups(rows, token, extra, lacking)
    else:
        because = _beaten(rows, token, beaten)
    return Difference(
        token,
        f"experts {extra} instead of {lacking}",
        _show(wanted, keys[wanted], "selection score"),
        _show(got, keys[got], "selection score"),
        beaten.excess,
        because,
    )


def _beaten(rows: Rows, token: int, beaten: Beaten) -> str:
    better, expert = beaten.better, beaten.expert
    if beaten.tied:
        what = "logit and bias" if rows.recipe.bias else "logit"
        return (
            f"{expert} is chosen over {better}, which has the same {what}: the lower index must win"
        )
    if rows.recipe.per_group and beaten.gap <= 0:
        each = rows.recipe.top_k // rows.recipe.n_group
        return f"{expert} is chosen over {better}, of a group that contributes fewer than {each}"
    return (
        f"{expert} is chosen over {better}, whose selection score is {beaten.gap:.3g} higher; "
        f"rounding explains at most {max(beaten.gap - beaten.excess, 0.0):.1g}"
    )


def _beyond_groups(rows: Rows, token: int, extra: list[int], lacking: list[int]) -> str:
    recipe, keys = rows.recipe, rows.keys[token]
    size = len(keys) // recipe.n_group
    scores = reference.group_scores(keys.unsqueeze(0), recipe)
    kept = sorted(reference.stable_topk(scores, recipe.topk_group)[0].tolist())
    astray = [e for e in extra if e // size not in kept]
    away = sorted({e // size for e in astray})
    group, are, have = ("groups", "are", "have") if len(away) > 1 else ("group", "is", "has")
    those = "groups are" if len(kept) > 1 else "group is"
    text = (
        f"experts {_list(astray)} lie in {group} {_list(away)}, which {are} not kept; the kept "
        f"{those} {_list(kept)} (scores {_list(scores[0, kept])}), and "
        f"{group} {_list(away)} {have} {_list(scores[0, away])}"
    )
    made_of = rows.group_inputs(token)
    ties = [(k, g) for g in away for k in kept if k < g and made_of[k] == made_of[g]]
    if ties:
        text += "; groups {} and {} have the same inputs: the lower index must win".format(*ties[0])
    elif keys[astray].max() - keys[lacking].min() > 2 * rows.errors[token].max():
        text += "; their selection scores are higher, but count only within kept groups"
    return text


def wrong_weights(token: int, ids: Tensor, weights: Tensor, may: Weights) -> Difference:
    """Weights outside of what rounding explains, of experts that may be right."""
    exact, low, high, outside = (x[token] for x in (may.exact, may.low, may.high, may.outside))
    beyond = torch.maximum(low - weights, weights - high).nan_to_num(torch.inf, torch.inf)
    slot = int(beyond.masked_fill(~outside, -torch.inf).argmax())
    ratio = (weights / exact).tolist()
    problem = (
        f"expert {ids[slot]} weighs {weights[slot]:.6g}, "
        f"allowed {low[slot]:.6g} to {high[slot]:.6g}"
    )
    if max(ratio) - min(ratio) < 0.01 * abs(ratio[0]) and abs(ratio[0] - 1) > 0.01:
        problem += f"; all weights are {ratio[0]:.4g} times the wanted ones"
    return Difference(
        token,
        problem,
        _show(ids.tolist(), exact, "weight"),
        _show(ids.tolist(), weights, "weight"),
        beyond[slot].item(),
    )


def _show(experts: list[int], numbers: Tensor, unit: str) -> str:
    pairs = zip(experts, numbers.tolist(), strict=True)
    return "  ".join(f"{e}: {x:.6g}" for e, x in pairs) + f"  (expert: {unit})"


def _list(numbers: Iterable[float] | Tensor) -> str:
    """Seven digits, which are float32's."""
    return " ".join(f"{x:.7g}" for x in map(float, numbers))
