"""Asks a framework ahead: while tests ask its first child, a thread asks the others.

The children of a framework's target are processes. In a serial run, tests ask one of them after the
other, and one core would do all the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import TYPE_CHECKING

from pytest_moe_routing.suite.selection import SUITE
from pytest_moe_routing.targets.framework import FrameworkTarget

if TYPE_CHECKING:
    import pytest

    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target
    from pytest_moe_routing.session import MoESession

#: By test, the target's method whose questions are asked of another child than most.
_METHODS = {
    "test_model_code": "layer_request",
    "test_transformers_backend": "backend_request",
    "test_router": "router_runs",
    "test_router_precision": "router_runs",
}
#: Seconds in which a question may be answered that nobody waits for any more.
_GRACE = 5.0


@contextmanager
def asking_ahead(
    target: Target, items: Sequence[pytest.Item], session: MoESession
) -> Iterator[None]:
    """Ask what the tests will ask of a framework's further children, in a thread.

    A test waits for the thread's question, and for no other. If a child fails, the thread ends, and
    the tests ask by themselves: what they report does not depend on the thread.
    """
    models = _models(items, session)
    if not models or not isinstance(target, FrameworkTarget):
        yield
        return
    stop = Event()

    def ask() -> None:
        for method, about in models.items():
            for probe, question, arguments in target.questions_ahead(method, about):
                if stop.is_set() or not probe.ask_ahead(question, **arguments):
                    return

    # A daemon, as a question may have no end: closing the target then ends the child.
    thread = Thread(target=ask, name="moe-routing-ahead", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(_GRACE)


def _models(items: Sequence[pytest.Item], session: MoESession) -> Mapping[str, list[ModelSpec]]:
    """Return the models that tests are about, by method, in the order in which tests are run.

    Processes of a parallel run work side by side as they are: there, nothing is asked ahead.
    """
    models: dict[str, list[ModelSpec]] = {}
    for item in items:
        method = _METHODS.get(getattr(item, "originalname", ""))
        if method is None or item.path.parent != SUITE or hasattr(item.config, "workerinput"):
            continue
        about = item.callspec.params.get("moe_model") if hasattr(item, "callspec") else None
        if about is None:
            models[method] = session.models
        else:
            models.setdefault(method, []).append(about)
    return models
