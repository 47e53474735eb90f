"""Kernels are built once and one at a time; workers share GPUs and cores."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
from fake_gpu import FAKE_GPU

BUILDS = """
import time
from pathlib import Path

LOG = Path(__file__).with_name("builds.log")

def note(text):
    with LOG.open("a") as log:
        log.write(text + "\\n")

def build():
    note("begin")
    time.sleep(0.5)
    note("end")

def build_that_fails():
    note("failed")
    raise RuntimeError("nvcc is not here")
"""


def builds(host, builder, *args):
    """Run eight tests that call `builder`'s kernels; the result, and what was built."""
    host.makepyfile(fake_kernels=BUILDS)
    host.makeconftest(
        FAKE_GPU
        + f"build.BUILDERS = {{'routing': ('fake_kernels', '{builder}')}}\n"
        + f"build.lock_path = lambda: build.Path({str(host.path)!r}) / 'lock'\n"
        + "build.SAY_EVERY = 0.1\n"
    )
    host.makepyfile(
        test_host=f"""
        import fake_kernels, pytest

        @pytest.mark.gpu(kernels="routing")
        @pytest.mark.parametrize("n", range(8))
        def test_kernel(moe_gpu, n):
            if "fails" in "{builder}":
                fake_kernels.{builder}()
        """
    )
    result = host.runpytest_subprocess(*args)
    return result, (host.path / "builds.log").read_text().split()


def test_workers_build_one_at_a_time_and_before_the_tests(host):
    result, built = builds(host, "build", "-n", "3", "--durations=0")
    result.assert_outcomes(passed=8)
    assert built == ["begin", "end"] * 3
    result.stderr.fnmatch_lines(
        ["moe-routing: gw? waits to build fake_kernels.build: *lock, held by gw? (process *"]
    )
    took = re.findall(r"^([0-9.]+)s (setup|call)", result.stdout.str(), re.M)
    assert [phase for seconds, phase in took if float(seconds) >= 0.5] == ["setup"] * 3


def test_a_build_that_fails_is_not_tried_by_every_test(host):
    result, built = builds(host, "build_that_fails", "-p", "no:xdist")
    result.assert_outcomes(failed=8)
    assert built == ["failed"]
    assert result.stdout.str().count("E   ") == 8
    result.stdout.fnmatch_lines(["*RuntimeError: nvcc is not here"])


def test_the_wait_for_a_build_ends(tmp_path, monkeypatch):
    from pytest_moe_routing.errors import MoERoutingError
    from pytest_moe_routing.kernels import build

    monkeypatch.setattr(build, "PATIENCE", 0.5)
    held = build.one_at_a_time(tmp_path / "lock", "one", 2)
    wanted = build.one_at_a_time(tmp_path / "lock", "two", 2)
    with held, pytest.raises(MoERoutingError, match=r"build two: .*, which builds one"), wanted:
        pass
    with build.one_at_a_time(tmp_path / "lock", "two", 2):
        pass


def test_a_build_that_hangs_ends_its_worker(host):
    host.makepyfile(fake_kernels="import time\ndef build(): time.sleep(60)")
    host.makeconftest(
        FAKE_GPU
        + "gpu.STUCK_AFTER = 1.0\nbuild.BUILDERS = {'routing': ('fake_kernels', 'build')}\n"
        + f"build.lock_path = lambda: build.Path({str(host.path)!r}) / 'lock'\n"
    )
    host.makepyfile(
        test_host="import pytest\n@pytest.mark.gpu(kernels='routing')\ndef test_kernel(moe_gpu): pass"
    )
    result = host.runpytest_subprocess("-n", "1", "--max-worker-restart", "0")
    assert result.ret != 0
    result.stderr.fnmatch_lines(["Timeout*", '*fake_kernels.py", line 2 in build'])


# -- placement --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("worker", "mask", "count", "device"),
    [
        ("gw0", None, 4, "0"),
        ("gw5", None, 4, "1"),
        ("gw1", "2,3", 4, "3"),
        ("gw1", "GPU-a,GPU-b", 8, "GPU-b"),
        ("gw3", None, 1, None),
        ("gw3", "6", 8, "6"),
        ("gw3", "", 8, ""),
        (None, None, 4, None),
    ],
)
def test_each_worker_gets_its_gpu(worker, mask, count, device):
    from pytest_moe_routing.kernels.gpu import place_worker

    environ = {"PYTEST_XDIST_WORKER": worker, "CUDA_VISIBLE_DEVICES": mask}
    environ = {key: value for key, value in environ.items() if value is not None}
    place_worker(environ, count)
    assert environ.get("CUDA_VISIBLE_DEVICES") == device


@pytest.mark.parametrize(("prebuilt", "told"), [("/prebuilt", "/prebuilt"), (None, "/jit")])
def test_a_report_tells_where_the_kernels_are_from(monkeypatch, prebuilt, told):
    from pytest_moe_routing.kernels import build
    from pytest_moe_routing.kernels.hopper import PREBUILT

    parts = {
        "flashinfer.jit.env": SimpleNamespace(FLASHINFER_JIT_DIR="/jit"),
        "flashinfer.artifacts": SimpleNamespace(),
    }
    monkeypatch.setattr(build, "import_module", parts.__getitem__)
    monkeypatch.delenv(PREBUILT, raising=False)
    if prebuilt:
        monkeypatch.setenv(PREBUILT, prebuilt)
    assert build.software.__wrapped__()["kernels"] == told


@pytest.mark.parametrize(("workers", "threads"), [(None, 8), ("3", 2), ("16", 1)])
def test_workers_share_the_cores(monkeypatch, workers, threads):
    import torch

    from pytest_moe_routing.kernels import gpu

    if workers:
        monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", workers)
    else:
        monkeypatch.delenv("PYTEST_XDIST_WORKER_COUNT", raising=False)
    given = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    gpu.share_cores()
    assert given == [threads]
