"""What one pytest run is about: models, schemes, a target, a FlashInfer release.

Built from the options on first use, and checked in one place: every mistake is a `MoERoutingError`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import MoERoutingError, Unsupported

if TYPE_CHECKING:
    from pytest_moe_routing.flashinfer import FlashInfer
    from pytest_moe_routing.kernels.process import RouterProcess
    from pytest_moe_routing.ledger import KnownFailure
    from pytest_moe_routing.models import IncompleteModel, ModelSpec
    from pytest_moe_routing.oracle.target import Target
    from pytest_moe_routing.targets.kept import Store
    from pytest_moe_routing.targets.registry import Located, TargetId


#: The embedded default target; goldens are its decisions.
BUILTIN = "builtin"
#: What ids of the suite's tests begin with, wherever the package is installed.
SUITE_IDS = "pytest_moe_routing/suite/"


@dataclass
class MoESession:
    """The options of a run, and what they mean.

    Attributes:
        golden_dirs: Further golden directories, over the packaged one.
        configs: Hugging Face configs of models for this run, which have no goldens.
        ledgers: Files of known failures.
    """

    target_name: str
    model_patterns: list[str]
    scheme_names: list[str]
    flashinfer_release: str | None
    golden_dirs: list[Path]
    configs: list[Path] = field(default_factory=list)
    ledgers: list[Path] = field(default_factory=list)
    #: What `--moe-kernels` says.
    kernels: str = ""
    #: Says where a target's answers are kept between runs; None to keep none, and to read none.
    store: Callable[[], Store | None] = lambda: None
    #: Answers of earlier runs, once the target is made.
    kept: int = 0
    #: Computes what a test needs, or has it from another process, which knows it by a key.
    computed: Callable[[Hashable, Callable[[], Any]], Any] = lambda _, compute: compute()

    def check(self, *, ask: bool = False, serial: bool = False) -> None:
        """Raise `MoERoutingError` if any option cannot be met. Imports no torch here.

        Args:
            ask: Make the target as well, and ask it one question: a target that cannot be asked
                at all is one message.
            serial: This process will run the tests.
        """
        if find_spec("torch") is None:
            raise MoERoutingError(
                "--moe-golden computes routings with torch, which is not installed: "
                "pip install 'pytest-moe-routing[torch]'"
            )
        _ = self.located
        _ = self.flashinfer
        asks = ask and not self.is_builtin
        if asks and serial:
            self._start()
        if self.models and self.scheme_names and not self.cases:
            chosen = ", ".join(self.scheme_names)
            raise MoERoutingError(f"no fused kernel supports a chosen model in {chosen}")
        if asks:
            with suppress(Unsupported):
                self.target.method_numbers()

    def _start(self) -> None:
        """Start the target's children, if it has any, while the models are read."""
        from pytest_moe_routing.targets.framework import FrameworkTarget

        if isinstance(self.target, FrameworkTarget):
            self.target.start()

    @cached_property
    def target_id(self) -> TargetId:
        """The target's id, taken apart."""
        from pytest_moe_routing.targets.registry import TargetId

        return TargetId.parse(self.target_name)

    @cached_property
    def located(self) -> Located:
        """The target, found and not made yet; its sources are opened once."""
        from pytest_moe_routing.targets.registry import locate

        return locate(self.target_id)

    @cached_property
    def _described(self) -> tuple[dict[str, ModelSpec], dict[str, IncompleteModel]]:
        """The models of the golden directories: those that can be judged, and the others."""
        from pytest_moe_routing.models import load_all

        return load_all(goldens.packaged_directory(), *self.golden_dirs)

    @cached_property
    def models(self) -> list[ModelSpec]:
        """The chosen models, by id; a config's model is there besides one of the same id."""
        from dataclasses import replace

        from pytest_moe_routing.models import config_file, read_config, select

        models = dict(self._described[0])
        ids: dict[Path, str] = {}
        places = set[str]()
        for path in self.configs:
            place = os.path.realpath(config_file(path))
            if place in places:
                raise MoERoutingError(f"--moe-config {path}: the file was given twice")
            model = read_config(path)
            while model.id in models:
                model = replace(model, folder=Path(f"{model.id}.config"))
            models[model.id] = model
            ids[path] = model.id
            places.add(place)
        chosen = select(models, self.model_patterns)
        for path, model_id in ids.items():
            if model_id not in {model.id for model in chosen}:
                raise MoERoutingError(
                    f"--moe-config {path}: its model has the id {model_id}, which does not match "
                    f"--moe-models {','.join(self.model_patterns)}"
                )
        return chosen

    @property
    def golden_models(self) -> list[ModelSpec]:
        """The chosen models that have a folder of goldens."""
        return [model for model in self.models if model.folder.is_absolute()]

    @cached_property
    def schemes(self) -> list[str]:
        """The chosen schemes: those that are named, each once; every one for none and for `all`."""
        from pytest_moe_routing.schemes import SERVED_SCHEMES, check_scheme

        named = [check_scheme(name) for name in self.scheme_names if name != "all"]
        return list(SERVED_SCHEMES) if "all" in self.scheme_names or not named else named

    @cached_property
    def cases(self) -> list[tuple[ModelSpec, str]]:
        """Every chosen model in every chosen scheme: anyone may quantize a checkpoint.

        A model whose layers differ is there once more for each group of layers.
        """
        return [
            (model, s) for each in self.models for model in variants_of(each) for s in self.schemes
        ]

    def models_in(self, scheme: str) -> list[ModelSpec]:
        """Return the models of the cases in a scheme."""
        return [model for model, name in self.cases if name == scheme]

    @cached_property
    def published_cases(self) -> list[tuple[ModelSpec, str]]:
        """The cases of which there is a published checkpoint."""
        return [
            (model, scheme)
            for model, scheme in self.cases
            if scheme in model.checkpoints and not model.variant
        ]

    def select(
        self,
        *,
        with_schemes: bool = False,
        with_patterns: bool = False,
        goldens: bool = False,
        patterns: Iterable[Sequence[str]] = (),
        distinct: bool = False,
        distinct_layers: bool = False,
        published: bool = False,
    ) -> list[tuple[ModelSpec, str]]:
        """Return a test's cases: models, each with a scheme, a logits pattern or an empty text.

        Args:
            with_schemes: Every chosen scheme of a model.
            with_patterns: Every logits pattern that suits a model's router, as `ties-at-k-33`.
            goldens: Only models that have goldens, in schemes of published checkpoints.
            patterns: Shell patterns of ids; a model must match one of each group.
            distinct: One model of each router, and with schemes of each kind of experts.
            distinct_layers: One model of each size and activation of experts, in each scheme.
            published: Only schemes of published checkpoints.
        """
        if with_schemes:
            cases = self.published_cases if goldens or published else self.cases
        else:
            cases = [(model, "") for model in self.models]
        if goldens:
            cases = [case for case in cases if case[0] in self.golden_models]
        for group in patterns:
            cases = [c for c in cases if any(fnmatchcase(c[0].id, p) for p in group)]
        if distinct:
            first: dict[object, tuple[ModelSpec, str]] = {}
            for model, scheme in cases:
                experts = (model.experts.activation, model.experts.gated) if scheme else None
                first.setdefault((model.router, experts, scheme), (model, scheme))
            cases = list(first.values())
        if distinct_layers:
            layers: dict[object, tuple[ModelSpec, str]] = {}
            for model, scheme in cases:
                x = model.experts
                sizes = (x.latent_size or x.hidden_size, x.intermediate_size)
                layers.setdefault((*sizes, x.activation, x.gated, scheme), (model, scheme))
            cases = list(layers.values())
        if with_patterns:
            from pytest_moe_routing.logits import case_names
            from pytest_moe_routing.routing import recipe_of

            return [
                (model, f"{name}-{tokens}")
                for model, _ in cases
                if not model.router.not_expressible
                for name, tokens in case_names(recipe_of(model.router))
            ]
        return cases

    @cached_property
    def flashinfer(self) -> FlashInfer:
        """The release to judge against; `_flashinfer_origin` says which that is."""
        from pytest_moe_routing.flashinfer import FlashInfer

        return FlashInfer.of(self._flashinfer_origin[0])

    @cached_property
    def _flashinfer_origin(self) -> tuple[str | None, str]:
        """The release and why it is the one: sources at a path do not run what is installed."""
        from pytest_moe_routing.flashinfer import installed_release

        if self.flashinfer_release:
            return self.flashinfer_release, "as requested"
        if installed_release() and self.target_id.path is None:
            return installed_release(), "installed"
        pin = self.located.pinned_flashinfer
        if pin:
            return pin, "pinned by the target"
        return None, "newest known, none installed"

    @cached_property
    def asks_what_is_known(self) -> bool:
        """Whether the run asks what is recorded of releases.

        That is about packaged models, with the FlashInfer release that the target pins.
        """
        packaged = goldens.packaged_directory()
        asked, pinned = self._flashinfer_origin[0], self.located.pinned_flashinfer
        return asked == pinned and all(m.folder.parent == packaged for m in self.models)

    @cached_property
    def target(self) -> Target:
        """The target, made now."""
        from pytest_moe_routing.targets.framework import FrameworkTarget

        target = self.located.make(self.flashinfer)
        if isinstance(target, FrameworkTarget) and (store := self.store()) is not None:
            self.kept = target.keep_answers(store)
        return target

    @cached_property
    def router_kernels(self) -> RouterProcess | str:
        """The compiled routers that `--moe-kernels` names, loaded now; or why there are none."""
        from pytest_moe_routing.kernels import process

        return process.find(self.kernels)

    @property
    def routers(self) -> tuple[str, ...]:
        """Names of the target's own routers, without making the target."""
        return self.located.cls.routers

    @cached_property
    def known_failures(self) -> list[KnownFailure]:
        """The entries of the ledgers that are about this target and these releases."""
        from pytest_moe_routing.ledger import in_force, load_ledger

        entries = [entry for file in self.ledgers for entry in load_ledger(file)]
        return in_force(
            entries,
            target=self.target_id.name,
            release=lambda: self.target.version(),
            flashinfer=self.flashinfer.release,
        )

    @property
    def is_builtin(self) -> bool:
        return self.target_name == BUILTIN

    def check_update(self, *, has_syrupy: bool, forked: bool) -> None:
        """Raise `MoERoutingError` where goldens must not be rewritten."""
        if not has_syrupy:
            raise MoERoutingError(
                "--snapshot-update needs syrupy: pip install 'pytest-moe-routing[update]'"
            )
        if not self.is_builtin:
            raise MoERoutingError(
                "--snapshot-update: only the builtin target has goldens; run without "
                f"--moe-target {self.target_id}"
            )
        if forked:
            raise MoERoutingError(
                "--snapshot-update: --forked loses the written goldens; run without it"
            )
        for model in self.golden_models:
            if not goldens.is_checkout(model.folder.parent):
                raise MoERoutingError(
                    f"--snapshot-update: {model.folder} belongs to an installed package; run in a "
                    "checkout, or choose models of a --moe-golden-dir with --moe-models"
                )

    def _left_out(self) -> str:
        """How many models are known in part only, and so are not judged."""
        count = len(self._described[1])
        return f" ({count} more incomplete, not judged)" if count else ""

    def describe(self) -> str:
        """Return the header line of a run."""
        origin = self._flashinfer_origin[1]
        have = "has" if len(self.models) == 1 else "have"
        folders = dict.fromkeys(str(model.folder.parent) for model in self.golden_models)
        return (
            f"moe-routing: target {self.target_id}, {self.flashinfer} ({origin}), "
            f"{len(self.models)} model{'s' * (len(self.models) != 1)}{self._left_out()}"
            + (f", goldens in {', '.join(folders)}" if folders else f", which {have} no goldens")
            + (f", {self.kept} answers reused from earlier runs" if self.kept else "")
        )


def variants_of(model: ModelSpec) -> list[ModelSpec]:
    """Return a model, and its variants in layers that are routed otherwise."""
    return [model, *(v for layers, v in model.variants().items() if layers)]
