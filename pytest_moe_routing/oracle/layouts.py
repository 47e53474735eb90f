"""Whether the weights and scales that a kernel is given lie as its call says that they do.

What a framework does with weights depends on the checkpoint and on the kind of experts, not on how
their router chooses, nor on how many there are. So one model of each kind is asked, in each scheme.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.laid_out import LaidOut
from pytest_moe_routing.oracle.target import Target

#: FlashInfer's `WeightLayout`, whose numbers have never moved.
_LAYOUTS = ("MajorK", "MajorMn", "BlockMajorK")


@dataclass(frozen=True)
class WrongLayout:
    """What a kernel finds in other places than its call says.

    Attributes:
        models: The model that was asked, and those with experts of its kind.
    """

    at: LaidOut
    models: tuple[ModelSpec, ...]


@dataclass(frozen=True)
class LayoutsFound:
    """How a target hands over weights and scales in a scheme.

    Attributes:
        answered: How many models were asked or have experts of the kind of one that was.
        unanswered: Why how many models could not be asked.
        run: The lines of the target that were run; see `LaidOut.run`.
    """

    wrong: tuple[WrongLayout, ...]
    answered: int
    unanswered: Counter[str]
    run: frozenset[str] = frozenset()


def wrong_layouts(target: Target, scheme: str, models: Iterable[ModelSpec]) -> LayoutsFound:
    """Ask about a model of each kind that the target runs in the scheme's kernels."""
    kinds: dict[Any, list[ModelSpec]] = {}
    served, unanswered = list[ModelSpec](), Counter[str]()
    for model in models:
        try:
            way = target.weight_path(model, scheme)
        except Unsupported as reason:
            unanswered[str(reason)] += 1
            continue
        served.append(model)
        if way is not None:
            kinds.setdefault((way, kind_of(model)), []).append(model)
    wrong: dict[Any, tuple[LaidOut, list[ModelSpec]]] = {}
    answered, run = set[ModelSpec](), set[str]()
    for members in kinds.values():
        first, found = _ask(target, scheme, members)
        if isinstance(found, Unsupported):
            unanswered[str(found)] += len(members)
            continue
        answered.update(members)
        others = [model for model in members if model is not first]
        for at in found:
            run.update(at.run)
            # Entry points that a method hands the same weights show one mistake.
            key = at.method, tuple(replace(each, where="") for each in at.findings)
            if at.findings:
                wrong.setdefault(key, (at, []))[1].extend([first, *others])
    mistakes = (WrongLayout(at, tuple(dict.fromkeys(given))) for at, given in wrong.values())
    elsewhere = _elsewhere(target, scheme, served, answered, unanswered, run)
    wrongs = *mistakes, *elsewhere
    return LayoutsFound(wrongs, len(answered), unanswered, frozenset(run))


def _elsewhere(
    target: Target,
    scheme: str,
    models: Iterable[ModelSpec],
    answered: set[ModelSpec],
    unanswered: Counter[str],
    run: set[str],
) -> Iterable[WrongLayout]:
    """Ask about a model of each kind that the target runs in other kernels than the scheme's.

    Args:
        answered, unanswered, run: Those of the scheme's own kernels, to which these are added.
    """
    wrong: dict[Any, tuple[LaidOut, list[ModelSpec]]] = {}
    kinds: dict[Any, list[ModelSpec]] = {}
    for model in models:
        kind = kind_of(model), target.taken_elsewhere(model, scheme)
        kinds.setdefault(kind, []).append(model)
    for members in kinds.values():
        # A layer of few experts is made sooner.
        alike = sorted(members, key=lambda model: model.router.num_experts)
        found, reasons = _on_each_way(target, scheme, alike, unanswered)
        unanswered.update({reason: len(alike) for reason in reasons})
        if found:
            answered.update(alike)
        run.update(line for at in found for line in at.run)
        for at in _met_most(found):
            if at.findings:
                # Precisions of one GPU show one mistake.
                key = at.method, at.device, at.findings
                wrong.setdefault(key, (at, []))[1].extend(alike)
    return (WrongLayout(at, tuple(dict.fromkeys(given))) for at, given in wrong.values())


def _met_most(found: Sequence[LaidOut]) -> Iterator[LaidOut]:
    """Yield the calls without those that need more flags to show the same mistake."""
    least: dict[Any, int] = {}
    for at in found:
        key, count = (at.method, at.findings), len(at.switches or ())
        least[key] = min(count, least.get(key, count))
    for at in found:
        if len(at.switches or ()) == least[at.method, at.findings]:
            yield at


