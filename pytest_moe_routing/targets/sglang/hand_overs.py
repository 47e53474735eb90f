"""Where a release's quantization methods hand their weights to kernels of FlashInfer.

Read from the sources of a release, never run: a method that nobody has listed is found as well.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pytest_moe_routing.data import packaged_directory, read_data
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.models import ModelSpec, load_models
from pytest_moe_routing.oracle.methods_run import MethodsRun
from pytest_moe_routing.targets.sglang.answers import Callers
from pytest_moe_routing.targets.sglang.model_configs import configs
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.uses import texts, tree_of


class Asked(Protocol):
    """The target, as far as it is asked here; see `SglangQuestions`."""

    source: Source

    def formats(self, scheme: str) -> Mapping[str, Asked]: ...

    def asked_of_hand_overs(self, model: ModelSpec, scheme: str) -> dict[str, Any]: ...

    def ask(self, kind: str, question: Mapping[str, Any]) -> Any: ...


_UNKNOWN = "no checkpoint, runner and GPU that is asked about reaches it"
#: With so many models, of the fewest experts, each kind of checkpoints is run.
_MODELS = 12
#: What is read.
_MODULES = ("sglang.srt",)
#: The base of what a method gives a runner, and what its name is made of.
_PAYLOAD = "MoeQuantInfo"
#: Names of FlashInfer's that compute experts, rather than prepare their weights.
_COMPUTES = re.compile(
    r"(?=.*moe)(?=.*(trtllm|cutlass|cute_?dsl|b12x|mega|wrapper))", re.IGNORECASE
)
#: Attributes by which a method decides whether TopK applies the scaling factor.
_OF_FACTOR = "fuse_routed_scaling_factor"


@dataclass(frozen=True, order=True)
class HandOver:
    """What a class gives a kernel of FlashInfer, or by what it decides about the scaling factor.

    Attributes:
        file: Below the root of the sources.
        owner: The class.
        given: The class of what a runner is given; a function that is called; or the attribute.
    """

    file: str
    owner: str
    given: str


def hand_overs(root: Path) -> Mapping[HandOver, int]:
    """Return every hand-over of a release, with its line.

    Raises:
        Unsupported: A file cannot be parsed.
    """
    files = dict(texts(root, _MODULES))
    trees = {file: tree_of(file, text) for file, text in files.items() if _computes(text)}
    callers = _callers(trees)
    found: dict[HandOver, int] = {}
    for file, text in sorted(files.items()):
        if file not in trees and not any(name in text for name in (*callers, _OF_FACTOR)):
            continue
        tree = trees.get(file) or tree_of(file, text)
        known = callers | _imported(tree) if file in trees else callers
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                for given, line in _given(node, known):
                    found.setdefault(HandOver(file, node.name, given), line)
    return found


def _computes(text: str) -> bool:
    """Return whether a file may import a function of FlashInfer's that computes experts."""
    return "from flashinfer" in text and "moe" in text.lower()


def _callers(trees: Mapping[str, ast.Module]) -> frozenset[str]:
    """Return payloads of FlashInfer's runners, and functions that call its kernels."""
    names = set[str]()
    for tree in trees.values():
        kernels = _imported(tree)
        if not kernels:
            continue
        for node in tree.body:
            is_payload = isinstance(node, ast.ClassDef) and _is_payload(node)
            calls = isinstance(node, ast.FunctionDef) and not kernels.isdisjoint(_names(node))
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and (is_payload or calls):
                names.add(node.name)
    return frozenset(names)


def _is_payload(node: ast.ClassDef) -> bool:
    return any(ast.unparse(base).endswith(_PAYLOAD) for base in node.bases)


def _imported(tree: ast.Module) -> frozenset[str]:
    """Return the names under which a module has FlashInfer's functions that compute experts."""
    return frozenset(
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("flashinfer")
        for alias in node.names
        if _COMPUTES.search(alias.name)
    )


def _given(owner: ast.ClassDef, known: Collection[str]) -> Iterator[tuple[str, int]]:
    """Yield what a class gives kernels, or decides by, and the lines."""
    for node in ast.walk(owner):
        if isinstance(node, (ast.Name, ast.Attribute)):
            name, is_set = _name(node), isinstance(node.ctx, ast.Store)
            # A function may be chosen first and called then.
            if (name in known and not is_set) or (_OF_FACTOR in name and is_set):
                yield name, node.lineno


def _names(node: ast.AST) -> Iterator[str]:
    return (each.id for each in ast.walk(node) if isinstance(each, ast.Name))


def _name(node: ast.Name | ast.Attribute) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr


def is_by(hand_over: HandOver, callers: Callers) -> bool:
    """Return whether a kernel was called for a hand-over, or by a class that decides."""
    is_owner = [hand_over.file, hand_over.owner] in callers["owners"]
    decides = _OF_FACTOR in hand_over.given
    return is_owner and (decides or hand_over.given in callers["given"])


def reached(
    target: Asked, every: Collection[HandOver], models: Iterable[ModelSpec]
) -> set[HandOver]:
    """Return the hand-overs that kernels are called for when the target is judged.

    That is on each way of each checkpoint that it serves, with the first models that reach one.
    """
    found = set[HandOver]()
    by_size = sorted(models, key=lambda model: (model.router.num_experts, model.id))
    for scheme in configs()["schemes"]:
        # Code is made for published checkpoints.
        has, has_not = (
            [model for model in by_size if (scheme in model.checkpoints) is is_published]
            for is_published in (True, False)
        )
        for served in (target, *target.formats(scheme).values()):
            for callers in _callers_of(served, scheme, (*has, *has_not)):
                found.update(each for each in every if is_by(each, callers))
    return found


def _callers_of(target: Asked, scheme: str, models: Iterable[ModelSpec]) -> Iterator[Callers]:
    """Yield what called kernels, for checkpoints of each kind that SGLang has in a scheme."""
    tried, left = Counter[str](), dict[str, list[Any]]()
    for model in models:
        try:
            asked = target.asked_of_hand_overs(model, scheme)
            kind = json.dumps(asked["quantization"], sort_keys=True)
            ways = left.setdefault(kind, [*asked["runners"], *asked["told"]["ways"]])
            if tried[kind] == _MODELS or not ways:
                continue
            named = [way for way in ways if isinstance(way, str)]
            told = {**asked["told"], "ways": ways[len(named) :]}
            called = target.ask("hand_overs", {**asked, "runners": named, "told": told})
        except Unsupported:  # The tests that judge the model count why.
            continue
        tried[kind] += 1
        left[kind] = [way for way, callers in zip(ways, called, strict=True) if not callers]
        for callers in called:
            yield from callers


def methods_run(target: Asked) -> MethodsRun:
    """Return which hand-overs of a release are judged, and why others are not.

    Raises:
        Unsupported: The sources cannot be read.
    """
    every = hand_overs(target.source.root)
    found = reached(target, every, load_models(packaged_directory()).values())
    unanswered = Counter(
        f"{each.file}:{line} {each.owner}, {each.given}: {_reason(each)}"
        for each, line in sorted(every.items())
        if each not in found
    )
    return MethodsRun(len(found), unanswered)


def _reason(hand_over: HandOver) -> str:
    """Return why a hand-over is not judged."""
    text = " ".join((hand_over.file, hand_over.owner, hand_over.given)).lower()
    known: Mapping[str, str] = read_data(__package__, "hand_overs.yaml")["reasons"]
    return next((reason for word, reason in known.items() if word in text), _UNKNOWN)
