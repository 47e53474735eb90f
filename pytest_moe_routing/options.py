"""The options of the plugin and their ini twins, and the markers. Imports nothing heavy."""

from __future__ import annotations

import atexit
import gc
import os
import re
import shutil
import sys
from functools import partial
from importlib import util
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_moe_routing.suite.loggers import share_handler

if TYPE_CHECKING:
    from pytest_moe_routing.targets.kept import Store

#: New objects after which garbage is looked for.
_NEW_OBJECTS = 20_000
#: The folder of answers in pytest's cache.
_KEPT = "moe-routing"

#: Files with other things than pytest's configuration, and where that begins.
_SECTIONS = {"pyproject.toml": "[tool.pytest", "tox.ini": "[pytest]", "setup.cfg": "[tool:pytest]"}
#: Option, ini type, metavar, help. The ini twin of --moe-x is moe_x, and the
#: command line wins.
OPTIONS = (
    ("golden", "bool", "", "run the golden suite, which judges the routing of every model"),
    (
        "target",
        "string",
        "NAME[@PATH]",
        "the system to judge: builtin (default), vllm, sglang, transformers, flashinfer, another "
        "registered target, or module:Class; PATH is a wheel, an unpacked wheel or a checkout to "
        "judge instead of the installed package",
    ),
    (
        "models",
        "args",
        "PATTERNS",
        "comma-separated ids or shell patterns of models (default: all)",
    ),
    (
        "schemes",
        "args",
        "NAMES",
        "comma-separated quantization schemes, such as nvfp4,fp8_block, or all (the default)",
    ),
    (
        "flashinfer",
        "string",
        "RELEASE",
        "FlashInfer release to judge against (default: for a target at a PATH, the release that it "
        "pins; otherwise the installed release, or else the newest known one)",
    ),
    (
        "golden-dir",
        "paths",
        "DIR",
        "a directory with your own models, which replace packaged models of the same id; may be "
        "repeated",
    ),
    (
        "config",
        "paths",
        "FILE",
        "a Hugging Face config.json (or its folder) to judge as a further model; may be repeated",
    ),
    (
        "kernels",
        "string",
        "NAME[@PATH]",
        "the kernels that the GPU tests call: flashinfer (default), simulator, simulator:FAULT, "
        "vllm[@PATH] or sglang[@PATH]",
    ),
    (
        "scale",
        "string",
        "reduced|full",
        "sizes of the layers in the tests of fused kernels; full means the models' own sizes "
        "(default: reduced)",
    ),
    ("require-gpu", "bool", "", "fail if no GPU test ran"),
    ("min-gpu-tests", "string", "N", "fail if fewer than N GPU tests ran"),
    (
        "min-verdicts",
        "string",
        "N",
        "fail if fewer than N cases get a verdict (default: the number of cases that this package "
        "is known to be able to judge)",
    ),
    ("known-failures", "paths", "FILE", "a YAML ledger of known failures; may be repeated"),
    (
        "write-known-failures",
        "string",
        "FILE",
        "write a new ledger to FILE, with an entry for each cause of a failure in this run",
    ),
    (
        "no-cache",
        "bool",
        "",
        "run the target's code for every question, and neither reuse nor cache its answers",
    ),
    (
        "report",
        "paths",
        "FILE",
        "write a .html, .md, .json or .jsonl report, and create its directory if it is missing; "
        "may be repeated",
    ),
)
#: Options whose value is a path that may exist.
_PATHS = {
    f"--moe-{name}" for name, kind, *_ in OPTIONS if kind == "paths" or name.startswith("write-")
}


