"""The scales and the activation's parameters that a kernel call has, against what they mean.

A record describes a vector with one number for each expert by `all`, if they are equal, or by
`each`: those of the first experts, which repeat.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import inf, isclose, isfinite
from typing import Any

from pytest_moe_routing.flashinfer import scales
from pytest_moe_routing.models import ExpertsConfig
from pytest_moe_routing.oracle.calls import PARAMETERS
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.schemes import KernelSpec

Arguments = Mapping[str, Any]
Scales = Mapping[str, tuple[float, ...]]

#: How far a product of float32 numbers may be off.
_TOLERANCE = 1e-5


def wrong_scales(
    experts: ExpertsConfig, kernel: KernelSpec, arguments: Arguments, given: Scales
) -> Iterator[Finding]:
    """Yield scales and biases that are not what the entry point takes them for.

    Args:
        given: The scales of whole tensors that the layer has.
    """
    if kernel.weight_scales != "none":
        for gemm in ("gemm1", "gemm2"):
            yield from _tensor(f"{gemm}_{kernel.scale_argument}", arguments, f"{gemm} scales")
    for gemm in ("gemm1", "gemm2"):
        name = f"{gemm}_bias"
        if experts.bias:
            yield from _tensor(name, arguments, name.replace("_", " "))
        elif (value := arguments.get(name)) is not None and value.get("all") != 0:
            yield Finding(Kind.ARGUMENT, name, "none", "a tensor")
    yield from wrong_factors(experts, kernel, arguments, given)


def wrong_factors(
    experts: ExpertsConfig, kernel: KernelSpec, arguments: Arguments, given: Scales
) -> Iterator[Finding]:
    """Yield factors of each expert that are not what the entry point takes them for."""
    if not scales.is_documented(experts.activation, kernel):
        return
    given = given if kernel.scalars else {}
    is_tied = "w3_scale" not in given
    for name, formula in scales.factors(kernel, gated=experts.gated, is_tied=is_tied).items():
        if name not in arguments:
            continue
        got = _numbers(arguments[name], 1.0)
        if got is None or not _same(got, formula.values(given)):
            text = "none" if arguments[name] is None else _explained(got, given)
            wanted = str(formula) if kernel.scalars else "1"
            yield Finding(Kind.ARGUMENT, name, wanted, text)


def wrong_input(scheme: str, record: Mapping[str, Any], given: Scales) -> Iterator[Finding]:
    """Yield that the input is quantized with another scale than the kernel takes it for.

    Args:
        record: A call, with what its quantizer was given as `input_scale`, if one was called.
    """
    formula = scales.input_scale(scheme)
    if formula is None or "input_scale" not in record:
        return
    scale = record["input_scale"]
    got = None if scale is None else _numbers(scale, 1.0)
    if got is None or not _same(got, formula.values(given)):
        text = "none" if scale is None else _explained(got, given)
        yield Finding(Kind.ARGUMENT, "input_scale", str(formula), text)


def wrong_factor(
    name: str, value: Any, role: str, formula: scales.Formula, given: Scales
) -> Iterator[Finding]:
    """Yield that a scale of a call is not what its kernel takes it for.

    Args:
        name: The argument that holds the scale.
        value: The scale as a record describes it.
        role: What the scale is to the kernel.
    """
    got = _numbers(value, 1.0)
    if got is None or not _same(got, formula.values(given)):
        wanted = f"{formula} as {role}"
        yield Finding(Kind.ARGUMENT, name, wanted, _explained(got, given))


def wrong_parameters(
    experts: ExpertsConfig, kernel: KernelSpec, arguments: Arguments, given: Scales
) -> Iterator[Finding]:
    """Yield parameters of Swiglu or SiTU that are not the model's: all kinds of one are one kernel.

    "``None`` materializes per-expert ``beta=1``", says flashinfer/fused_moe/core.py of SiTU.
    """
    if not scales.is_documented(experts.activation, kernel):
        return
    given, is_situ = given if kernel.scalars else {}, experts.activation == "situ"
    for name, (field, usual) in PARAMETERS.items():
        stated, neutral = getattr(experts, field), usual
        if is_situ and name == "gemm1_beta":
            neutral, stated = 1.0, inf if stated is None else stated
        wanted = neutral if stated is None else float(stated)
        if arguments.get(name) is None:
            if not isclose(wanted, neutral):
                yield Finding(Kind.ARGUMENT, name, wanted, neutral)
            continue
        got, unit = _numbers(arguments[name], neutral), scales.unit(name, kernel)
        units = unit.values(given)
        if got is not None and _same(got, [wanted / each for each in units]):
            continue
        model = [g * u for g, u in _pairs(got, units)] if got is not None else [0.0, 1.0]
        if isclose(min(model), max(model), rel_tol=_TOLERANCE):
            yield Finding(Kind.ARGUMENT, name, wanted, max(model))
            continue
        is_unit = not any(unit.powers)
        right = f"{wanted:g}" if is_unit else f"{wanted:g} / ({unit})"
        yield Finding(Kind.ARGUMENT, name, right, _explained(got, given, wanted))


def _tensor(name: str, arguments: Arguments, wanted: str) -> Iterator[Finding]:
    value = arguments.get(name)
    if value is None or value.get("is") != wanted:
        known = None if value is None else value.get("is")
        got = "none" if value is None else f"the {known}" if known else "another tensor"
        yield Finding(Kind.ARGUMENT, name, f"the {wanted}", got)


def _numbers(value: Any, absent: float) -> tuple[float, ...] | None:
    """Return the numbers of the first experts; None if they do not repeat."""
    if value is None:
        return (absent,)
    if "all" in value:
        return (float(value["all"]),)
    return tuple(map(float, value["each"])) if "each" in value else None


def _same(got: Sequence[float], wanted: Sequence[float]) -> bool:
    """Return whether vectors are equal."""
    return all(isclose(*pair, rel_tol=_TOLERANCE) for pair in _pairs(got, wanted))


def _pairs(one: Sequence[float], other: Sequence[float]) -> list[tuple[float, float]]:
    """Return the numbers of two vectors for each expert; the shorter vector repeats."""
    count = max(len(one), len(other))
    return [(one[i % len(one)], other[i % len(other)]) for i in range(count)]


def _explained(got: Sequence[float] | None, given: Scales, number: float = 1.0) -> str:
    """Return the formula that gives these values, or the values."""
    if got is None:
        return "other values"
    if number and isfinite(number):
        ratios = [value / number for value in got]
        for formula in scales.likely_formulas():
            if _same(ratios, formula.values(given)):
                text = str(formula)
                if number == 1.0 or text == "1":
                    return text if number == 1.0 else f"{number:g}"
                return f"{number:g}{text[1:]}" if text.startswith("1 /") else f"{number:g} * {text}"
    return ", ".join(f"{value:.6g}" for value in got)
