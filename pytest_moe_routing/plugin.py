"""The pytest plugin: options, hooks and thin fixtures. What they do is done elsewhere.

This module is imported by every pytest run of an environment: it imports pytest and nothing heavy.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing import options
from pytest_moe_routing.errors import MoERoutingError, TargetError
from pytest_moe_routing.escape import printable
from pytest_moe_routing.options import names, option
from pytest_moe_routing.report import endings
from pytest_moe_routing.report.judged import JudgedReporter
from pytest_moe_routing.session import BUILTIN, MoESession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_moe_routing.flashinfer import FlashInfer
    from pytest_moe_routing.kernels.gpu import Gpu
    from pytest_moe_routing.kernels.library import Kernels
    from pytest_moe_routing.logits import RoutingCase
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target

_SESSION = pytest.StashKey[MoESession]()
_LEDGER = "moe-routing-ledger"
#: The fixtures that make a test one of this plugin's, be it the suite's or the host's.
_FIXTURES = {"moe_model", "moe_scheme", "moe_target", "moe_gpu"}
#: torch says so when it is imported, and is left half-initialized if that is an error.
_WITHOUT_NUMPY = pytest.mark.filterwarnings("ignore:Failed to initialize NumPy")


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    options.add_options(parser, pluginmanager)


def _is_updating(config: pytest.Config) -> bool:
    return bool(config.getoption("update_snapshots", False))


def _check_update(config: pytest.Config) -> None:
    config.stash[_SESSION].check_update(
        has_syrupy=config.pluginmanager.has_plugin("syrupy"),
        forked=bool(config.getoption("forked", False)),
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    options.add_markers(config)
    config.pluginmanager.register(endings, "moe-routing-endings")
    session = config.stash[_SESSION] = MoESession(
        kernels=option(config, "kernels") or "",
        target_name=option(config, "target") or BUILTIN,
        model_patterns=names(config, "models"),
        scheme_names=names(config, "schemes"),
        flashinfer_release=option(config, "flashinfer") or None,
        golden_dirs=[Path(d) for d in option(config, "golden_dir") or []],
        configs=[Path(p) for p in option(config, "config") or []],
        ledgers=[Path(p) for p in option(config, "known_failures") or []],
    )
    session.store = partial(options.store, config)
    reports = [Path(p) for p in option(config, "report") or []]
    golden = bool(option(config, "golden"))
    try:
        options.check_choices(config)
        if golden:
            asks = not (hasattr(config, "workerinput") or config.option.collectonly)
            config.pluginmanager.register(options.LongLived(config))
            session.check(ask=asks, serial=not config.getoption("numprocesses", None))
        if golden and _is_updating(config):
            _check_update(config)
        if session.ledgers:
            from pytest_moe_routing.ledger import LedgerPlugin

            chosen = session.model_patterns or session.scheme_names
            chosen = chosen or config.getoption("keyword") or config.getoption("lf", False)
            known = LedgerPlugin(session.known_failures, whole_suite=golden and not chosen)
            config.pluginmanager.register(known, _LEDGER)
        judged = JudgedReporter.of(option(config, "min_verdicts"), session)
        if not config.option.collectonly:
            config.pluginmanager.register(judged)
        if not hasattr(config, "workerinput"):
            from pytest_moe_routing.report.collect import Reporter
            from pytest_moe_routing.report.failures import Grouping
            from pytest_moe_routing.report.gpu import GpuReporter
            from pytest_moe_routing.report.known import LedgerWriter

            gpus = GpuReporter.of(option(config, "min_gpu_tests"), option(config, "require_gpu"))
            config.pluginmanager.register(gpus, "moe-routing-gpus")
            config.pluginmanager.register(Reporter(session, paths=reports), "moe-routing-reporter")
            config.pluginmanager.register(Grouping(), "moe-routing-grouping")
            slow = {"test_config_sweep"} if golden and not session.is_builtin else set()
            slow |= {"test_gpu_moe"} if option(config, "scale") == "full" else set()
            if slow:
                from pytest_moe_routing.report.slow import SlowTests

                config.pluginmanager.register(SlowTests(config, slow))
            if ledger := option(config, "write_known_failures"):
                config.pluginmanager.register(LedgerWriter(session, Path(ledger)))
    except MoERoutingError as error:
        raise pytest.UsageError(str(error)) from None
    _choose_arguments(config, golden)


def _choose_arguments(config: pytest.Config, golden: bool) -> None:
    """Resolve pasted ids of the suite's tests; without any, `--moe-golden` is the whole suite."""
    given = config.args_source is config.ArgsSource.ARGS
    if not golden and not given:
        return
    from pytest_moe_routing.suite.selection import resolve, suite_files

    resolved = [resolve(argument) for argument in config.args] if given else []
    config.args = [argument for argument, _ in resolved]
    if golden and not any(is_of_suite for _, is_of_suite in resolved):
        config.args += map(str, suite_files())


