"""Compare the output of a fused MoE with the reference: its elements, and their aggregates.

A token whose experts are ambiguous is compared with each admissible choice; everywhere else, one
element beyond its budget is a failure, and so is one aggregate beyond its bound. Wrong elements are
then run with each known defect, and the defects that explain them are named.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pytest_moe_routing.compare.aggregates import Aggregate, fitted
from pytest_moe_routing.compare.budget import FLASHINFER, Arithmetic, Bounded, bounded_moe
from pytest_moe_routing.compare.defects import DEFECTS
from pytest_moe_routing.compare.spread import pipelines, spread_moe
from pytest_moe_routing.errors import LayerError
from pytest_moe_routing.reference.moe import check_inputs
from pytest_moe_routing.reference.problem import MoEProblem
from pytest_moe_routing.reference.quantization import find_format
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard

_WORST = 8

#: Tokens that a diagnosis must explain: the worst ones, and some that are right.
_FAILING, _RIGHT = 8, 4


@dataclass(frozen=True)
class Element:
    """One element beyond its budget."""

    token: int
    column: int
    wanted: float
    got: float
    budget: float
    experts: tuple[int, ...]

    def __str__(self) -> str:
        return (
            f"token {self.token}, element {self.column}: wanted {self.wanted:.6g}, got "
            f"{self.got:.6g}; off by {abs(self.got - self.wanted):.3g}, budget {self.budget:.3g} "
            f"(experts {', '.join(map(str, self.experts))})"
        )


@dataclass(frozen=True)
class MoEComparison:
    """The differences between a fused MoE's output and the reference.

    Attributes:
        shape: `[tokens, hidden]` compared.
        wrong_tokens: Tokens with an element beyond its budget.
        wrong_elements: How many elements are.
        ambiguous: Tokens that fit another admissible choice of experts, not the reference's.
        worst: The worst element of each of the worst tokens.
        use: Largest share of its budget that an element uses; above 1 it is wrong.
        tightness: Median budget over the root mean square of the output.
        aggregates: The worst aggregate of each family that has one beyond its bound, worst first.
        diagnosis: Known defects that explain all wrong elements.
    """

    shape: tuple[int, int]
    wrong_tokens: int
    wrong_elements: int
    ambiguous: int
    worst: tuple[Element, ...]
    use: float
    tightness: float
    aggregates: tuple[Aggregate, ...] = ()
    diagnosis: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no element and no aggregate is wrong."""
        return not self.wrong_tokens and not self.aggregates

    def message(self) -> str:
        """Return n/N, what explains it, and the worst elements and aggregates."""
        tokens, hidden = self.shape
        lines = [
            f"{self.wrong_tokens}/{tokens} tokens are wrong: {self.wrong_elements}/"
            f"{tokens * hidden} elements exceed their error budget, by a factor of up to "
            f"{self.use:.3g}"
            if self.wrong_tokens
            else f"the output of {tokens} tokens is wrong as a whole: every element lies within "
            "its budget, but aggregates exceed their bounds, by a factor of up to "
            f"{self.aggregates[0].use:.3g}"
            if self.aggregates
            else f"{tokens} tokens are right",
            f"  budget     median {100 * self.tightness:.2g} % of the output's size; "
            f"{self.ambiguous} tokens fit another admissible choice of experts",
        ]
        for name in self.diagnosis:
            lines.append(f"  diagnosis  {name}")
        if self.wrong_tokens and not self.diagnosis:
            lines.append("  diagnosis  none of the known defects explains it")
        lines += [f"  aggregate  {aggregate}" for aggregate in self.aggregates]
        return "\n".join([*lines, *(f"  {element}" for element in self.worst)])