def _on_each_way(
    target: Target, scheme: str, models: Iterable[ModelSpec], unanswered: Counter[str]
) -> tuple[list[LaidOut], set[str]]:
    """Ask about models of one kind until one has answered on each way to a kernel.

    Returns:
        The answers, and why there is none on further ways.
    """
    found: dict[Any, list[LaidOut]] = {}
    open_ones: dict[Any, str] = {}
    for model in models:
        try:
            answers = target.laid_out_elsewhere(model, scheme)
        except Unsupported as reason:
            unanswered[str(reason)] += 1
            continue
        before = {*found}
        for at in answers:
            way = at.switches, at.device
            if at.unanswered:
                open_ones.setdefault(way, at.unanswered)
            elif way not in before:
                found.setdefault(way, []).append(at)
        if answers and open_ones.keys() <= found.keys():
            break
    every = [at for each in found.values() for at in each]
    return every, {reason for way, reason in open_ones.items() if way not in found}


def _ask(
    target: Target, scheme: str, models: Iterable[ModelSpec]
) -> tuple[ModelSpec, tuple[LaidOut, ...] | Unsupported]:
    """Ask about the model with the fewest experts, or another that routes by another method."""
    asked: dict[str, tuple[ModelSpec, Unsupported]] = {}
    for model in sorted(models, key=lambda model: model.router.num_experts):
        method = target.classify(model).method
        if method in asked:
            continue
        try:
            return model, target.laid_out(model, scheme)
        except Unsupported as reason:
            asked[method] = model, reason
    return next(iter(asked.values()))


def kind_of(model: ModelSpec) -> Any:
    """Return what tells apart kinds of experts, whose weights get to a kernel in different ways."""
    # Frameworks may store weights again for experts with a limit.
    has_limit = model.experts.activation_limit is not None
    return model.experts.activation, model.experts.bias, has_limit


def layout_findings(orders: Sequence[Mapping[str, Any]], where: str) -> tuple[Finding, ...]:
    """Return what is wrong with the orders of a call's tensors.

    Args:
        orders: For each tensor its `name`, the order that is `read` and the one that is `found`
            (None for one that is not known), and the flags that the call is `told`.
    """
    found: dict[tuple[str, str], list[str]] = {}
    flags: dict[Finding, None] = {}
    for order in orders:
        for wanted, what in _differences(order):
            if wanted:
                flag, value = wanted
                flags[Finding(Kind.LAYOUT, flag, value, what, where)] = None
            else:
                found.setdefault(("", what), []).append(order["name"])
    told = (
        Finding(Kind.LAYOUT, " and ".join(names), None, what, where)
        for (_, what), names in found.items()
    )
    return (*flags, *told)


def _differences(order: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str] | None, str]]:
    """Yield how a tensor lies otherwise than it is read, and the flag that says so, if any."""
    read, found, told = order["read"], order["found"], order["told"]
    if found is None:
        yield None, "its rows and columns lie in no order that a kernel reads"
        return
    if found["up_first"] != read["up_first"]:
        yield None, "gate and up halves are swapped"
    if found["interleaved"] != read["interleaved"]:
        yield (
            None,
            f"gate and up rows {'alternate' if found['interleaved'] else 'do not alternate'}",
        )
    if found["group"] != read["group"]:
        groups = f"in groups of {found['group']}" if found["group"] else "in halves"
        yield None, f"gate and up rows lie {groups}, the kernel reads groups of {read['group']}"
    if found["tile"] != read["tile"]:
        if not (found["tile"] and read["tile"]):
            state = "shuffled" if found["tile"] else "not shuffled"
            flag = "use_shuffled_weight"
            is_told = flag in told
            yield ((flag, str(bool(told[flag]))), state) if is_told else (None, f"rows are {state}")
        else:
            yield None, f"rows are shuffled in tiles of {found['tile']}, not of {read['tile']}"
    if found["hopper"] != read["hopper"]:
        state = "interleaved" if found["hopper"] else "not interleaved"
        yield None, f"it is {state} for Hopper's mixed-input GEMM"
    if found["weight_layout"] != read["weight_layout"]:
        is_, says = _LAYOUTS[found["weight_layout"]], _LAYOUTS[read["weight_layout"]]
        if "weight_layout" in told:
            yield ("weight_layout", says), is_
        else:
            yield None, f"it lies as {is_}, the kernel reads {says}"
    if found["dtype"] != read["dtype"]:
        yield None, f"it is {found['dtype']}, the kernel reads {read['dtype']}"
    if found["tiled"] != read["tiled"]:
        places = ("rows in their order", "128x4 tiles")
        yield None, f"it lies in {places[found['tiled']]}, the kernel reads {places[read['tiled']]}"