def pytest_pycollect_makemodule(
    module_path: Path, parent: pytest.Collector
) -> pytest.Module | None:
    """Give the suite's tests ids that are the same wherever the package is installed."""
    if module_path.parent.name != "suite":
        return None
    from pytest_moe_routing.suite.selection import SUITE, module_id

    if module_path.parent != SUITE:
        return None
    module: pytest.Module = pytest.Module.from_parent(
        parent, path=module_path, nodeid=module_id(module_path)
    )
    return module


def pytest_report_header(config: pytest.Config) -> str | None:
    return printable(config.stash[_SESSION].describe()) if option(config, "golden") else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    session = metafunc.config.stash[_SESSION]
    names = [n for n in ("moe_model", "moe_scheme", "moe_case") if n in metafunc.fixturenames]
    if "moe_router" in metafunc.fixturenames:
        metafunc.parametrize("moe_router", session.routers)
    if not names:
        return
    marks = list(metafunc.definition.iter_markers("moe_models"))
    try:
        cases = session.select(
            with_schemes="moe_scheme" in names,
            with_patterns="moe_case" in names,
            goldens="_moe_golden" in metafunc.fixturenames,
            patterns=[mark.args for mark in marks if mark.args],
            distinct=any(mark.kwargs.get("distinct_routers") for mark in marks),
            distinct_layers=any(mark.kwargs.get("distinct_layers") for mark in marks),
            published=any(mark.kwargs.get("published") for mark in marks),
        )
    except MoERoutingError as error:
        raise pytest.UsageError(str(error)) from None
    if names == ["moe_scheme"]:
        metafunc.parametrize("moe_scheme", list(dict.fromkeys(scheme for _, scheme in cases)))
    elif names == ["moe_model"]:
        metafunc.parametrize("moe_model", [model for model, _ in cases], ids=str)
    else:
        if "moe_case" in names:
            names = ["moe_model", "moe_case"]
        metafunc.parametrize(names, cases, indirect=True, ids=[f"{m}-{c}" for m, c in cases])


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Before anybody deselects: leave out what this run does not ask, and name our cases."""
    from pytest_moe_routing.suite.selection import in_order, left_out

    session = config.stash[_SESSION]
    gpu = any(option(config, name) for name in ("require_gpu", "min_gpu_tests", "kernels"))
    asked = {"gpu": gpu, "full_scale": option(config, "scale") == "full"}
    reasons = [left_out(item, config, session, **asked) for item in items]
    if any(reasons):
        dropped = [item for item, reason in zip(items, reasons, strict=True) if reason]
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item, reason in zip(items, reasons, strict=True) if not reason]
        endings.leave_out(config, filter(None, reasons))
    in_order(items)
    ledger = config.pluginmanager.get_plugin(_LEDGER)
    for item in items:
        if isinstance(item, pytest.Function) and _FIXTURES & set(item.fixturenames):
            case = item.callspec.id if hasattr(item, "callspec") else ""
            item.user_properties.append(("moe_case", f"{item.path.stem}::{item.name}"))
            item.add_marker(_WITHOUT_NUMPY)
            if ledger:
                ledger.mark(item, item.originalname, case)


# Public fixtures: docs/api.md describes them.


@pytest.fixture
def moe_model(request: pytest.FixtureRequest) -> ModelSpec:
    """Run the test once with each chosen model.

    `--moe-models` and `@pytest.mark.moe_models("deepseek-*")` choose.
    """
    model: ModelSpec = request.param
    return model


@pytest.fixture
def moe_scheme(request: pytest.FixtureRequest) -> str:
    """Run the test with each chosen scheme; with `moe_model`, with each model in each scheme."""
    scheme: str = request.param
    return scheme


@pytest.fixture
def moe_case(request: pytest.FixtureRequest, moe_model: ModelSpec) -> RoutingCase:
    """Run the test with every routing case of each chosen model: logits, bias and recipe.

    The cases are all `PATTERNS` that suit the model's router, and `plain` ones whose numbers of
    tokens lie on both sides of usual tile limits.
    """
    from pytest_moe_routing.logits import make_case
    from pytest_moe_routing.routing import recipe_of

    pattern, _, tokens = request.param.rpartition("-")
    experts = moe_model.router.num_experts
    return make_case(
        pattern, recipe_of(moe_model.router), num_tokens=int(tokens), num_experts=experts
    )


@pytest.fixture(scope="session")
def moe_target(request: pytest.FixtureRequest, _moe_session: MoESession) -> Iterator[Target]:
    """Return the target of this run; a target that cannot be used fails the test in one line."""
    try:
        target, message = _moe_session.target, ""
    except MoERoutingError as error:
        target, message = None, str(error)
    if target is None:
        pytest.fail(message, pytrace=False)
    from pytest_moe_routing.suite.ahead import asking_ahead

    with asking_ahead(target, request.session.items, _moe_session):
        yield target
    target.close()


@pytest.fixture(scope="session")
def moe_flashinfer(_moe_session: MoESession) -> FlashInfer:
    """Return the FlashInfer release that this run judges against."""
    return _moe_session.flashinfer


@pytest.fixture
def moe_kernels(request: pytest.FixtureRequest, moe_flashinfer: FlashInfer) -> Kernels:
    """Return the kernels under test: FlashInfer's on `moe_gpu`, or those of `--moe-kernels`."""
    from pytest_moe_routing.kernels import library, routers

    name = option(request.config, "kernels") or library.FLASHINFER
    if name == library.FLASHINFER:
        return library.on_gpu(request.getfixturevalue("moe_gpu"))
    if name.partition("@")[0] in routers.kernel_names():
        pytest.skip(f"--moe-kernels {name}: only test_gpu_router.py tests compiled routers")
    try:
        return library.simulated(name, moe_flashinfer)
    except MoERoutingError as error:
        message = str(error)
    pytest.fail(message, pytrace=False)


