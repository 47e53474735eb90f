"""Runs pytest as a process of its own, without the two seconds that a start takes.

The process is a fork, in which torch, pytest and its plugins are imported already. The package and
the tests' modules are imported again there, and nothing is left of the outer run's streams, open
files, hooks and warning filters.
"""

from __future__ import annotations

import atexit
import io
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path

import pytest
from _pytest.assertion.rewrite import AssertionRewritingHook

TESTS = Path(__file__).parent
#: Packages that are imported again; xdist keeps the `sys.path` of its import for its workers.
AGAIN = {"pytest_moe_routing", "xdist"}
#: Of the paths of modules that belong to Python or are installed.
INSTALLED = {"site-packages", "dist-packages", "lib", "lib64"}
#: What Python ignores at its start.
IGNORED = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def runpytest(pytester, *args):
    """As `pytester.runpytest_subprocess`, without its timeout."""
    number = len(list(pytester.path.glob("runpytest-*")))
    plugins = [f"-p{plugin}" for plugin in pytester.plugins]
    command = [*plugins, f"--basetemp={pytester.path / f'runpytest-{number}'}", *map(str, args)]
    files = [pytester.path / name for name in ("stdout", "stderr")]
    started = time.perf_counter()
    with warnings.catch_warnings():
        # From Python 3.12 on: a worker of xdist has a second thread.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if not pid:
        _child(command, *files)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    texts = [file.read_text("utf-8") for file in files]
    for text, stream in zip(texts, (sys.stdout, sys.stderr), strict=True):
        stream.write(text)
    if status in list(pytest.ExitCode):
        status = pytest.ExitCode(status)
    lines = (text.splitlines() for text in texts)
    return pytest.RunResult(status, *lines, time.perf_counter() - started)


def _child(command, *files):
    """Run pytest, and end this process."""
    status = 70
    try:
        _redirect(*files)
        _forget()
        sys.argv[:] = [pytest.__file__, *command]
        status = int(pytest.main(command))
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect(*files):
    """Read nothing, write to these files, and close everything else that is open."""
    opened = [os.open(os.devnull, os.O_RDONLY)]
    opened += [os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) for file in files]
    for number, descriptor in enumerate(opened):
        os.dup2(descriptor, number)
    os.closerange(3, 4096)
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.FileIO(0, closefd=False))
    sys.stdout = sys.__stdout__ = _written(1, "strict")
    sys.stderr = sys.__stderr__ = _written(2, "backslashreplace")


def _written(number, errors):
    raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    return io.TextIOWrapper(raw, "utf-8", errors, line_buffering=number == 2)


def _forget():
    """Reset what a new process would not inherit from the outer run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    atexit._clear()
    logging.root.handlers.clear()
    logging.root.setLevel(logging.WARNING)
    warnings.resetwarnings()
    for category in IGNORED:
        warnings.simplefilter("ignore", category)
    os.environ.pop("PYTEST_CURRENT_TEST", None)
    first = [str(Path.cwd()), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(first)
    others = [path for path in sys.path if Path(path) != TESTS and path not in first]
    sys.path[:] = [*first, *others]
    sys.path_importer_cache.clear()
    sys.meta_path[:] = [f for f in sys.meta_path if not isinstance(f, AssertionRewritingHook)]
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in AGAIN or (file and not INSTALLED & {*Path(file).parts}):
            del sys.modules[name]
