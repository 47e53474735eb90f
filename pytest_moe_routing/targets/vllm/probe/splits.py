"""Asks selectors about experts that are split over ranks, and about adapters (`--enable-lora`).

What a selector decides depends on the fields of the layer's config that its code reads. Most read
none that a split changes: an answer is kept for all configs that have the same in what was read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import fields, replace
from functools import cache, partial
from itertools import repeat
from types import CodeType, SimpleNamespace
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.oracle.taken import LORA, NAMED, SPLITS
from pytest_moe_routing.targets.answers import RuleAnswer
from pytest_moe_routing.targets.vllm.probe.choice import REQUESTED, Selector, outcomes
from pytest_moe_routing.targets.vllm.probe.config import parallel_config
from pytest_moe_routing.targets.vllm.probe.gates import ALL
from pytest_moe_routing.targets.vllm.probe.rejections import Rejected, rejections
from pytest_moe_routing.targets.vllm.probe.release import names, vllm_path

#: Fields of vLLM's config of a layer: whether adapters are served, and the sizes of a rank's part.
_ADAPTERS, _WHOLE = "is_lora_enabled", "intermediate_size"
_PART, _UNPADDED = f"{_WHOLE}_per_partition", f"{_WHOLE}_per_partition_unpadded"
#: The method of checkpoints with scales of blocks, which says how a rank's blocks are cut.
_OF_BLOCKS = "method-fp8"
#: Rows of the contract, by scheme: classes for adapters alone, which can be asked for by name.
_OWN = {"bf16": "modular-lora-bf16", "mxfp4": "modular-lora-mxfp4"}
#: What a split changes of a layer's config and of the parallel config in it; all, if read at once.
_OF_SPLIT = {_PART, _UNPADDED, "tp_size", "tp_rank", "__dict__"}
#: The attribute of a watched config that is called.
_TOLD = "_told_of_reads"


def split_ways() -> dict[str, tuple[str, ...]]:
    """Return what a server is told, by the name of the way; a split alone needs no opt-in."""
    adapters = ("--enable-lora",)
    ways = {way: adapters if way.startswith(LORA) else () for way in (LORA, *SPLITS)}
    return {**ways, NAMED: (*adapters, f"--moe-backend {REQUESTED}")}


def _can_split(config: Any, way: str) -> bool:
    """Return whether vLLM has a config for a split: one of equal parts."""
    return _sizes(config)[1] % SPLITS[way] == 0


def _sizes(config: Any) -> tuple[bool, int]:
    """Return whether a config makes the sizes of a rank by itself, and the whole size."""
    makes = hasattr(config, _WHOLE)
    return makes, getattr(config, _WHOLE if makes else _PART)


def _asked(selector: Selector, way: str, scheme: str) -> tuple[Selector, Any]:
    """Return what is asked instead of a selector, and the config that it is asked with."""
    if scheme == "fp8_block" and names().has(_OF_BLOCKS):
        selector = replace(selector, function=_selected_for_blocks)
    changes: dict[str, Any] = {_ADAPTERS: True} if way.startswith(LORA) else {}
    changes |= {"moe_backend": REQUESTED} if way == NAMED else {}
    if (parts := SPLITS.get(way, 1)) > 1:
        makes, whole = _sizes(selector.config)
        known = {field.name for field in fields(selector.config)}
        changes["moe_parallel_config"] = _parallel(parts)
        changes |= {_UNPADDED: None} if _UNPADDED in known else {}
        changes |= {} if makes else {_PART: whole // parts}
    return selector, replace(selector.config, **changes)


@cache
def _parallel(parts: int) -> Any:
    return parallel_config(parts=parts)


def _selected_for_blocks(config: Any, **_: Any) -> tuple[Any, Any]:
    """Return what a method of blocks takes: it cuts the blocks of a split before it asks."""
    about = {
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
        "is_checkpoint_fp8_serialized": True,
    }
    made = names().get(_OF_BLOCKS)(SimpleNamespace(**about), SimpleNamespace(moe_config=config))
    return made.fp8_backend, made.experts_cls


def split_outcomes(selectors: Sequence[Selector], scheme: str) -> tuple[dict[str, list[Any]], str]:
    """Return by way, for each selector, the class that is taken; None if all are rejected.

    A selector whose code reads nothing that a split changes is not asked about splits.

    Returns:
        Nothing by any way, and why, if the release cannot be asked.
    """
    known = {field.name for field in fields(names().get("moe-config"))}
    if lacking := {_ADAPTERS, _PART} - known:
        return {}, f"this release's config of a layer has no {' or '.join(sorted(lacking))}"
    try:
        return _outcomes(selectors, scheme), ""
    except Unsupported as reason:
        return {}, str(reason)


def _outcomes(selectors: Sequence[Selector], scheme: str) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for base in ("", LORA):
        reads = [_Reads() for _ in selectors]
        watched = (partial(_watched, told=each) for each in reads)
        found[base] = taken_in(selectors, base, scheme, watched)
        for way in (way for way in SPLITS if way.startswith(LORA) == bool(base)):
            asked = [
                each.of_split and _can_split(selector.config, way)
                for selector, each in zip(selectors, reads, strict=True)
            ]
            again = [s for s, is_asked in zip(selectors, asked, strict=True) if is_asked]
            answers = iter(taken_in(again, way, scheme))
            found[way] = [
                next(answers) if is_asked else same
                for is_asked, same in zip(asked, found[base], strict=True)
            ]
    del found[""]
    if scheme in _OWN and names().has(_OWN[scheme]):
        found[NAMED] = taken_in(selectors, NAMED, scheme)
    return found


def taken_in(
    selectors: Sequence[Selector],
    way: str,
    scheme: str,
    watched: Iterable[Callable[[Any], Any]] = repeat(lambda config: config),
) -> list[Any]:
    """Return the classes that are taken in a way.

    Args:
        watched: What makes the config that each selector is asked with of its own.
    """
    found: list[Any] = [None] * len(selectors)
    asked = {}
    for place, (selector, watch) in enumerate(zip(selectors, watched, strict=False)):
        with suppress(Rejected), rejections():
            function, config = _asked(selector, way, scheme)
            asked[place] = function, watch(config)
    for place, (_, experts) in zip(asked, outcomes(asked.values(), ()), strict=True):
        found[place] = experts if isinstance(experts, type) else None
    return found


def decider(selector: Selector, way: str, scheme: str) -> RuleAnswer | None:
    """Return the function that reads what a way changes, the last one; None if none does."""
    reads = _Reads()
    taken_in([selector], way, scheme, [partial(_watched, told=reads)])
    for name in (_PART, _ADAPTERS):
        own = [code for code in reads.codes.get(name, ()) if code.co_name != ALL]
        if own:
            source = f"{vllm_path(own[-1].co_filename)}:{own[-1].co_firstlineno}"
            return {"name": own[-1].co_qualname, "source": source, "instead": ""}
    return None


class _Reads:
    """What code reads of a layer's config, and the code by name of the attribute."""

    def __init__(self) -> None:
        self.codes: dict[str, list[CodeType]] = {}

    def __call__(self, name: str, code: CodeType) -> None:
        # Errors show configs.
        if code.co_name != "__repr__":
            self.codes.setdefault(name, []).append(code)

    @property
    def of_split(self) -> bool:
        """Whether something is read that a split changes."""
        return not self.codes.keys().isdisjoint(_OF_SPLIT)


@cache
def _watching(cls: Any) -> Any:
    """Return a class like that of a config; its objects tell of each read of an attribute."""

    class Watched(cls):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            get = super().__getattribute__
            get(_TOLD)(name, sys._getframe(1).f_code)
            return get(name)

    return Watched


def _watched(config: Any, told: _Reads) -> Any:
    """Return a copy of a layer's config, with one of its parallel config, that tell of reads."""
    parallel = copy(config.moe_parallel_config)
    config = copy(config)
    config.moe_parallel_config = parallel
    for each in (config, parallel):
        cls: Any = type(each)
        vars(each)[_TOLD] = told
        object.__setattr__(each, "__class__", _watching(cls))
    return config