@pytest.fixture
def moe_gpu(
    request: pytest.FixtureRequest,
    _moe_property: Callable[[str, Any], None],
    _moe_stderr: int,
) -> Iterator[Gpu]:
    """Return a GPU that runs FlashInfer's routing kernels, or skip the test with the reason.

    The kernels that `@pytest.mark.gpu(kernels=...)` names have been built before the test starts.
    """
    from pytest_moe_routing.kernels import gpu

    with gpu.watchdog(_moe_stderr):
        found = gpu.find_gpu()
    if found.missing:
        _moe_property("moe_gpu", {"missing": found.missing})
        pytest.skip(found.missing)
    from pytest_moe_routing.kernels import build

    marker = request.node.get_closest_marker("gpu")
    build.warm_up(found, marker.kwargs.get("kernels", "") if marker else "", _moe_stderr)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "no xdist")
    here = {"gpu": str(found), "uuid": found.uuid, "driver": found.driver, "worker": worker}
    _moe_property("moe_gpu", {**here, **build.software()})
    with gpu.guarded(_moe_stderr):
        yield found


# Private fixtures of the suite.


@pytest.fixture(scope="session")
def _moe_session(pytestconfig: pytest.Config) -> MoESession:
    """Return the options of this run, resolved."""
    return pytestconfig.stash[_SESSION]


@pytest.fixture(scope="session")
def _moe_framework(moe_target: Target) -> Target:
    """Return the target of this run, for tests that the builtin target has no answers to."""
    return moe_target


@pytest.fixture
def _moe_golden(
    request: pytest.FixtureRequest, moe_model: ModelSpec, _moe_session: MoESession
) -> Callable[[str], None]:
    """Return a function of a name: compute it, and compare with the golden or rewrite that."""
    from pytest_moe_routing.suite import golden
    from pytest_moe_routing.suite.payloads import payload

    def check(name: str) -> None:
        __tracebackhide__ = True
        data = _moe_session.computed((str(moe_model), name), lambda: payload(moe_model, name))
        if _is_updating(request.config):
            golden.update(request, name, data, lambda: _check_update(request.config))
        else:
            golden.compare(moe_model, name, data, options.choosing_goldens(request.config))

    return check


@pytest.fixture
def _moe_property(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """Return a function of name and value; pytest's `record_property` warns with `--junitxml`."""
    return lambda name, value: request.node.user_properties.append((name, value))


@pytest.fixture(scope="session")
def _moe_stderr(pytestconfig: pytest.Config) -> Iterator[int]:
    """Return the real stderr: captured text would be lost with a process that ends in a test."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        descriptor = os.dup(2)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def _moe_full_scale(pytestconfig: pytest.Config) -> bool:
    """Return whether this run asks for layers of their model's own sizes."""
    return option(pytestconfig, "scale") == "full"


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Iterator[None]:
    """Messages of ours quote files and frameworks: they are made safe to show on a terminal."""
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, (pytest.fail.Exception, pytest.skip.Exception)) and error.msg:
        error.msg = printable(error.msg)
    return (yield)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip GPU tests where there is no driver: before fixtures, and in one line of `-rs`."""
    from pytest_moe_routing.suite.selection import skip_without_driver

    skip_without_driver(item, option(item.config, "kernels"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """State a target's failure as one cause, and name memory that a GPU lacks."""
    __tracebackhide__ = True
    try:
        return (yield)
    except TargetError as error:
        from pytest_moe_routing.report.failures import fail
        from pytest_moe_routing.suite.causes import of_target

        fail(lambda *stated: item.user_properties.append(stated), [of_target(error)])
        raise
    except Exception as error:
        # Not by its fixtures: another may have asked for `moe_gpu`.
        properties: dict[str, Any] = dict(item.user_properties)
        if "gpu" not in properties.get("moe_gpu", ()):
            raise
        from pytest_moe_routing.kernels import gpu

        if (explained := gpu.explain(error)) is error:
            raise
        raise explained from error
