"""The child that reads what takes long to parse: the sources of models, of which it runs nothing.

It is run by `targets.server` with the arguments MODULE CLASS ROOT FLASHINFER VERSION: the class of
a target, and the sources that it is made with.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict
from functools import partial
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any

from pytest_moe_routing.data import packaged_directory, read_data
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.models import load_models
from pytest_moe_routing.targets.architectures import files_not_run, modules
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.source import Source


def _files_not_run(target: FrameworkTarget) -> list[str]:
    """Return what `FrameworkTarget.files_not_run` does."""
    data = read_data(__package__, target.package, "architectures.yaml")
    names = {model.architecture for model in load_models(packaged_directory()).values()}
    root, packages = str(target.source.root), [name[:-1] for name in target.model_packages]
    every = [module for package in packages for module in modules(root, package)]
    return files_not_run(target.classes, data, every, names, target.modules_run(names))


def main() -> None:
    # Syntax trees are kept, and nothing else refers to itself.
    gc.set_threshold(0)
    module, name, root, flashinfer, version = sys.argv[1:]
    cls: type[FrameworkTarget] = getattr(import_module(module), name)
    target = cls(FlashInfer.of(flashinfer), Source(Path(root), version, None))

    def misnamed_weights(architectures: list[str]) -> list[dict[str, Any]]:
        found = chain.from_iterable(map(target.classes.misnamed, architectures))
        return [*map(asdict, dict.fromkeys(found))]

    serve({"misnamed_weights": misnamed_weights, "files_not_run": partial(_files_not_run, target)})