def assert_moe(
    output: Tensor,
    problem: MoEProblem,
    *,
    arithmetic: Arithmetic = FLASHINFER,
    alternatives: Iterable[Routing] = (),
    output_format: str = "bf16",
    diagnose: bool = True,
) -> MoEComparison:
    """Assert that a fused MoE's output lies within the error budget of its scheme.

    Args:
        output: The kernel's output, floating `[num_tokens, hidden_size]`.
        problem: Hidden states, experts, layer and routing that the kernel was given.
        arithmetic: How the kernel computes; the default allows for FlashInfer's kernels.
        alternatives: Other routings of all tokens that are as right as the problem's own; a token
            may fit any of them.
        output_format: `bf16`, or `float32` for an output that was not rounded.
        diagnose: Whether to look for a known defect that explains what is wrong.

    Returns:
        The comparison, with the largest share of its budget that an element uses.

    Raises:
        AssertionError: An element lies beyond its budget, or an aggregate (the output as a whole, a
            token, an expert, a block of columns) beyond its bound.
        LayerError: Shapes do not fit, or a static scale is missing that the kernel must have had.
    """
    __tracebackhide__ = True
    result = compare_moe(
        output,
        problem,
        arithmetic=arithmetic,
        alternatives=alternatives,
        output_format=output_format,
        diagnose=diagnose,
    )
    if not result.ok:
        raise AssertionError(result.message())
    return result


def compare_moe(
    output: Tensor,
    problem: MoEProblem,
    *,
    arithmetic: Arithmetic = FLASHINFER,
    alternatives: Iterable[Routing] = (),
    output_format: str = "bf16",
    diagnose: bool = True,
) -> MoEComparison:
    """Compare a fused MoE's output with the reference.

    Args:
        output: The kernel's output, floating `[num_tokens, hidden_size]`.
        problem: Hidden states, experts, layer and routing that the kernel was given.
        arithmetic: How the kernel computes; the default allows for FlashInfer's kernels.
        alternatives: Other routings of all tokens that are as right as the problem's own, where
            selection scores are too close to tell. A token may fit any of them.
        output_format: `bf16`, or `float32` for an output that was not rounded.
        diagnose: Whether to look for a known defect that explains what is wrong.

    Returns:
        What differs. Nothing is raised for a difference: see `MoEComparison.ok`.

    Raises:
        LayerError: Shapes do not fit, or a static scale is missing that the kernel must have had.
    """
    check_inputs(
        problem.hidden,
        problem.experts,
        problem.routing,
        problem.shard or Shard.whole(len(problem.experts)),
    )
    shape = tuple(problem.hidden.shape)
    if tuple(output.shape) != shape or not output.is_floating_point():
        raise LayerError(
            f"output: found {output.dtype} {list(output.shape)}, expected floating {list(shape)}"
        )
    _check_static(problem)
    got = output.detach().cpu().to(torch.float64)
    bounds = _bounds(problem, arithmetic, output_format)
    excess = _excess(got, bounds)
    fits = (excess <= 1).all(1)
    ambiguous = 0
    chosen = problem.routing
    for routing in alternatives:
        other = _different(routing, problem.routing) & ~fits
        if not other.any():
            continue
        tokens = other.nonzero().flatten()
        tried = _bounds(replace(problem, routing=routing).take(tokens), arithmetic, output_format)
        better = (_excess(got[tokens], tried) <= 1).all(1)
        ambiguous += int(better.sum())
        fits[tokens[better]] = True
        chosen = _replaced(chosen, routing, tokens[better])
    excess[fits] = excess[fits].clamp_max(1)
    wrong = (~fits).nonzero().flatten()
    by_badness = wrong[excess[wrong].amax(1).argsort(descending=True)]
    diagnosis: tuple[str, ...] = ()
    if diagnose and len(wrong):
        witnesses = torch.cat([by_badness[:_FAILING], fits.nonzero().flatten()[:_RIGHT]])
        diagnosis = _diagnose(got[witnesses], problem, witnesses, arithmetic, output_format)
    size = bounds.value.square().mean().sqrt().clamp_min(1e-300)
    return MoEComparison(
        shape=(shape[0], shape[1]),
        wrong_tokens=len(wrong),
        wrong_elements=int((excess > 1).sum()),
        ambiguous=ambiguous,
        worst=tuple(
            _element(t, got, bounds, excess, problem) for t in by_badness[:_WORST].tolist()
        ),
        use=float(excess.max()) if excess.numel() else 0.0,
        tightness=float(bounds.error.median() / size) if excess.numel() else 0.0,
        aggregates=_aggregates(
            got, bounds.value, replace(problem, routing=chosen), arithmetic, output_format
        ),
        diagnosis=diagnosis,
    )


