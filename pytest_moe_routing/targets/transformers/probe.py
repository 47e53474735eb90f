"""Runs MoE blocks of one release of transformers on a CPU, and compares them with models' routers.

It is run by `targets.server` with the argument ROOT, a directory or a wheel. A block is built from
a small config of its own class. Its gate is the identity, so that it sees the logits of a pattern,
and in the place of its experts is a module that notes the ids and weights that it is called with.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.logits import PATTERNS
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
from pytest_moe_routing.targets.server import serve

if TYPE_CHECKING:
    from pytest_moe_routing.oracle.routers import Router

#: Widths that routing does not depend on, other than any number of experts.
_WIDTH = 24
#: The identity makes NaN of a token with one infinite logit.
_PATTERNS = tuple(name for name in PATTERNS if name != NOT_FINITE)
#: Relative precision of the factor that is measured on a block's output.
_MEASURED = 1e-4


class _Experts(nn.Module):
    """In the place of a block's experts: notes ids and weights, and returns a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.value = 0.0
        self.called_with: list[tuple[Tensor, Tensor]] = []

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        ids = [x for x in given if not x.is_floating_point()]
        weights = [x for x in given if x.is_floating_point()]
        if len(ids) != 1 or len(weights) != 1 or ids[0].shape != weights[0].shape:
            raise Unsupported("the block does not call its experts with ids and weights")
        self.called_with.append((ids[0], weights[0]))
        return torch.full_like(hidden, self.value)


