"""The architectures that a release of SGLang has code for, read from its modules of models."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from pytest_moe_routing.targets.architectures import modules

#: What a module's classes are registered by: `EntryClass = Model` or a list of classes.
_ENTRY = re.compile(r"^EntryClass\b[^=\n]*=\s*(\[[^\]]*\]|\w+)", re.MULTILINE)


def registered(
    root: str, package: str, source: Callable[[str], str]
) -> Mapping[str, tuple[str, str]]:
    """Return module and class of each architecture, which are of the same name."""
    return {
        name: (module, name)
        for module in modules(root, package)
        for entry in _ENTRY.findall(source(module))
        for name in re.findall(r"\w+", entry)
    }