def add_options(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Add every option and its ini twin."""
    group = parser.getgroup("moe-routing", "Mixture-of-Experts routing")
    for name, kind, metavar, text in OPTIONS:
        ini, dest = f"moe_{name}".replace("-", "_"), f"moe_{name}".replace("-", "_")
        action = {"bool": "store_true", "paths": "append"}.get(kind, "store")
        shown = {"metavar": metavar} if metavar else {}
        group.addoption(f"--moe-{name}", dest=dest, action=action, default=None, help=text, **shown)
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


def option(config: pytest.Config, name: str) -> Any:
    """Return an option's value: that of the command line, else that of the ini file."""
    name = f"moe_{name}".replace("-", "_")
    value = config.getoption(name)
    if value == "":
        raise pytest.UsageError(f"--{name.replace('_', '-')}: found '', expected a value")
    if value is not None:
        return value
    try:
        return config.getini(name)
    except (ValueError, pytest.UsageError) as error:
        raise pytest.UsageError(f"ini option {name}: {error}") from None


def names(config: pytest.Config, name: str) -> list[str]:
    """Return the comma-separated names of an option.

    Raises:
        pytest.UsageError: It is given, and names nothing.
    """
    stated = config.getoption(f"moe_{name}")
    given = (option(config, name) if stated is None else stated) or []
    parts = given.split(",") if isinstance(given, str) else ",".join(given).split(",")
    found = [part.strip() for part in parts if part.strip()]
    if stated is not None and not found:
        raise pytest.UsageError(f"--moe-{name}: found {stated!r}, expected at least one name")
    return found


def choosing_goldens(config: pytest.Config) -> list[str]:
    """Return the options of a run that choose which goldens are compared, models excepted."""
    given = [("--moe-golden-dir", directory) for directory in option(config, "golden_dir") or []]
    given += [("-m", config.option.markexpr)] if config.option.markexpr else []
    return [str(word) for pair in given for word in pair]


def store(config: pytest.Config) -> Store | None:
    """Return where a target's answers are kept: next to what pytest keeps between runs, if it does.

    Never where goldens are rewritten.
    """
    keeps = config.pluginmanager.has_plugin("cacheprovider")
    if option(config, "no-cache") or config.getoption("update_snapshots", False) or not keeps:
        return None
    from pytest_moe_routing.targets.kept import Store

    # pytest's own object for it does not exist yet when the header is written.
    place = Path(os.path.expandvars(config.getini("cache_dir")))
    folder = config.rootpath / place / "d" / _KEPT
    if config.getoption("cacheclear", False):
        shutil.rmtree(folder, ignore_errors=True)
    return Store(folder, lambda: config.cache.mkdir(_KEPT))


class LongLived:
    """Leaves what lives to the end of a run out of garbage collection: tests, models, answers.

    Garbage is looked for less often as well: a run makes hundreds of thousands of objects that
    stay. A quarter of its time went into looking at them again and again. Garbage collection has
    all objects back after pytest's own last collections, for a process that goes on, as after
    `pytest.main`. When Python ends, no object is looked at again, which took up to 3 s: the system
    frees all memory at once.
    """

    def __init__(self, config: pytest.Config) -> None:
        config.add_cleanup(gc.unfreeze)
        before = gc.get_threshold()
        config.add_cleanup(partial(gc.set_threshold, *before))
        if gc.isenabled() and before[0]:
            gc.set_threshold(max(before[0], _NEW_OBJECTS), *before[1:])
        atexit.register(gc.freeze)
        self._config, self._has_torch = config, False

    def pytest_collection_finish(self) -> None:
        gc.freeze()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """Find garbage once: pytest looks for it five times, and now finds only what is new."""
        gc.collect()
        gc.freeze()

    def pytest_runtest_logfinish(self) -> None:
        """After the first test that imports torch, see to its loggers."""
        if not self._has_torch and "torch" in sys.modules:
            self._has_torch = True
            self._config.add_cleanup(share_handler())


def check_choices(config: pytest.Config) -> None:
    """Raise an error if an option has a value that it does not take.

    Raises:
        pytest.UsageError: It has, names a file that is not there, or hides pytest's configuration.
        MoERoutingError: No simulated kernel has the fault that is named.
    """
    _check_paths(config)
    if kernels := option(config, "kernels"):
        from pytest_moe_routing.kernels.routers import kernel_choices

        _check(config, "kernels", *kernel_choices())
        if kernels.startswith("simulator:") and util.find_spec("torch"):
            from pytest_moe_routing.kernels.library import fault_of

            fault_of(kernels)
        path = kernels.partition("@")[2]
        if path and not Path(path).expanduser().exists():
            raise pytest.UsageError(f"--moe-kernels {kernels}: no such file or directory")
    _check(config, "scale", "reduced|full", "reduced or full")


def _check_paths(config: pytest.Config) -> None:
    """Raise an error if pytest has looked for its configuration where an option has a path.

    Pytest reads its configuration before it knows the options of plugins, and takes an existing
    path after a space for a path of tests.

    Raises:
        pytest.UsageError: The configuration may be another one than that of the working directory.
    """
    here, args = config.invocation_params.dir, config.invocation_params.args
    is_told = config.option.inifilename or config.args_source is config.ArgsSource.ARGS
    if is_told or hasattr(config, "workerinput"):
        return
    for name, value in pairwise(map(str, args)):
        if name not in _PATHS or not (here / value).exists():
            continue
        own = next(filter(_has_configuration, (here, *here.parents)), None)
        if own == (config.inipath and config.inipath.parent):
            continue
        raise pytest.UsageError(
            f"{name} {value}: write {name}={value}; after a space, pytest takes an existing path "
            "for a path of tests, and has looked there for its configuration "
            f"(found {config.inipath or 'none'})"
        )


def _has_configuration(folder: Path) -> bool:
    """Return whether pytest would take its configuration from a folder."""
    if any((folder / name).is_file() for name in ("pytest.ini", ".pytest.ini")):
        return True
    return any(
        section in (folder / name).read_text("utf-8", "replace")
        for name, section in _SECTIONS.items()
        if (folder / name).is_file()
    )


def _check(config: pytest.Config, name: str, values: str, told: str) -> None:
    value = option(config, name)
    if value and not re.fullmatch(values, value):
        raise pytest.UsageError(f"--moe-{name}: found {value!r}, expected {told}")


def add_markers(config: pytest.Config) -> None:
    """Register the markers."""
    config.addinivalue_line(
        "markers",
        "gpu(kernels=None): needs an NVIDIA GPU and FlashInfer, and is skipped without them; "
        "kernels ('routing', 'fused') are built before the test",
    )
    config.addinivalue_line(
        "markers",
        "sweep: tests of routers that no model has; left out of runs limited to some models",
    )
    config.addinivalue_line(
        "markers",
        "moe_models(*patterns, distinct_routers=False, distinct_layers=False, published=False): "
        "run with each model whose id matches a pattern; with distinct_routers, with one model for "
        "each router; with distinct_layers, with one for each size and activation of the experts; "
        "with published, only in the schemes of the model's published checkpoints",
    )