class _Block:
    """A model's MoE block, as a router."""

    def __init__(self, block: nn.Module, num_experts: int, recipe: Recipe) -> None:
        experts = getattr(block, "experts", None)
        if not isinstance(experts, nn.Module):
            raise Unsupported(f"{type(block).__name__} has no experts of its own")
        self.name = type(block).__qualname__
        self._block, self._experts = block, _Experts()
        block.experts = self._experts
        tensors = _tensors(block)
        square = [x for _, x in tensors if x.shape == (num_experts, num_experts)]
        if len(square) != 1:
            raise Unsupported(f"{self.name} has {len(square)} gates, not one")
        biases = [x for name, x in tensors if _is_bias(name) and x.numel() == num_experts]
        if len(biases) != int(recipe.bias):
            raise Unsupported(
                f"{self.name} has {len(biases)} correction biases, not {int(recipe.bias)}"
            )
        self._bias = biases[0] if biases else None
        for _, tensor in tensors:
            tensor.zero_()
        square[0].copy_(torch.eye(num_experts))

    def route(self, logits: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return weights and ids, with what the block multiplies the experts' output by."""
        if self._bias is not None and bias is not None:
            self._bias.copy_(bias.view_as(self._bias))
        nothing, one = (self._output(logits, value) for value in (0.0, 1.0))
        factors = (one - nothing).flatten()
        factor = factors[0]
        if not torch.allclose(factors, factor.expand_as(factors), rtol=_MEASURED):
            raise Unsupported(f"{self.name} does more than scale what its experts return")
        ids, weights = self._experts.called_with[-1]
        return weights.reshape(len(logits), -1) * factor, ids.reshape(len(logits), -1)

    def _output(self, logits: Tensor, value: float) -> Tensor:
        self._experts.value = value
        self._experts.called_with.clear()
        output = self._block(logits.unsqueeze(0))
        if len(self._experts.called_with) != 1:
            raise Unsupported(
                f"{self.name} calls its experts {len(self._experts.called_with)} times"
            )
        first = output[0] if isinstance(output, tuple) else output
        assert isinstance(first, Tensor)
        return first


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
        [found] = [x for name, x in _tensors(model) if _is_bias(name)]
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


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _is_bias(name: str) -> bool:
    return name.rpartition(".")[2] in ("e_score_correction_bias", "expert_bias", "moe_statics")


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
        """Route for a model by the block of its class, also as loaded in bfloat16.

        Args:
            config: The config class, as `folder.Class`.
            keys: Keys of a config, with their values; the class has some of them.

        Raises:
            Unsupported: No recipe computes the router.
        """
        router = RouterConfig(**model["router"])
        if router.not_expressible is not None:
            raise Unsupported(f"no recipe computes the router: {router.not_expressible}")
        key = json.dumps([config, keys, model["router"]], sort_keys=True)
        if key not in self._compared:
            self._compared[key] = list(_runs(config, keys, router))
            if (router.n_group or 1) > 1:
                self._grouped.setdefault(config, (keys, router))
        return [{**run, "subject": model["id"]} for run in self._compared[key]]

    def run_other(self) -> list[dict[str, Any]]:
        """Ask the grouped blocks of the models to route experts that their groups cannot share."""
        return [_undivided(config, *asked) for config, asked in self._grouped.items()]


def _runs(config: str, keys: Mapping[str, Any], router: RouterConfig) -> Iterator[dict[str, Any]]:
    recipe = recipe_of(router)
    name = "?"
    try:
        maker, made = _maker(config, keys, router)
        block = _Block(maker(), router.num_experts, recipe)
        name = f"{config.partition('.')[0]}.{block.name}"
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
        yield _run(name, [Deviation(NOT_JUDGED, "", str(reason), str(reason))])


def _compare(route: Router, recipe: Recipe, router: RouterConfig) -> list[Deviation]:
    return compare_router(route, recipe, router.num_experts, torch.float32, patterns=_PATTERNS)


def _run(
    function: str, deviations: list[Deviation], way: str = "eager", **other: str
) -> dict[str, Any]:
    return {
        "router": "block",
        "function": function,
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
        maker, _ = _maker(config, odd, replace(router, num_experts=experts))
        block = _Block(maker(), experts, recipe_of(router))
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


def _maker(
    config: str, keys: Mapping[str, Any], router: RouterConfig
) -> tuple[Callable[[], nn.Module], Any]:
    """Return what makes the one MoE block of a model's module, with small widths, and its config.

    Raises:
        Unsupported: The release has no such class, or its block cannot be built here.
    """
    folder, _, name = config.rpartition(".")
    try:
        configuration = import_module(f"transformers.models.{folder}.configuration_{folder}")
        modeling = import_module(f"transformers.models.{folder}.modeling_{folder}")
        made = getattr(configuration, name)()
    except (ImportError, AttributeError) as missing:
        raise Unsupported(f"this release has no {config}: {missing}") from missing
    for key, value in {**keys, **_widths(router.num_experts)}.items():
        if hasattr(made, key):
            try:
                setattr(made, key, value)
            except Exception as error:
                raise Unsupported(f"{name} takes no {key} of {value!r}: {error}") from error
    classes = list(_classes(modeling))
    if len(classes) != 1:
        found = ", ".join(cls.__name__ for cls in classes) or "none"
        raise Unsupported(f"{modeling.__name__} has not one class with experts: {found}")
    given = {"config": made, "layer_idx": 1, "layer_id": 1}
    names = inspect.signature(classes[0].__init__).parameters

    def maker() -> nn.Module:
        try:
            block = classes[0](**{name: given[name] for name in names if name in given})
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise Unsupported(f"{classes[0].__name__} cannot be built here: {told}") from error
        return block.eval()

    return maker, made


def _widths(num_experts: int) -> dict[str, Any]:
    inner = (
        *("intermediate_size", "moe_intermediate_size", "expert_ffn_hidden_size"),
        "shared_expert_intermediate_size",
    )
    return {"hidden_size": num_experts, "d_model": num_experts, **dict.fromkeys(inner, _WIDTH)}


def _classes(module: ModuleType) -> Iterator[Callable[..., nn.Module]]:
    """Yield the classes of a module whose constructor makes experts."""
    for value in vars(module).values():
        is_module = inspect.isclass(value) and issubclass(value, nn.Module)
        if not is_module or value.__module__ != module.__name__ or "__init__" not in vars(value):
            continue
        if "self.experts =" in inspect.getsource(value.__init__):
            yield value


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
    serve({"run": blocks.run, "run_other": blocks.run_other})
