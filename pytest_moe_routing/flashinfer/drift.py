"""Where a flashinfer-python package and this package's data on its release differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from packaging.version import Version

from pytest_moe_routing.errors import ReleaseError
from pytest_moe_routing.escape import shorten
from pytest_moe_routing.flashinfer import signatures, sources
from pytest_moe_routing.flashinfer.grammar import KernelCall
from pytest_moe_routing.flashinfer.operators import compare_operators
from pytest_moe_routing.flashinfer.package import Package
from pytest_moe_routing.flashinfer.rules import FlashInfer, known_releases
from pytest_moe_routing.inputs import parse_release

_ENUM = "RoutingMethodType"
#: Characters of a difference that are shown; a package may have a parameter list of megabytes.
_LINE = 2_000


@dataclass(frozen=True)
class Examination:
    """A package, compared.

    Attributes:
        methods: Routing methods by name, as the package numbers them.
        entry_points: How many entry points were compared.
        calls: How many calls of compiled operators were compared with their declarations.
        differences: Everything in which package and data differ; empty when there is no drift.
        unread: What the data say and the package could not confirm or deny.
    """

    package: Package
    flashinfer: FlashInfer
    methods: Mapping[str, int]
    entry_points: int
    calls: int
    differences: tuple[str, ...]
    unread: tuple[str, ...]

    @property
    def is_newer(self) -> bool:
        return Version(self.package.release) > Version(known_releases()[-1])

    def lines(self) -> list[str]:
        judged = ""
        if self.is_newer:
            judged = f", newer than known, judged as {self.flashinfer.judged_as}"
        elif self.flashinfer.release != self.flashinfer.judged_as:
            judged = f", judged as {self.flashinfer.judged_as}"
        numbered = ", ".join(f"{name} {number}" for name, number in self.methods.items())
        return [
            f"flashinfer-python {self.package.release}{judged} ({self.package.path})",
            f"  methods   {numbered}",
            f"  compared  {self.entry_points} entry points, {self.calls} calls of operators",
            *(f"  not read  {shorten(what, _LINE)}" for what in self.unread),
            *(f"  drift     {shorten(what, _LINE)}" for what in self.differences),
            *([] if self.differences else [f"  no drift{self._but_for()}"]),
        ]

    def _but_for(self) -> str:
        """Say how much stayed open; an open question is no drift, and no proof of its absence."""
        return f" in what was read; not read: {len(self.unread)} (above)" if self.unread else ""


def drift(path: Path) -> list[str]:
    """Return the differences between a package and the bundled facts for its release.

    Raises:
        ReleaseError: The path is no flashinfer-python, or one of a release that has no data.
    """
    return list(examine(Package.of(path)).differences)


def examine(package: Package) -> Examination:
    """Compare a package with the bundled facts for its release.

    Raises:
        ReleaseError: The package cannot be read, or its release has no data.
    """
    try:
        parse_release(package.release)
    except ValueError:
        raise ReleaseError(
            f"{package.path}: {shorten(repr(package.release))} is not a release"
        ) from None
    flashinfer = FlashInfer.of(package.release)
    methods = package.enums.get(_ENUM, {})
    operators = compare_operators(package)
    unread = [*operators.unread]
    differences = [
        *_enum_differences(_ENUM, methods, {m: i for i, m in enumerate(flashinfer.methods)}),
        *_python_differences(package),
        *_source_differences(package, flashinfer, unread),
        *operators.differences,
    ]
    return Examination(
        package,
        flashinfer,
        methods,
        len(package.signatures),
        operators.calls,
        tuple(differences),
        tuple(unread),
    )


def _enum_differences(
    name: str, found: Mapping[str, int], known: Mapping[str, int]
) -> Iterator[str]:
    for member in sorted({*found, *known}, key=lambda m: (found.get(m, known.get(m, 0)), m)):
        if found.get(member) != known.get(member):
            yield f"{name}.{member}: package {found.get(member)}, bundled facts {known.get(member)}"


def _python_differences(package: Package) -> Iterator[str]:
    release = package.release
    for name in signatures.enums():
        members = package.enums.get(name, {})
        yield from _enum_differences(name, members, signatures.enum(name, release))
    for function in sorted({*package.signatures, *signatures.functions(release)}):
        found = package.signatures.get(function)
        known = signatures.parameters(function, release)
        if found is None or known is None:
            holder = "the bundled facts have" if found is None else "the package has"
            yield f"{function}: only {holder} it"
        elif found != known:
            new = [p for p in found if p not in known]
            gone = [p for p in known if p not in found]
            changes = [f"+ {p}" for p in new] + [f"- {p}" for p in gone]
            yield f"{function}: {', '.join(changes) or 'another order'}"


def _source_differences(
    package: Package, flashinfer: FlashInfer, unread: list[str]
) -> Iterator[str]:
    twin = sources.methods(package)
    if twin is None:
        unread.append(f"{_ENUM} in runner.h")
    else:
        yield from _enum_differences(f"runner.h {_ENUM}", twin, package.enums.get(_ENUM, {}))
    for method in flashinfer.methods:
        probe = _probe(flashinfer, method)
        tiers = sources.tiers(package, method)
        if tiers is not None:
            yield from _tier_differences(flashinfer, probe, tiers, "kernel")
        elif not flashinfer.violations(probe):
            unread.append(f"limits of the kernel of {method}")
    bounds = sources.block_scale_top_k(package)
    for method in ("Renormalize", "DeepSeekV3"):
        if method not in bounds:
            unread.append(f"top_k that the block-scale launcher accepts for {method}")
            continue
        probe = replace(_probe(flashinfer, method), scheme="fp8_block")
        yield from _tier_differences(flashinfer, probe, bounds[method], "block-scale launcher")
    kept = sources.groups(package)
    if kept is None:
        unread.append("groups of the DeepSeek kernel")
    else:
        yield from _group_differences(flashinfer, *kept)


def _probe(flashinfer: FlashInfer, method: str) -> KernelCall:
    """Return a small call that every release takes, by the launcher with the fewest own limits."""
    return KernelCall(
        scheme="nvfp4",
        method=method,
        num_experts=64,
        top_k=1,
        logits_dtype="float32" if method == "DeepSeekV3" else "bfloat16",
        n_group=int(method == "DeepSeekV3"),
        topk_group=int(method == "DeepSeekV3"),
        bias="router" if flashinfer.honors(method, "bias") else "none",
        bias_dtype="bfloat16",
    )


def _tier_differences(
    flashinfer: FlashInfer, probe: KernelCall, tiers: sources.Tiers, who: str
) -> Iterator[str]:
    """Our data take every tier, and nothing that no tier covers."""
    for experts, top_k in tiers:
        call = replace(probe, num_experts=experts, top_k=top_k)
        size = f"{experts} experts with top_k {top_k}"
        for why in flashinfer.violations(call):
            yield f"{probe.method}: the {who} accepts {size}, the bundled facts do not: {why}"
    widest, deepest = max(e for e, _ in tiers), max(k for _, k in tiers)
    beyond = [(e, k + 1) for e, k in tiers if k == deepest]
    if who == "kernel":
        beyond.append((widest + 1, 1))
    for experts, top_k in beyond:
        if not flashinfer.violations(replace(probe, num_experts=experts, top_k=top_k)):
            size = f"{experts} experts with top_k {top_k}"
            yield f"{probe.method}: the bundled facts accept {size}, the {who} does not"


def _group_differences(flashinfer: FlashInfer, n_group: int, topk_group: int) -> Iterator[str]:
    probe = _probe(flashinfer, "DeepSeekV3")
    for groups, kept in (
        (n_group, topk_group),
        (n_group + 1, topk_group),
        (n_group, topk_group + 1),
    ):
        ours = not flashinfer.violations(
            replace(probe, num_experts=16 * groups, n_group=groups, topk_group=kept)
        )
        theirs = (groups, kept) == (n_group, topk_group)
        if ours != theirs:
            yield (
                f"DeepSeekV3: {groups} groups of which {kept} are kept: "
                f"the kernel {'accepts' if theirs else 'rejects'} them, the bundled facts do not"
            )
