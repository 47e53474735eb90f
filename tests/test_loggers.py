"""torch's loggers in a run of the suite: few that pytest adds handlers to, and no record lost."""

from __future__ import annotations

import io
import logging

import pytest
import torch  # noqa: F401  # its loggers are looked at

from pytest_moe_routing import options
from pytest_moe_routing.suite.loggers import share_handler


def apart():
    """Names of the loggers below torch's that do not propagate."""
    loggers = logging.root.manager.loggerDict.items()
    found = {n: x for n, x in loggers if isinstance(x, logging.Logger) and n.startswith("torch.")}
    return {name for name, logger in found.items() if not logger.propagate}


@pytest.fixture(autouse=True)
def _as_torch_makes_them():
    """Undo what an earlier test of this process did to the handlers."""
    parent = logging.getLogger("torch")
    names = apart() - {"torch.__trace"}
    saved = [(each, each.handlers) for each in map(logging.getLogger, names)]
    for each, _ in saved:
        each.handlers = [*parent.handlers]
    yield
    for each, handlers in saved:
        each.handlers = handlers


@pytest.fixture
def other():
    """A logger as a user's `TORCH_LOGS_OUT` makes it: with a further handler."""
    logger, parent = logging.getLogger("torch.of_test"), logging.getLogger("torch")
    logger.propagate = False
    logger.handlers = [*parent.handlers, logging.StreamHandler(io.StringIO())]
    yield logger
    logger.handlers, logger.propagate = [], True


def test_loggers_with_the_same_handler_share_it(other):
    """Those with another one, and torch's trace, stay as they are."""
    before = apart()
    assert len(before) > 20
    restore = share_handler()
    try:
        assert {"torch.__trace", "torch.of_test"} <= apart()
        assert len(apart()) < 10
    finally:
        restore()
    assert apart() == before


def test_a_record_reaches_each_handler_once():
    written, pytests = (logging.StreamHandler(io.StringIO()) for _ in range(2))
    parent, logger = (logging.getLogger(name) for name in ("torch", "torch._dynamo"))
    saved = [(each, each.handlers) for each in (parent, logger)]
    parent.handlers = [written]
    logger.handlers = [written]
    restore = share_handler()
    try:
        # As pytest does: to those that do not propagate.
        for each in (parent, logger):
            if not each.propagate:
                each.addHandler(pytests)
        logger.warning("a record")
        assert logger.propagate
        assert [each.stream.getvalue() for each in (written, pytests)] == ["a record\n"] * 2
    finally:
        restore()
        for each, handlers in saved:
            each.handlers = handlers
    assert not logger.propagate


def test_a_run_of_the_suite_shares_handlers_until_its_end(request):
    cleanups = []

    class Config:
        add_cleanup = staticmethod(cleanups.append)

    before = apart()
    plugin = options.LongLived(Config())
    plugin.pytest_runtest_logfinish()
    plugin.pytest_runtest_logfinish()
    assert len(apart()) < 10
    for cleanup in reversed(cleanups):
        cleanup()
    assert apart() == before
