"""torch's loggers, which pytest adds handlers to and removes them from in each phase of a test."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial


def share_handler() -> Callable[[], None]:
    """Let the loggers below `torch` use its handler, and return what undoes it.

    torch gives each of 40 loggers the same handler and does not let them propagate. pytest adds two
    handlers to each logger that does not, three times a test: that took longer than most tests. Now
    records go through the logger `torch`, which has the same handler and pytest's. Loggers with
    other handlers, as `TORCH_LOGS_OUT` or a user makes them, stay as they are.
    """
    parent = logging.getLogger("torch")
    same = list(map(_kind, parent.handlers))
    undo = []
    for name, logger in logging.root.manager.loggerDict.items():
        if not isinstance(logger, logging.Logger) or logger.propagate:
            continue
        if name.startswith("torch.") and list(map(_kind, logger.handlers)) == same:
            undo.append(partial(_restore, logger, logger.handlers))
            logger.handlers, logger.propagate = [], True

    def restore() -> None:
        for each in undo:
            each()

    return restore


def _kind(handler: logging.Handler) -> tuple[object, ...]:
    """Return what two handlers that do the same have in common."""
    stream = getattr(handler, "stream", None)
    return type(handler), handler.level, handler.formatter, handler.filters, stream


def _restore(logger: logging.Logger, handlers: list[logging.Handler]) -> None:
    logger.handlers, logger.propagate = handlers, False
