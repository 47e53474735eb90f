"""The child that reads what takes long to parse: the sources of models, of which it runs nothing.

It is run by `targets.server` with the arguments MODULE CLASS ROOT FLASHINFER VERSION: the class of
a target, and the sources that it is made with.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets.framework import FrameworkTarget
from pytest_moe_routing.targets.server import serve
from pytest_moe_routing.targets.source import Source


def main() -> None:
    module, name, root, flashinfer, version = sys.argv[1:]
    cls: type[FrameworkTarget] = getattr(import_module(module), name)
    target = cls(FlashInfer.of(flashinfer), Source(Path(root), version, None))

    def misnamed_weights(architecture: str) -> list[dict[str, Any]]:
        return [asdict(weight) for weight in target.classes.misnamed(architecture)]

    serve({"misnamed_weights": misnamed_weights})
