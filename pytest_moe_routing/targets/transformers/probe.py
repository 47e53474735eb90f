"""Runs MoE blocks of one release of transformers on a CPU, and compares them with models' routers.

It is run by `targets.server` with the argument ROOT, a directory or a wheel. A block is built from
a small config of its own class. Its gate is the identity, so that it sees the logits of a pattern,
and in the place of its experts is a module that notes the ids and weights that it is called with.
Under autocast, a block is compared with itself: that needs no recipe.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.logits import PATTERNS, distinct
from pytest_moe_routing.models import RouterConfig
from pytest_moe_routing.oracle.routers import (
    HARMLESS,
    NOT_FINITE,
    NOT_JUDGED,
    PRECISION,
    Deviation,
    compare_router,
)
from pytest_moe_routing.routing import Recipe, recipe_of
from pytest_moe_routing.targets.hf_blocks import block_maker
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.transformers.block import Block, is_bias, tensors_of

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.routers import Router

#: Widths that routing does not depend on, other than any number of experts.
_WIDTH = 24
#: The identity makes NaN of a token with one infinite logit.
_PATTERNS = tuple(name for name in PATTERNS if name != NOT_FINITE)
#: The way in which a block is run while torch.autocast is on, as in mixed-precision training.
_AUTOCAST = "under torch.autocast"
_TOKENS = 24


def _loads_rounded(maker: Callable[[], nn.Module], config: Any) -> bool:
    """Whether the block's bias is rounded when its model is loaded in bfloat16.

    A model of nothing but the block, without its experts, is saved and loaded by the release.

    Raises:
        Unsupported: It cannot be.
    """
    module = sys.modules[type(maker()).__module__]
    bases = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and value.__name__.endswith("PreTrainedModel")
        if value.__module__ == module.__name__
    ]
    if not bases:
        raise Unsupported(f"{module.__name__} has no class of models")

    class Model(bases[0]):  # type: ignore[misc, valid-type]
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.mlp = maker()
            self.mlp.experts = nn.Identity()
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            """Leave all as it is: it is made of random numbers first, and loaded then."""

    def tensor(model: nn.Module) -> Tensor:
        [found] = [x for name, x in tensors_of(model) if is_bias(name)]
        return found

    try:
        with tempfile.TemporaryDirectory() as folder:
            model = Model(config).float()
            tensor(model).copy_(torch.linspace(1, 2, tensor(model).numel()).view_as(tensor(model)))
            model.save_pretrained(folder)
            loaded = Model.from_pretrained(folder, dtype=torch.bfloat16)
            return not torch.equal(tensor(loaded).float(), tensor(model))
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        raise Unsupported(f"the block cannot be saved and loaded here: {told}") from error


class Blocks:
    """Answers about the MoE blocks of one release's models."""

    def __init__(self) -> None:
        #: Models that share a block and a router share its runs.
        self._compared: dict[str, list[dict[str, Any]]] = {}
        #: Grouped routers, by config class: the keys of the first model that has one.
        self._grouped: dict[str, tuple[Mapping[str, Any], RouterConfig]] = {}

    def run(
        self, model: Mapping[str, Any], config: str, keys: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        """Route for a model by the block of its class, as loaded in bfloat16, and under autocast.

        Args:
            config: The config class, as `folder.Class`.
            keys: Keys of a config, with their values; the class has some of them.
        """
        router, shared_experts = RouterConfig(**model["router"]), model["experts"]["shared_experts"]
        key = json.dumps([config, keys, model["router"], shared_experts], sort_keys=True)
        if key not in self._compared:
            self._compared[key] = list(_runs(config, keys, router, shared_experts))
            if (router.n_group or 1) > 1 and router.not_expressible is None:
                self._grouped.setdefault(config, (keys, router))
        return [{**run, "subject": model["id"]} for run in self._compared[key]]

    def run_other(self) -> list[dict[str, Any]]:
        """Ask the grouped blocks of the models to route experts that their groups cannot share."""
        return [_undivided(config, *asked) for config, asked in self._grouped.items()]


def _runs(
    config: str, keys: Mapping[str, Any], router: RouterConfig, shared_experts: int
) -> Iterator[dict[str, Any]]:
    name = "?"
    try:
        maker, made = block_maker(config, keys, router)
        block = Block(maker(), router, shared_experts)
        name = f"{config.partition('.')[0]}.{block.name}"
        yield _run(name, _rounded_by_autocast(block, router.num_experts), _AUTOCAST, reach="opt-in")
        if router.not_expressible is not None:
            yield _not_judged(name, f"no recipe computes the router: {router.not_expressible}")
            return
        recipe = recipe_of(router)
        deviations = _compare(block.route, recipe, router)
        yield _run(name, deviations)
        if not recipe.bias or {d.kind for d in deviations} - HARMLESS.keys():
            return
        if not _loads_rounded(maker, made):
            return

        def rounded(logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            assert bias is not None
            return block.route(logits, bias.bfloat16().to(bias.dtype))

        cause = "the router's correction bias is rounded to bfloat16"
        worse = [d for d in _compare(rounded, recipe, router) if d.kind not in HARMLESS]
        found = [replace(d, kind=PRECISION, cause=cause) for d in worse[:1]]
        yield _run(name, found, "loaded in bfloat16")
    except Unsupported as reason:
        yield _not_judged(name, str(reason))


def _not_judged(name: str, reason: str) -> dict[str, Any]:
    return _run(name, [Deviation(NOT_JUDGED, "", reason, reason)])


def _compare(route: Router, recipe: Recipe, router: RouterConfig) -> list[Deviation]:
    return compare_router(route, recipe, router.num_experts, torch.float32, patterns=_PATTERNS)


def _rounded_by_autocast(block: Block, num_experts: int) -> list[Deviation]:
    """Compare the experts that a block selects under autocast with those that it selects without.

    The logits are distinct numbers that bfloat16 holds, so that only what follows them can round.
    """
    # The largest bfloat16 numbers below 2, which are those of consecutive bits.
    largest = 0x3FFF - torch.arange(num_experts, dtype=torch.int16)
    logits = largest.view(torch.bfloat16).float()[distinct(_TOKENS, num_experts, seed=0)]
    without = block.chosen(logits)
    with torch.autocast("cpu", torch.bfloat16):
        under = block.chosen(logits)
    others = (without != under).any(dim=1)
    if not others.any():
        return []
    token = int(others.nonzero()[0])
    text = (
        f"{int(others.sum())}/{_TOKENS} tokens get other experts than without autocast\n"
        f"  token {token}: experts {under[token].tolist()} instead of {without[token].tolist()}"
    )
    cause = "distinct scores become equal when autocast rounds them to bfloat16"
    return [Deviation(PRECISION, "distinct bfloat16 numbers", text, cause)]


def _run(
    function: str, deviations: list[Deviation], way: str = "eager", **other: str
) -> dict[str, Any]:
    return {
        "router": "block",
        "function": function,
        "source": "",
        "way": way,
        "reach": "model",
        "called": [],
        "deviations": [asdict(deviation) for deviation in deviations],
        **other,
    }


def _undivided(config: str, keys: Mapping[str, Any], router: RouterConfig) -> dict[str, Any]:
    """Route as many tokens as hide that the groups do not divide the experts.

    A reshape of all scores into groups then succeeds, and mixes those of several tokens.
    """
    assert router.n_group is not None
    experts = router.num_experts - router.n_group // 2
    # Some positive number of tokens has as many scores as whole rows of groups have.
    tokens = router.n_group * (experts // router.n_group)
    subject = f"{experts} experts in {router.n_group} groups"
    name, deviations = "?", []
    try:
        odd = {
            key: experts if value == router.num_experts else value for key, value in keys.items()
        }
        odd_router = replace(router, num_experts=experts)
        maker, _ = block_maker(config, odd, odd_router)
        block = Block(maker(), odd_router)
        name = f"{config.partition('.')[0]}.{block.name}"
        logits = torch.linspace(-2, 2, tokens * experts).reshape(tokens, experts)
        block.route(logits, torch.zeros(experts))
    except Unsupported as reason:
        # A config class that takes no such numbers is right.
        deviations = [Deviation(NOT_JUDGED, "", str(reason), str(reason))]
    except Exception:
        # Right: the router rejects the groups. What fails for another reason fails in `_runs` too,
        # with groups that divide the experts.
        deviations = []
    else:
        cause = "the scores of several tokens are mixed"
        deviations = [Deviation("experts", "", f"{subject} are routed", cause)]
    way = "groups that do not divide the experts"
    return _run(name, deviations, way, subject=subject, reach="no known model")


def _install(root: Path) -> None:
    """Import transformers from a directory or a wheel from now on.

    It lists its own folders, so a wheel is unpacked into the child's folder. The check of its
    dependencies' versions is left out: no router calls them. Neither does one call httpx.
    """
    if not root.is_dir():
        folder = tempfile.mkdtemp(prefix="transformers-")
        with zipfile.ZipFile(root) as wheel:
            for name in wheel.namelist():
                if name.startswith("transformers/"):
                    wheel.extract(name, folder)
        root = Path(folder)
    sys.path.insert(0, str(root))
    check = ModuleType("transformers.dependency_versions_check")
    check.dep_version_check = lambda *_: None  # type: ignore[attr-defined]
    sys.modules[check.__name__] = check
    if find_spec("httpx") is None:
        sys.modules["httpx"] = MagicMock()


def main() -> None:
    _install(Path(sys.argv[1]))
    torch.set_grad_enabled(False)
    blocks = Blocks()
    serve({"run": blocks.run, "run_other": blocks.run_other}, "transformers")