def _aggregates(
    got: Tensor, value: Tensor, problem: MoEProblem, arithmetic: Arithmetic, output_format: str
) -> tuple[Aggregate, ...]:
    """Return the worst aggregates beyond their bounds; tokens that are not finite are left out."""
    tokens = (got.isfinite() & value.isfinite()).all(1).nonzero().flatten()
    if not len(tokens):
        return ()
    some = problem.take(tokens)
    spreads = (
        spread_moe(some, pipeline, output=output_format) for pipeline in pipelines(some, arithmetic)
    )
    tried = fitted(got[tokens], spreads, some, tokens.tolist())
    wrong = [family.worst() for family in tried if family.use.max() > 1]
    return tuple(sorted(wrong, key=lambda aggregate: -aggregate.use))


def _replaced(routing: Routing, other: Routing, tokens: Tensor) -> Routing:
    """Return a routing with that of some tokens replaced."""
    ids, weights = routing.topk_ids.clone(), routing.topk_weights.clone()
    ids[tokens], weights[tokens] = other.topk_ids[tokens], other.topk_weights[tokens].to(weights)
    return Routing(ids, weights)


def _check_static(problem: MoEProblem) -> None:
    """Raise `LayerError` if a static scale is missing: a kernel's own would need two passes."""
    fmt = find_format(problem.layer.storage.intermediate)
    if fmt.is_static and problem.experts[0].intermediate_scale is None:
        raise LayerError(
            f"{problem.layer.scheme}: found no intermediate_scale, expected the static scale "
            "that the kernel was given"
        )


def _bounds(problem: MoEProblem, arithmetic: Arithmetic, output_format: str) -> Bounded:
    return bounded_moe(
        problem.hidden,
        problem.experts,
        problem.routing,
        problem.layer,
        arithmetic,
        shard=problem.shard,
        output=output_format,
    )


def _excess(got: Tensor, bounds: Bounded) -> Tensor:
    """Error in units of its budget, `[tokens, hidden]`; infinite where only one of both is NaN."""
    error = (got - bounds.value).abs()
    # Sums of float64 have their own rounding; nothing that a kernel stores is that fine.
    share = error / (bounds.error + 1e-12 * bounds.value.abs() + 1e-300)
    same = (got == bounds.value) | (got.isnan() & bounds.value.isnan())
    return share.nan_to_num(torch.inf, torch.inf).masked_fill(same, 0.0)


def _different(one: Routing, other: Routing) -> Tensor:
    ids = one.topk_ids.sort(1).values != other.topk_ids.sort(1).values
    return ids.any(1)


def _element(
    token: int, got: Tensor, bounds: Bounded, excess: Tensor, problem: MoEProblem
) -> Element:
    column = int(excess[token].argmax())
    return Element(
        token,
        column,
        bounds.value[token, column].item(),
        got[token, column].item(),
        bounds.error[token, column].item(),
        tuple(problem.routing.topk_ids[token].tolist()),
    )


def _diagnose(
    got: Tensor, problem: MoEProblem, tokens: Tensor, arithmetic: Arithmetic, output_format: str
) -> tuple[str, ...]:
    """Return the defects under which these tokens, wrong and right, lie within their budget."""
    found = []
    for defect in DEFECTS:
        # The whole problem is changed, as scales of one token may come to stand at another.
        changed = defect.change(problem)
        if changed is None:
            continue
        # The worst token by itself first: most defects are ruled out by it.
        if all(
            _fits(changed, part, got, arithmetic, output_format) for part in (tokens[:1], tokens)
        ):
            found.append(defect.name)
    return tuple(found)


def _fits(
    problem: MoEProblem, tokens: Tensor, got: Tensor, arithmetic: Arithmetic, output_format: str
) -> bool:
    bounds = _bounds(problem.take(tokens), arithmetic, output_format)
    return bool((_excess(got[: len(tokens)], bounds) <= 1).all())
