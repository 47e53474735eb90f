"""The parent's side of the child that reads the code of a framework's models; see `reading`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pytest_moe_routing.oracle.misnamed import MisnamedWeight
from pytest_moe_routing.targets.answers import MisnamedAnswer
from pytest_moe_routing.targets.probe import Probe, Questions

if TYPE_CHECKING:
    from pytest_moe_routing.models import ModelSpec

_CHILD = "pytest_moe_routing.targets.reading"
_ANSWERS = {"misnamed_weights": list[MisnamedAnswer], "files_not_run": list[str]}


class CodeReader:
    """Asks what the code of models has in it.

    Args:
        target: Name of the target, for messages.
        arguments: The child's command line.
    """

    def __init__(self, target: str, *arguments: str) -> None:
        self.probe = Probe(target, _CHILD, *arguments, answers=_ANSWERS)

    def questions(self, method: str, models: Sequence[ModelSpec]) -> list[Questions]:
        """Return what a method of this class asks about models; nothing for any other name."""
        asked = {"misnamed_weights": map(_of, models), "files_not_run": [{}]}
        return [Questions(self.probe, method, asked[method])] if method in asked else []

    def misnamed_weights(self, model: ModelSpec) -> list[MisnamedWeight]:
        """Return the weights that a model's code loads into another matrix's place."""
        rows = self.probe.ask("misnamed_weights", **_of(model))
        return [MisnamedWeight(**row) for row in rows]

    def files_not_run(self) -> list[str]:
        """Return the files of models with experts that no packaged model runs."""
        files: list[str] = self.probe.ask("files_not_run")
        return files


def _of(model: ModelSpec) -> dict[str, Any]:
    # A model of images and text makes that of its text by the name that its config has for it.
    return {"architectures": [*dict.fromkeys((model.architecture, *model.architectures))]}
