"""For the tests of this repository. The plugin itself is loaded through its entry point."""

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from zipimport import zipimporter

import forked_pytest
import pytest
from hypothesis import settings

# The same examples in every run: a test that fails fails for everybody.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(autouse=True)
def _not_a_worker(monkeypatch):
    """Inner pytest runs must not take themselves for workers of the outer one.

    In CI pytest repeats whole messages in its short summary, which would be counted twice.
    """
    for name in (
        "PYTEST_XDIST_WORKER",
        "CI",
        "BUILD_NUMBER",
        "GITHUB_ACTIONS",
        "GITHUB_STEP_SUMMARY",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def _no_finders_of_wheels():
    """Each package of a wheel has a finder, and `invalidate_caches` reads the wheel for each.

    Hundreds of them, of tests that read a framework in this process, cost every later test that
    calls `monkeypatch.syspath_prepend` or `pytester.runpytest_inprocess` three to five seconds.
    """
    yield
    for path, finder in list(sys.path_importer_cache.items()):
        if isinstance(finder, zipimporter):
            del sys.path_importer_cache[path]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Workers share the cores: threads that wait for each other made runs ten times slower."""
    with warnings.catch_warnings():
        # Without numpy, torch says so, and is left half-initialized if that is an error.
        warnings.simplefilter("ignore")
        import torch

    torch.set_num_threads(1)
    # And in the processes that tests start.
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def cold(pytester):
    """`pytester` with processes that import everything themselves, which takes each two seconds."""
    del pytester.runpytest_subprocess
    return pytester


@pytest.fixture
def pytester(pytester):
    """Its subprocesses are forks, so that they need not import torch; see `cold`."""
    pytester.runpytest_subprocess = partial(forked_pytest.runpytest, pytester)
    return pytester


@pytest.fixture
def host(pytester, monkeypatch):
    """An unrelated repository, with tests and a conftest of its own."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    pytester.makepyfile(test_host="def test_of_the_host(): pass")
    pytester.makeconftest("HOST = True")
    pytester.makeini("[pytest]\npython_files = test_host.py\nfilterwarnings = error\n")
    return pytester
