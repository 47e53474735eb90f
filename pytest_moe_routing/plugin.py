"""The pytest plugin: options, hooks and thin fixtures. What they do is done elsewhere.

This module is imported by every pytest run of an environment: it imports pytest and nothing heavy.
"""

from __future__ import annotations

import os
import re
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.errors import MoERoutingError, TargetError
from pytest_moe_routing.escape import printable
from pytest_moe_routing.kernels import library
from pytest_moe_routing.kernels.routers import kernel_choices, kernel_names
from pytest_moe_routing.report.judged import JudgedReporter
from pytest_moe_routing.session import BUILTIN, MoESession

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from pytest_moe_routing.flashinfer import FlashInfer
    from pytest_moe_routing.kernels.gpu import Gpu
    from pytest_moe_routing.logits import Case
    from pytest_moe_routing.models import ModelSpec
    from pytest_moe_routing.oracle.target import Target

SUITE = Path(__file__).resolve().parent / "suite"

_SESSION = pytest.StashKey[MoESession]()
_LEDGER = "moe-routing-ledger"
#: The fixtures that make a test one of this plugin's, be it the suite's or the host's.
_FIXTURES = {"moe_model", "moe_scheme", "moe_target", "moe_gpu"}
#: torch says so when it is imported, and is left half-initialized if that is an error.
_WITHOUT_NUMPY = pytest.mark.filterwarnings("ignore:Failed to initialize NumPy")

# option, ini type, help; the ini twin of --moe-x is moe_x, and the command line wins.
_OPTIONS = (
    ("golden", "bool", "run the golden suite: every model's routing, decisions and verdicts"),
    ("target", "string", "what is judged: a target's name, or module:Class (default: builtin)"),
    ("models", "args", "ids of models, as comma-separated shell patterns (default: all)"),
    ("schemes", "args", "names of schemes, comma-separated (default: all)"),
    ("flashinfer", "string", "FlashInfer release to judge against (default: installed, or newest)"),
    ("golden-dir", "paths", "a golden directory over the packaged one; may be repeated"),
    ("config", "paths", "a Hugging Face config.json, or its folder; may be repeated"),
    ("kernels", "string", "flashinfer, simulator[:FAULT], vllm[@PATH], sglang[@PATH] (flashinfer)"),
    ("scale", "string", "sizes of fused MoE tests: reduced or full (default: reduced)"),
    ("require-gpu", "bool", "fail unless at least one GPU test ran"),
    ("min-gpu-tests", "string", "fail unless at least that many GPU tests ran"),
    ("min-verdicts", "string", "fail unless so many verdicts were given (default: as is known)"),
    ("known-failures", "paths", "a YAML ledger of failures that are known; may be repeated"),
    ("write-known-failures", "string", "write a ledger of every cause that fails; a new file"),
    ("report", "paths", "write the verdicts as .html, .md, .json or .jsonl; may be repeated"),
)


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    group = parser.getgroup("moe-routing", "Mixture-of-Experts routing")
    for name, kind, text in _OPTIONS:
        ini, dest = f"moe_{name}".replace("-", "_"), f"moe_{name}".replace("-", "_")
        action = {"bool": "store_true", "paths": "append"}.get(kind, "store")
        group.addoption(f"--moe-{name}", dest=dest, action=action, default=None, help=text)
        parser.addini(ini, f"as --moe-{name}: {text}", type=kind, default=None)  # type: ignore[arg-type]
    if util.find_spec("syrupy") is None or pluginmanager.is_blocked("syrupy"):
        # syrupy's option, so that asking for it without syrupy gets an answer.
        group.addoption(
            "--snapshot-update",
            dest="update_snapshots",
            action="store_true",
            default=False,
            help="rewrite goldens; needs syrupy",
        )


def _option(config: pytest.Config, name: str) -> Any:
    value = config.getoption(f"moe_{name}")
    return config.getini(f"moe_{name}") if value is None else value


def _names(config: pytest.Config, name: str) -> list[str]:
    given = _option(config, name) or []
    parts = given.split(",") if isinstance(given, str) else ",".join(given).split(",")
    return [part.strip() for part in parts if part.strip()]


def _is_updating(config: pytest.Config) -> bool:
    return bool(config.getoption("update_snapshots", False))


def _check_update(config: pytest.Config) -> None:
    config.stash[_SESSION].check_update(
        has_syrupy=config.pluginmanager.has_plugin("syrupy"),
        forked=bool(config.getoption("forked", False)),
    )


