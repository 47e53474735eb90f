"""What the factors of each expert mean to a fused entry point; the data is in `scales.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from pytest_moe_routing.data import read_data
from pytest_moe_routing.schemes import KernelSpec

#: Scales of whole tensors of an expert, see `scales.yaml`.
SCALES = ("w1_scale", "w3_scale", "a1_scale", "w2_scale", "a2_scale")


@dataclass(frozen=True)
class Formula:
    """A product of powers of scales.

    Attributes:
        powers: The power of each of `SCALES`.
    """

    powers: tuple[int, ...]

    @classmethod
    def of(cls, text: str) -> Formula:
        """Read a formula such as `w1_scale * a1_scale / a2_scale`."""
        powers, sign = dict.fromkeys(SCALES, 0), 1
        for part in text.split():
            if part in ("*", "/"):
                sign = 1 if part == "*" else -1
            elif part != "1":
                powers[part] += sign
        return cls(tuple(powers.values()))

    def __str__(self) -> str:
        above = [name for name, power in zip(SCALES, self.powers, strict=True) if power > 0]
        below = [name for name, power in zip(SCALES, self.powers, strict=True) if power < 0]
        times = dict(zip(SCALES, map(abs, self.powers), strict=True))
        names = [name for name in above for _ in range(times[name])]
        under = [name for name in below for _ in range(times[name])]
        return " / ".join([" * ".join(names) or "1", *under])

    def values(self, scales: Mapping[str, tuple[float, ...]]) -> tuple[float, ...]:
        """Return the value for each expert; a scale that is not given is 1."""
        count = max(map(len, scales.values()), default=1)
        found = [1.0] * count
        for name, power in zip(SCALES, self.powers, strict=True):
            if power and name in scales:
                each = scales[name]
                found = [value * each[i % len(each)] ** power for i, value in enumerate(found)]
        return tuple(found)


_ONE = Formula.of("1")
#: Formulas by which wrong values are recognized, the simplest first.
_LIKELY = tuple(
    sorted(
        (Formula(powers) for powers in product(range(-2, 3), repeat=len(SCALES))),
        key=lambda formula: (sum(map(abs, formula.powers)), [-power for power in formula.powers]),
    )
)


def likely_formulas() -> tuple[Formula, ...]:
    """Return the formulas that a caller may have computed instead of the right one."""
    return _LIKELY


@cache
def _data() -> Mapping[str, Any]:
    data: Mapping[str, Any] = read_data(__package__, "scales.yaml")
    return data


def is_documented(activation: str, kernel: KernelSpec) -> bool:
    """Return whether FlashInfer documents the factors and units of an activation."""
    return not kernel.scalars or activation not in _data()["undocumented"]


def factors(kernel: KernelSpec, *, gated: bool, is_tied: bool = True) -> Mapping[str, Formula]:
    """Return what each argument that holds a factor has to be.

    Args:
        is_tied: Whether gate and up rows of gated experts have one scale.
    """
    kind = ("gated" if is_tied else "gated, two scales") if gated else "not gated"
    return _factors(kernel.scalars or "scale", kind)


@cache
def _factors(spelling: str, kind: str) -> Mapping[str, Formula]:
    """Read the formulas of `factors` once: every call of the config sweep is compared with them."""
    rows: Mapping[str, Mapping[str, str]] = _data()["factors"]
    return {
        name.format(spelling): Formula.of(row.get("any") or row[kind]) for name, row in rows.items()
    }


def unit(parameter: str, kernel: KernelSpec) -> Formula:
    """Return by what the model's number of a parameter of the activation is divided."""
    return _unit(parameter) if kernel.scalars else _ONE


@cache
def _unit(parameter: str) -> Formula:
    return Formula.of(_data()["units"][parameter])


@cache
def input_scale(scheme: str) -> Formula | None:
    """Return what the quantizer of the input is given; None where the input has no such scale."""
    text = _data()["inputs"].get(scheme)
    return None if text is None else Formula.of(text)
