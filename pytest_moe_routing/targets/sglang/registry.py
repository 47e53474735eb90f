"""The architectures that a release of SGLang has code for, read from its modules of models."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping

#: What a module's classes are registered by: `EntryClass = Model` or a list of classes.
_ENTRY = re.compile(r"^EntryClass\b[^=\n]*=\s*(\[[^\]]*\]|\w+)", re.MULTILINE)


def modules(root: str, package: str) -> Iterator[str]:
    """Yield every module below a package of a tree or a wheel."""
    for module in pkgutil.iter_modules(["/".join([root, *package.split(".")])]):
        name = f"{package}.{module.name}"
        yield name
        if module.ispkg:
            yield from modules(root, name)


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