def _check_choices(config: pytest.Config) -> None:
    """Refuse what is none of an option's values."""
    for name, values in (("kernels", kernel_choices()), ("scale", "reduced|full")):
        found = _option(config, name)
        if found and not re.fullmatch(values, found):
            raise pytest.UsageError(f"--moe-{name}: found {found!r}, expected {values}")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers",
        "gpu(kernels=None): needs an NVIDIA GPU and FlashInfer, and is skipped without; kernels "
        "('routing', 'fused') are built before the test",
    )
    config.addinivalue_line(
        "markers", "sweep: about routers that no model has; left out of runs about some models"
    )
    config.addinivalue_line(
        "markers",
        "moe_models(*patterns, distinct_routers=False, distinct_layers=False, published=False): "
        "run with the models whose id matches a pattern; with distinct_routers, with one model of "
        "each router; with distinct_layers, with one of each size and activation of the experts; "
        "with published, only in schemes of which the model has a published checkpoint",
    )
    session = config.stash[_SESSION] = MoESession(
        kernels=_option(config, "kernels") or "",
        target_name=_option(config, "target") or BUILTIN,
        model_patterns=_names(config, "models"),
        scheme_names=_names(config, "schemes"),
        flashinfer_release=_option(config, "flashinfer") or None,
        golden_dirs=[Path(d) for d in _option(config, "golden_dir") or []],
        configs=[Path(p) for p in _option(config, "config") or []],
        ledgers=[Path(p) for p in _option(config, "known_failures") or []],
    )
    _check_choices(config)
    reports = [Path(p) for p in _option(config, "report") or []]
    golden = bool(_option(config, "golden"))
    try:
        if golden:
            asks = not (hasattr(config, "workerinput") or config.option.collectonly)
            session.check(ask=asks)
        if golden and _is_updating(config):
            _check_update(config)
        if session.ledgers:
            from pytest_moe_routing.ledger import LedgerPlugin

            chosen = session.model_patterns or session.scheme_names
            chosen = chosen or config.getoption("keyword") or config.getoption("lf", False)
            known = LedgerPlugin(session.known_failures, whole_suite=golden and not chosen)
            config.pluginmanager.register(known, _LEDGER)
        config.pluginmanager.register(JudgedReporter.of(_option(config, "min_verdicts")))
        if not hasattr(config, "workerinput"):
            from pytest_moe_routing.report.collect import Reporter
            from pytest_moe_routing.report.failures import Grouping
            from pytest_moe_routing.report.gpu import GpuReporter
            from pytest_moe_routing.report.known import LedgerWriter

            gpus = GpuReporter.of(_option(config, "min_gpu_tests"), _option(config, "require_gpu"))
            config.pluginmanager.register(gpus, "moe-routing-gpus")
            config.pluginmanager.register(Reporter(session, paths=reports), "moe-routing-reporter")
            config.pluginmanager.register(Grouping(), "moe-routing-grouping")
            if ledger := _option(config, "write_known_failures"):
                config.pluginmanager.register(LedgerWriter(session, Path(ledger)))
    except MoERoutingError as error:
        raise pytest.UsageError(str(error)) from None
    if golden:
        # Files, not their folder: the host's python_files must not decide what is collected.
        suite = [str(path) for path in sorted(SUITE.glob("test_*.py"))]
        given = config.args_source is config.ArgsSource.ARGS
        config.args = config.args + suite if given else suite


def pytest_report_header(config: pytest.Config) -> str | None:
    return printable(config.stash[_SESSION].describe()) if _option(config, "golden") else None


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
            goldens="moe_golden" in metafunc.fixturenames,
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
    from pytest_moe_routing.suite.selection import is_left_out

    session = config.stash[_SESSION]
    gpu = any(_option(config, name) for name in ("require_gpu", "min_gpu_tests", "kernels"))
    full = _option(config, "scale") == "full"
    left_out: list[pytest.Item] = []
    asked: list[pytest.Item] = []
    for item in items:
        (
            left_out if is_left_out(item, config, session, gpu=gpu, full_scale=full) else asked
        ).append(item)
    if left_out:
        items[:] = asked
        config.hook.pytest_deselected(items=left_out)
    ledger = config.pluginmanager.get_plugin(_LEDGER)
    for item in items:
        if isinstance(item, pytest.Function) and _FIXTURES & set(item.fixturenames):
            case = item.callspec.id if hasattr(item, "callspec") else ""
            item.user_properties.append(("moe_case", f"{item.path.stem}::{item.name}"))
            item.add_marker(_WITHOUT_NUMPY)
            if ledger:
                ledger.mark(item, item.originalname, case)


@pytest.fixture(scope="session")
def moe_session(pytestconfig: pytest.Config) -> MoESession:
    """What this run is about."""
    return pytestconfig.stash[_SESSION]


@pytest.fixture(scope="session")
def moe_flashinfer(moe_session: MoESession) -> FlashInfer:
    """The FlashInfer release in force."""
    return moe_session.flashinfer


