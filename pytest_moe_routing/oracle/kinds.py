"""Asks a target about one model of each kind, where others of the kind have the same answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import TypeVar

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec

_Answer = TypeVar("_Answer")


def of_each_kind(
    models: Iterable[ModelSpec],
    kind_of: Callable[[ModelSpec], Hashable],
    ask: Callable[[ModelSpec], _Answer],
    unanswered: Counter[str],
) -> Iterator[tuple[list[ModelSpec], _Answer]]:
    """Yield the models of each kind, the one that was asked about first, and the answer.

    Args:
        ask: Asks about a model. If the answer is empty, or `Unsupported` is raised, the next model
            of the kind is asked.
        unanswered: Counts why models could not be asked; it is added to.
    """
    kinds: dict[Hashable, list[ModelSpec]] = {}
    for model in models:
        kinds.setdefault(kind_of(model), []).append(model)
    for members in kinds.values():
        # A layer of few experts is made sooner.
        for model in sorted(members, key=lambda model: model.router.num_experts):
            try:
                answer = ask(model)
            except Unsupported as reason:
                unanswered[str(reason)] += 1
                continue
            if answer:
                yield [model, *(other for other in members if other is not model)], answer
                break
