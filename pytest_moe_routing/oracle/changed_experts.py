"""Models that end with another class of experts than their release is known to take for them.

`taken_experts.yaml` says which classes that call no kernel of FlashInfer's each release ends with.
Where a gate of such a class no longer accepts a model, the class is lost. Where another class
precedes it, nobody has asked what that one does: it fails if the release is the one that the data
describe, and is not judged otherwise.

Monolithic classes are judged by what they compute: their gate must reject a routing method that
they do not compute, and accept one that they do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec
from pytest_moe_routing.oracle.finding import Finding, Kind
from pytest_moe_routing.oracle.taken import (
    LORA,
    NONE,
    SPLITS,
    Kept,
    Key,
    Router,
    TakenExperts,
)
from pytest_moe_routing.oracle.target import Target
from pytest_moe_routing.routing import METHODS, same

#: Recipes of routing methods by name.
_ROWS = {method.name: row for method, row in METHODS.items()}


@dataclass(frozen=True)
class OtherClass:
    """Cases that end with another class, by the decision of one function.

    Attributes:
        known: The class that is known; `NONE` if the models were rejected.
        now: The class in the first case, likewise.
        cases: The one that needs the least first.
        switches: What that one needs.
        since: The release that the data describe.
        is_computed: Whether the known class routes, and computes the models' routing methods.
        limit: Why FlashInfer has no kernel for the class of the first case; empty if it may have.
    """

    known: str
    now: str
    cases: tuple[Key, ...]
    switches: tuple[str, ...]
    models: tuple[ModelSpec, ...]
    kept: Kept
    since: str
    is_computed: bool = False
    limit: str = ""


@dataclass(frozen=True)
class WrongGate:
    """A gate of monolithic experts that is wrong about a routing method.

    Attributes:
        accepted: Whether it accepts the method, although the experts compute something else; if
            not, it rejects the method although they compute it.
        models: Those that it is wrong about.
        cases: Where they are; the one that needs the least first.
        switches: What that one needs.
    """

    router: Router
    accepted: bool
    method: str
    findings: tuple[Finding, ...]
    models: tuple[ModelSpec, ...]
    cases: tuple[Key, ...]
    switches: tuple[str, ...]


@dataclass(frozen=True)
class ChangedExperts:
    """What a target ends with otherwise than is known, and the gates that are wrong.

    Attributes:
        answered: How many models were asked about.
        unanswered: What is not judged of how many models.
    """

    changed: tuple[OtherClass, ...]
    gates: tuple[WrongGate, ...]
    answered: int
    unanswered: Counter[str]


def changed_experts(target: Target, scheme: str, models: Iterable[ModelSpec]) -> ChangedExperts:
    """Compare the classes that a target ends with to those that its release is known to."""
    by_id = {str(model): model for model in models}
    try:
        taken = target.taken_experts(list(by_id.values()), scheme)
    except Unsupported as reason:
        return ChangedExperts((), (), 0, Counter([str(reason)]))
    if taken is None:
        return ChangedExperts((), (), 0, Counter())
    unanswered = taken.unanswered.copy()
    changed: list[OtherClass] = []
    gates: list[WrongGate] = []
    entry = target.flashinfer.entry_point(scheme)
    for each in _changed(taken, by_id, 1 if entry is None else entry.multiple_of):
        now, known, kept = each.now, each.known, each.kept
        if kept.is_gate or taken.known.is_own or each.limit:
            changed.append(each)
        else:
            gone = "" if kept.exists or known == NONE else ", which are gone"
            why = f"{now} take the place of {known}{gone}, as in no known release"
            unanswered[why] += len(each.models)
    for router in taken.routers:
        gates += _wrong_gates(taken, router, by_id)
        if not taken.known.is_own:
            unanswered.update({r.unknown for r in router.methods.values() if r.unknown})
    lost = {(each.known, key) for each in changed for key in each.cases}
    # Models that lose a class for such a gate have been told of.
    gates = [g for g in gates if not (_lost(g) and lost >= _lost(g))]
    unanswered.update(_not_run(taken))
    return ChangedExperts(tuple(changed), tuple(gates), len(taken.methods), unanswered)


def _lost(gate: WrongGate) -> set[tuple[str, Key]]:
    """Return the cases in which a gate keeps its experts from models."""
    return set() if gate.accepted else {(gate.router.name, key) for key in gate.cases}


def _not_run(taken: TakenExperts) -> Counter[str]:
    """Count the models that end by default with classes of which no call is judged."""
    routers = {router.name for router in taken.routers}
    by_default = {
        (name, model)
        for (model, _, way), name in taken.classes.items()
        if not taken.switches[way] and name not in taken.elsewhere and name != NONE
    }
    counts = Counter(name for name, _ in by_default)
    return Counter(
        {
            f"{name}: {'what follows routing' if name in routers else 'what they compute'}": count
            for name, count in sorted(counts.items())
        }
    )


def _limit(taken: TakenExperts, key: Key, model: ModelSpec, multiple_of: int) -> str:
    """Return why FlashInfer has no kernel for what is taken of split experts; empty if it may."""
    splits, count = taken.known.splits, SPLITS.get(key[2], 1)
    size = model.experts.intermediate_size // count
    if splits is None or count == 1 or not fnmatchcase(taken.classes[key], splits.unpadded):
        return ""
    return f"FlashInfer has no kernel for {size} rows of a rank" if size % multiple_of else ""


def _changed(
    taken: TakenExperts, models: dict[str, ModelSpec], multiple_of: int
) -> Iterator[OtherClass]:
    """Yield one for all cases that one function decides in the same way.

    Args:
        multiple_of: What FlashInfer's kernels need of a rank's intermediate size.
    """
    groups: dict[tuple[str, str, Kept], list[Key]] = {}
    # What is known of others than FlashInfer's; where nothing is, FlashInfer's were taken.
    for key, known in {**taken.preceded, **taken.known.classes}.items():
        now = taken.classes.get(key, NONE)
        if now != known:
            kept = taken.kept_by(key, known)
            # What arrives at a kernel of FlashInfer's is asked elsewhere, for whole experts.
            is_whole = key[2] not in SPLITS and not key[2].startswith(LORA)
            if kept.is_gate or not is_whole or now not in taken.elsewhere:
                groups.setdefault((known, "" if kept.is_gate else now, kept), []).append(key)
    methods = {router.name: _computed(router) for router in taken.routers}
    for (known, _, kept), keys in groups.items():
        keys.sort(key=lambda key: len(taken.switches[key[2]]))
        now = taken.classes[keys[0]]
        found = dict.fromkeys(key[0] for key in keys)
        computed = all(taken.methods[each] in methods.get(known, ()) for each in found)
        affected = tuple(models[each] for each in found)
        cases, switches = tuple(keys), taken.switches[keys[0][2]]
        since = taken.known.release
        limit = _limit(taken, keys[0], models[keys[0][0]], multiple_of)
        yield OtherClass(known, now, cases, switches, affected, kept, since, computed, limit)


def _computed(router: Router) -> set[str]:
    """Return the routing methods that experts compute, whatever their gate says."""
    return {name for name in router.methods if not _findings(router, name)}


def _findings(router: Router, method: str) -> tuple[Finding, ...]:
    """Return in what the experts' calls differ from a routing method."""
    row = _ROWS.get(method)
    if row is None:
        return (Finding(Kind.RECIPE, method, fact="no recipe computes the routers of this method"),)
    routed, found = router.methods[method], []
    if routed.unknown:
        return (Finding(Kind.RECIPE, method, fact=routed.unknown),)
    for got in routed.recipes:
        wanted = row.bind(top_k=router.top_k, bias="bias" in row.honors)
        # What the kernel rounds weights to is not known.
        got = replace(got, weight_dtype=wanted.weight_dtype)
        if not same(wanted, got, router.num_experts):
            differing = wanted.differences(got)
            found += [Finding(Kind.RECIPE, n, w, g) for n, (w, g) in differing.items()]
    if not found and routed.rounded:
        found.append(Finding(Kind.DOWNCAST, "score", "float32", routed.rounded))
    return tuple(dict.fromkeys(found))


def _wrong_gates(
    taken: TakenExperts, router: Router, models: dict[str, ModelSpec]
) -> Iterator[WrongGate]:
    computed = _computed(router)
    for method, routed in router.methods.items():
        if routed.accepted == (method in computed):
            continue
        if routed.unknown and not taken.known.is_own:
            continue
        where = taken.classes if routed.accepted else taken.kept_out
        cases = [
            key
            for key, name in where.items()
            if name == router.name and taken.methods[key[0]] == method
        ]
        cases.sort(key=lambda key: len(taken.switches[key[2]]))
        affected = tuple(models[each] for each in dict.fromkeys(key[0] for key in cases))
        findings = _findings(router, method) if routed.accepted else ()
        switches = taken.switches[cases[0][2]] if cases else ()
        about = findings, affected, tuple(cases), switches
        yield WrongGate(router, routed.accepted, method, *about)