@pytest.fixture(scope="session")
def moe_target(moe_session: MoESession) -> Iterator[Target]:
    """The target in force; a target that cannot be used fails the test in one line."""
    try:
        target, message = moe_session.target, ""
    except MoERoutingError as error:
        target, message = None, str(error)
    if target is None:
        pytest.fail(message, pytrace=False)
    yield target
    target.close()


@pytest.fixture(scope="session")
def moe_framework(moe_target: Target) -> Target:
    """The target in force, for tests that are left out when it is the builtin one."""
    return moe_target


@pytest.fixture
def moe_model(request: pytest.FixtureRequest) -> ModelSpec:
    """A chosen model; the test runs once for each."""
    model: ModelSpec = request.param
    return model


@pytest.fixture
def moe_case(request: pytest.FixtureRequest, moe_model: ModelSpec) -> Case:
    """Logits, bias and recipe of one routing: every pattern that suits the model's router."""
    from pytest_moe_routing.logits import make
    from pytest_moe_routing.routing import recipe_of

    pattern, _, tokens = request.param.rpartition("-")
    experts = moe_model.router.num_experts
    return make(pattern, recipe_of(moe_model.router), num_tokens=int(tokens), num_experts=experts)


@pytest.fixture
def moe_scheme(request: pytest.FixtureRequest) -> str:
    """A chosen quantization scheme; with `moe_model`, that of a checkpoint of the model."""
    scheme: str = request.param
    return scheme


@pytest.fixture
def moe_golden(
    request: pytest.FixtureRequest, moe_model: ModelSpec
) -> Callable[[str, dict[str, Any]], None]:
    """`moe_golden(name, data)`: compare with the model's golden, or rewrite it when updating."""
    from pytest_moe_routing.suite import golden

    def check(name: str, data: dict[str, Any]) -> None:
        __tracebackhide__ = True
        if _is_updating(request.config):
            golden.update(request, name, data, lambda: _check_update(request.config))
        else:
            golden.compare(moe_model, name, data)

    return check


@pytest.fixture
def moe_property(request: pytest.FixtureRequest) -> Callable[[str, Any], None]:
    """`moe_property(name, value)`, for reports; `record_property` warns under `--junitxml`."""
    return lambda name, value: request.node.user_properties.append((name, value))


@pytest.fixture(scope="session")
def _moe_stderr(pytestconfig: pytest.Config) -> Iterator[int]:
    """The real stderr: what is captured would be lost with a process that ends in a test."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        descriptor = os.dup(2)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def moe_gpu(
    request: pytest.FixtureRequest,
    moe_property: Callable[[str, Any], None],
    _moe_stderr: int,
) -> Iterator[Gpu]:
    """A GPU that runs FlashInfer's routing kernels; the test is skipped with the reason without.

    What `@pytest.mark.gpu(kernels=...)` names is built by now, and not in the test's own time.
    """
    from pytest_moe_routing.kernels import gpu

    with gpu.watchdog(_moe_stderr):
        found = gpu.find_gpu()
    if found.missing:
        moe_property("moe_gpu", {"missing": found.missing})
        pytest.skip(found.missing)
    from pytest_moe_routing.kernels import build

    marker = request.node.get_closest_marker("gpu")
    build.warm_up(found, marker.kwargs.get("kernels", "") if marker else "", _moe_stderr)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "no xdist")
    here = {"gpu": str(found), "uuid": found.uuid, "driver": found.driver, "worker": worker}
    moe_property("moe_gpu", {**here, **build.software()})
    with gpu.guarded(_moe_stderr):
        yield found


@pytest.fixture
def moe_kernels(request: pytest.FixtureRequest, moe_flashinfer: FlashInfer) -> library.Kernels:
    """The kernels under test: FlashInfer's on `moe_gpu`, or the simulated ones."""
    name = _option(request.config, "kernels") or library.FLASHINFER
    if name == library.FLASHINFER:
        return library.on_gpu(request.getfixturevalue("moe_gpu"))
    if name.partition("@")[0] in kernel_names():
        pytest.skip(f"--moe-kernels {name}: only test_gpu_router.py is about compiled routers")
    try:
        return library.simulated(name, moe_flashinfer)
    except MoERoutingError as error:
        message = str(error)
    pytest.fail(message, pytrace=False)


@pytest.fixture
def moe_full_scale(pytestconfig: pytest.Config) -> bool:
    """Whether layers have their model's own sizes; tests that need it are left out if not."""
    return _option(pytestconfig, "scale") == "full"


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

    skip_without_driver(item, _option(item.config, "kernels"))


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

        explained = gpu.explain(error)
        if explained is error:
            raise
        raise explained from error
