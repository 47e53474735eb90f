"""The failures of weights that a model's code loads into another matrix's place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pytest_moe_routing.failure import Failure, Rank, cause_id

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.misnamed import MisnamedWeight


def of_misnamed(model: ModelSpec, weights: Iterable[MisnamedWeight]) -> Iterator[Failure]:
    """Yield a failure for each definition that loads weights into another matrix's place."""
    by_function: dict[tuple[str, str], list[MisnamedWeight]] = {}
    for weight in weights:
        by_function.setdefault((weight.file, weight.function), []).append(weight)
    for (file, function), found in by_function.items():
        told = (
            f"{each.name} of a checkpoint, which is {each.own}, as {each.place}" for each in found
        )
        lines = (
            f"{model}: {function} loads weights into another matrix's place",
            "  reach    a published checkpoint, by default",
            f"  because  it loads {'; and '.join(dict.fromkeys(told))}",
            f"  at       {', '.join(f'{file}:{each.line}' for each in found)}",
        )
        source = f"{file}:{found[0].line}"
        cause = cause_id("weight-names", f"{file.rpartition('/')[2]}-{function}")
        yield Failure(cause, Rank.SILENT, model.id, lines, source)
