"""Does ahead what later tests need, in other processes.

While tests judge answers, threads have the children of a framework's target give the next ones; and
what goldens of the builtin target hold is computed in a copy of this process.

The children of a framework's target are processes. Without these threads, the tests would wait for
a child, and the child for the next test's question: only one process would work at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import takewhile
from operator import methodcaller
from threading import Event, Thread
from typing import TYPE_CHECKING, Any

from pytest_moe_routing import goldens
from pytest_moe_routing.errors import MoERoutingError
from pytest_moe_routing.suite.elsewhere import Work, computing
from pytest_moe_routing.suite.selection import SUITE
from pytest_moe_routing.targets import probe as probes
from pytest_moe_routing.targets.builtin.target import BuiltinTarget
from pytest_moe_routing.targets.framework import FrameworkTarget

if TYPE_CHECKING:
    import pytest

    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target
    from pytest_moe_routing.session import MoESession
    from pytest_moe_routing.targets.probe import Questions

    #: What a test computes with answers, called without arguments.
    Check = Callable[[], object]
    #: By test, the functions of `oracle` that compute what it judges, given a target.
    _Functions = Mapping[str, tuple[Callable[..., object], ...]]

#: By test, the target's methods whose questions are asked of other children than most.
_METHODS = {
    "test_model_code": ("layer_request", "misnamed_weights"),
    "test_model_files": ("files_not_run",),
    "test_transformers_backend": ("backend_request",),
    "test_router": ("router_runs",),
    "test_router_precision": ("router_runs",),
}
#: The tests that ask most of what the first child is asked.
_SWEEP, _VERDICT, _MODULAR = "test_config_sweep", "test_verdict", "test_modular_call"
#: The share of the sweep that this process makes itself, while a copy of it does the rest.
_HERE = 5 / 8
#: Seconds after which a thread that computes lets another one go on. With Python's 5 ms, children
#: wait for their next question about as long as they take to answer it.
_SWITCH = 0.0005
#: Seconds after which it is looked whether the tests are over.
_PAUSE = 0.05
#: Seconds in which a question may be answered that nobody waits for any more.
_GRACE = 5.0


@contextmanager
def asking_ahead(
    target: Target, items: Sequence[pytest.Item], session: MoESession
) -> Iterator[None]:
    """Ask what the tests will ask of a framework's children: the first in a thread of its own.

    A test waits for a few of a thread's questions, and for no others. If a child fails, its thread
    ends, and the tests ask by themselves: what they report does not depend on the threads.
    """
    if isinstance(target, BuiltinTarget):
        with computing(_work(target, items, session)) as session.computed:
            yield
        return
    stop = Event()
    threads = []
    if isinstance(target, FrameworkTarget):
        of_first, of_others = (_checks(tests, target, items, session) for tests in _functions())
        for asked in (
            (_of_others(target, items, session), of_others),
            (_of_first(target, items), of_first),
        ):
            # A daemon, as a question may have no end: closing the target then ends the child.
            thread = Thread(target=_ask, args=(*asked, stop), name="moe-routing-ahead", daemon=True)
            thread.start()
            threads.append(thread)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        yield
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join(_GRACE)


def _work(target: Target, items: Sequence[pytest.Item], session: MoESession) -> Work:
    """Return what a copy of this process computes, in the order in which it is needed."""
    from pytest_moe_routing.oracle.config_sweep import CachedTarget, sweep
    from pytest_moe_routing.suite.payloads import payload

    swept, cached = list(_cases(items, _SWEEP)), CachedTarget(target)
    work: dict[Hashable, Callable[[], Any]] = {
        (sweep.__name__, scheme): partial(sweep, cached, scheme, session.models_in(scheme))
        for scheme in swept[round(len(swept) * _HERE) :]
    }
    cases = [(goldens.ROUTING, _cases(items, "test_routing").get("", []))]
    cases += _cases(items, "test_scheme").items()
    for name, models in cases:
        for model in models:
            work[str(model), name] = partial(payload, model, name)
    return work


def _ask(asked: Iterable[Questions], checks: Iterable[Check], stop: Event) -> None:
    # Where all answers are known from an earlier run, there is nothing to be done ahead.
    while not probes.CHILD_STARTED.wait(_PAUSE):
        if stop.is_set():
            return
    with probes.asking_ahead(stop):
        for probe, question, many in asked:
            wanted = takewhile(lambda _: not stop.is_set(), many)
            # What `asked` yields next may ask for what was left out here, one question at a time.
            if not probe.ask_ahead(question, wanted) or stop.is_set():
                return
        for check in checks:
            # What fails, fails again in the test.
            with suppress(Exception):
                check()
            if stop.is_set():
                return


def _functions() -> tuple[_Functions, _Functions]:
    """Return what tests compute: those that ask the first child, and those that ask others."""
    from pytest_moe_routing.oracle.changed_experts import changed_experts
    from pytest_moe_routing.oracle.changed_keys import changed_keys
    from pytest_moe_routing.oracle.formats import unlike_formats
    from pytest_moe_routing.oracle.ignored import ignored_requests
    from pytest_moe_routing.oracle.layouts import wrong_layouts
    from pytest_moe_routing.oracle.modular import rejected_by_method
    from pytest_moe_routing.oracle.moved import moved_placements
    from pytest_moe_routing.oracle.other_experts import other_calls
    from pytest_moe_routing.oracle.served import served_otherwise
    from pytest_moe_routing.oracle.shares import wrong_splits

    of_first: _Functions = {
        "test_quantization_keys": (changed_keys,),
        "test_checkpoints": (served_otherwise,),
        "test_modular": (rejected_by_method,),
        "test_placements": (moved_placements, changed_experts),
    }
    of_others: _Functions = {
        "test_other_experts": (other_calls,),
        "test_around_call": (ignored_requests,),
        "test_layouts": (wrong_layouts, unlike_formats, wrong_splits),
        "test_quantization_methods": (methodcaller("methods_run"),),
    }
    return of_first, of_others


def _checks(
    tests: _Functions,
    target: FrameworkTarget,
    items: Sequence[pytest.Item],
    session: MoESession,
) -> Iterator[Check]:
    """Yield the work of tests that ask one question after the other.

    Which question comes next depends on answers, so the work itself is done ahead, and its result
    is dropped. Apart from waiting for answers, it takes almost no time.
    """
    for test, functions in tests.items():
        for scheme in _cases(items, test):
            about = (scheme, session.models_in(scheme)) if scheme else ()
            yield from (partial(function, target, *about) for function in functions)


def _of_others(
    target: FrameworkTarget, items: Sequence[pytest.Item], session: MoESession
) -> Iterator[Questions]:
    """Yield what is asked of other children than the first."""
    for method, about in _models(items, session).items():
        yield from target.questions_ahead(method, about)


def _of_first(target: FrameworkTarget, items: Sequence[pytest.Item]) -> Iterator[Questions]:
    """Yield most of what is asked of the first child, about in the order of the tests."""
    from pytest_moe_routing.oracle.swept_configs import by_distance, swept_models

    for scheme, about in _cases(items, _VERDICT).items():
        judged = _read(target, about)
        yield from target.verdict_questions(judged, scheme)
        yield from target.choice_questions(judged, scheme)
    for scheme, about in _cases(items, _MODULAR).items():
        yield from target.modular_questions(about, scheme)
    for scheme in _cases(items, _SWEEP):
        for models, thorough in by_distance(swept_models()):
            yield from target.verdict_questions(models, scheme, thorough=thorough)


def _read(target: Target, models: Iterable[ModelSpec]) -> list[ModelSpec]:
    """Return models as they are judged, without those that are not."""
    from pytest_moe_routing.oracle.judge import as_read_by, open_questions

    read = []
    for model in models:
        try:
            read.append(as_read_by(target, model))
        except MoERoutingError:
            continue
    return [model for model in read if not open_questions(model)]


def _of_suite(items: Iterable[pytest.Item]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the suite's tests of this process with their parameters.

    Processes of a parallel run work side by side as they are: there, nothing is asked ahead.
    """
    for item in items:
        if item.path.parent == SUITE and not hasattr(item.config, "workerinput"):
            params = item.callspec.params if hasattr(item, "callspec") else {}
            yield getattr(item, "originalname", ""), params


def _cases(items: Iterable[pytest.Item], test: str) -> Mapping[str, list[ModelSpec]]:
    """Return the schemes of a test, "" if it has none, and the models of each, in its order."""
    cases: dict[str, list[ModelSpec]] = {}
    for name, params in _of_suite(items):
        if name == test:
            models = cases.setdefault(params.get("moe_scheme", ""), [])
            models += [params["moe_model"]] if "moe_model" in params else []
    return cases


def _models(items: Iterable[pytest.Item], session: MoESession) -> Mapping[str, list[ModelSpec]]:
    """Return the models that tests are about, by method, in the order in which tests are run."""
    models: dict[str, list[ModelSpec]] = {}
    for name, params in _of_suite(items):
        about = params.get("moe_model")
        for method in _METHODS.get(name, ()):
            if about is None:
                models[method] = session.models
            else:
                models.setdefault(method, []).append(about)
    return models
