"""Where a release's code makes the quantization config of experts, or calls FlashInfer's.

Read from the sources of a release, never run: a method that nobody has listed is found as well.
Which of these places tests run is told by the children that run them, see `probe.hand_overs`.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

from pytest_moe_routing.data import packaged_directory, read_data
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.accepted_keys import KnownKeys, Pair
from pytest_moe_routing.oracle.layouts import wrong_layouts
from pytest_moe_routing.oracle.methods_run import MethodsRun
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.uses import calls, texts, tree_of
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES

_LAYERS = "vllm.model_executor.layers"
#: What is read.
_MODULES = (f"{_LAYERS}.fused_moe", f"{_LAYERS}.quantization")
#: Functions that make a quantization config; a method's own is found by what it calls.
MAKES = re.compile(r"(?!get_fused_moe).*_moe_quant_config")
#: What these call, and others directly.
_CONFIGS = "FusedMoEQuantConfig", "FusedMoEQuantConfig.make"
#: Where they are.
_OF_CONFIGS = "fused_moe/config.py"
#: Names of FlashInfer's that compute experts, rather than prepare their weights or say what is
#: there.
_COMPUTES = re.compile(
    r"(?!has_|is_|supports_)(?=.*(moe|grouped_gemm))"
    r"(?=.*(trtllm|cutlass|cute_?dsl|b12x|mega|wrapper)).*",
    re.IGNORECASE,
)
#: Whence code has these.
_FLASHINFER = ("flashinfer", "vllm.utils.flashinfer")
#: Rows of the contract: experts of other kernels than TRT-LLM's, which are asked in every scheme.
_OTHERS = "modular-flashinfer-cutlass", "modular-cutedsl"
_KEYS = "no test runs them with these keys of weights and activations"
_UNKNOWN = "no checkpoint that is asked about reaches it"


@dataclass(frozen=True, order=True)
class HandOver:
    """A call that makes a quantization config, or that hands experts to FlashInfer.

    Attributes:
        file: Below the root of the sources.
        line: That of the call.
        owner: The function around it, with its class.
        given: The function that is called.
    """

    file: str
    line: int
    owner: str
    given: str

    @property
    def place(self) -> str:
        """File and line, as children tell them."""
        return f"{self.file}:{self.line}"


class HandOverAnswer(TypedDict):
    """A `HandOver`, as a child tells it."""

    file: str
    line: int
    owner: str
    given: str


def hand_overs(root: str) -> list[HandOver]:
    """Return every hand-over of a release.

    Args:
        root: The directory or the wheel that has it.

    Raises:
        Unsupported: A file cannot be parsed.
    """
    found = list[HandOver]()
    for file, text in sorted(texts(Path(root), _MODULES)):
        if file.endswith(_OF_CONFIGS):
            continue
        if any(word in text for word in ("_moe_quant_config", *_CONFIGS, "flashinfer")):
            tree = tree_of(file, text)
            known = _imported(tree)
            found += (
                HandOver(file, call.lineno, owner, given)
                for owner, call in calls(tree)
                if (given := _given(call.func, known))
            )
    return found


def _imported(tree: ast.Module) -> frozenset[str]:
    """Return the names under which a module has FlashInfer's functions that compute experts."""
    return frozenset(
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(_FLASHINFER)
        for alias in node.names
        if _COMPUTES.fullmatch(alias.name)
    )


def _given(called: ast.expr, known: Collection[str]) -> str:
    """Return the name of a called function, if it is one of these; else nothing."""
    name = ast.unparse(called) if isinstance(called, (ast.Name, ast.Attribute)) else ""
    if name in _CONFIGS:
        return name
    package, _, last = name.rpartition(".")
    is_of_flashinfer = package.partition(".")[0] in _FLASHINFER and _COMPUTES.fullmatch(last)
    is_config = MAKES.fullmatch(last) and package.partition(".")[0] != "self"
    return last if is_config or is_of_flashinfer or name in known else ""


class HandOvers(FrameworkTarget):
    """What is asked about hand-overs of a release."""

    layer_package = _LAYERS

    def methods_run(self) -> MethodsRun:
        """Return which hand-overs and which pairs of keys tests run, and why others are not judged.

        Raises:
            Unsupported: The sources cannot be read, or no layer of the release is run.
        """
        models, run = list(load_models(packaged_directory()).values()), set[str]()
        for scheme in SCHEMES:
            run |= wrong_layouts(self, scheme, models).run
        if not run:
            raise Unsupported(f"{self}: the code that makes its layers is not run")
        every = [HandOver(**row) for row in self._aside.ask("hand_overs")]
        return judged(every, run, set(_accepted(self.known_keys())))


def judged(
    every: Iterable[HandOver], run: Collection[str], accepted: Collection[tuple[str, Pair]]
) -> MethodsRun:
    """Return which hand-overs and pairs of keys are run, and why others are not.

    Args:
        run: The places of hand-overs that are.
        accepted: Classes of experts, by their rows of the contract, with keys that they accept.
    """
    told = {f"{each.place} {each.owner}, {each.given}": each.place for each in every}
    left = {about: _reason(about, _UNKNOWN) for about, place in told.items() if place not in run}
    for experts, pair in sorted({*accepted} - {*_asked()}):
        about = f"{experts} with {' and '.join(pair)}"
        left[about] = _reason(about, _KEYS)
    unanswered = Counter(f"{about}: {reason}" for about, reason in left.items())
    return MethodsRun(len(told) + len(accepted) - len(left), unanswered)


def _accepted(known: KnownKeys | None) -> Iterator[tuple[str, Pair]]:
    """Yield each class of experts, by its row of the contract, with the keys that it accepts."""
    for experts, devices in known.pairs.items() if known else ():
        for pair in dict.fromkeys(pair for pairs in devices.values() for pair in pairs):
            yield experts, pair


def _asked() -> Iterator[tuple[str, Pair]]:
    """Yield the same of what tests run."""
    for row in SCHEMES.values():
        weights, activations = (key.rpartition(".")[2] if key else "none" for key in row.keys)
        for experts in filter(None, (row.experts, row.modular, *_OTHERS)):
            yield experts, (weights, activations)
    # Where Hopper's kernels take activations that are not quantized.
    yield _OTHERS[0], ("kMxfp4Static", "none")


def _reason(told: str, otherwise: str) -> str:
    known: Mapping[str, str] = read_data(__package__, "hand_overs.yaml")["reasons"]
    return next((reason for word, reason in known.items() if word in told.lower()), otherwise)
