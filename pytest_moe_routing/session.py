"""What one pytest run is about: models, schemes, a target, a FlashInfer release.

Built from the options on first use, and checked in one place: every mistake is a `MoERoutingError`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import MoERoutingError

if TYPE_CHECKING:
    from pytest_moe_routing.flashinfer import FlashInfer
    from pytest_moe_routing.ledger import KnownFailure
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target


#: The embedded default target; goldens are its decisions.
BUILTIN = "builtin"


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

    def check(self) -> None:
        """Raise `MoERoutingError` if any option cannot be met. Imports no torch and no target."""
        from pytest_moe_routing.targets.registry import check_target

        check_target(self.target_name)
        if self.models and self.scheme_names and not self.cases:
            chosen = ", ".join(self.scheme_names)
            raise MoERoutingError(f"no chosen model has a checkpoint for {chosen}")
        _ = self.flashinfer

    @cached_property
    def models(self) -> list[ModelSpec]:
        """The chosen models, by id; a config's model is there besides one of the same id."""
        from dataclasses import replace

        from pytest_moe_routing.models import load_models, read_config, select

        models = load_models(goldens.packaged_directory(), *self.golden_dirs)
        for path in self.configs:
            model = read_config(path)
            while model.id in models:
                model = replace(model, folder=Path(f"{model.id}.config"))
            models[model.id] = model
        return select(models, self.model_patterns)

    @property
    def golden_models(self) -> list[ModelSpec]:
        """The chosen models that have a folder of goldens."""
        return [model for model in self.models if model.folder.is_absolute()]

    @cached_property
    def schemes(self) -> list[str]:
        """The chosen schemes."""
        from pytest_moe_routing.schemes import SERVED_SCHEMES, check_scheme

        return [check_scheme(name) for name in self.scheme_names or SERVED_SCHEMES]

    @cached_property
    def cases(self) -> list[tuple[ModelSpec, str]]:
        """Every chosen model with every chosen scheme that serves a checkpoint of it."""
        return [
            (model, scheme)
            for model in self.models
            for scheme in self.schemes
            if scheme in model.checkpoints
        ]

    @cached_property
    def flashinfer(self) -> FlashInfer:
        """The release in force; `_flashinfer_origin` says which that is."""
        from pytest_moe_routing.flashinfer import FlashInfer

        return FlashInfer.of(self._flashinfer_origin[0])

    @cached_property
    def _flashinfer_origin(self) -> tuple[str | None, str]:
        """The release and why it is the one: sources at a path do not run what is installed."""
        from pytest_moe_routing.flashinfer import installed_release
        from pytest_moe_routing.targets.registry import pinned_flashinfer

        if self.flashinfer_release:
            return self.flashinfer_release, "as asked for"
        if installed_release() and "@" not in self.target_name:
            return installed_release(), "installed"
        pin = pinned_flashinfer(self.target_name)
        if pin:
            return pin, "what the target is made for"
        return None, "newest known, none installed"

    @cached_property
    def target(self) -> Target:
        """The target, imported now."""
        from pytest_moe_routing.targets import load_target

        return load_target(self.target_name, self.flashinfer)

    @cached_property
    def known_failures(self) -> list[KnownFailure]:
        """The entries of the ledgers that are about this target and these releases."""
        from pytest_moe_routing.ledger import in_force, load_ledger

        entries = [entry for file in self.ledgers for entry in load_ledger(file)]
        return in_force(
            entries,
            target=self.target_name,
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
                f"--snapshot-update: goldens are the builtin target's, not {self.target_name}'s"
            )
        if forked:
            raise MoERoutingError("--snapshot-update: --forked loses what is written; run without")
        for model in self.golden_models:
            if not goldens.is_checkout(model.folder.parent):
                raise MoERoutingError(
                    f"--snapshot-update: {model.folder} belongs to an installed package; run in a "
                    "checkout, or choose models of a --moe-golden-dir with --moe-models"
                )

    def _left_out(self) -> str:
        """How many models are known in part only, and so are not judged."""
        from pytest_moe_routing.models import load_incomplete

        count = len(load_incomplete(goldens.packaged_directory(), *self.golden_dirs))
        return f" ({count} more known in part, not judged)" if count else ""

    def describe(self) -> str:
        """The header line of a run."""
        origin = self._flashinfer_origin[1]
        folders = dict.fromkeys(str(model.folder.parent) for model in self.golden_models)
        return (
            f"moe-routing: target {self.target_name}, {self.flashinfer} ({origin}), "
            f"{len(self.models)} models{self._left_out()}, goldens in {', '.join(folders)}"
        )
