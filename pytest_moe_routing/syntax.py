"""Syntax trees of Python sources, of which nothing is run."""

from __future__ import annotations

import ast
import gc
from threading import Lock

#: Threads that parse would otherwise leave the collector as another one had it meanwhile.
_lock = Lock()


def parse(source: str) -> ast.Module:
    """Parse a module.

    Python's collector looks for objects to free by the number of new ones. A syntax tree is nothing
    but new objects, of which none is to be freed, and looking takes longer than parsing.

    Raises:
        SyntaxError, ValueError, RecursionError, MemoryError: It is not Python.
    """
    with _lock:
        is_on = gc.isenabled()
        gc.disable()
        try:
            return ast.parse(source)
        finally:
            if is_on:
                gc.enable()
