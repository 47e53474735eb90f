"""Kernels of a library in a process of their own: what ends it, and what a run is told of that."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from pytest_moe_routing.errors import TargetError, Unsupported
from pytest_moe_routing.kernels import gpu, process
from pytest_moe_routing.kernels.process import RouterProcess
from pytest_moe_routing.models import load_models
from pytest_moe_routing.suite.test_gpu_router import test_router_kernel as suite_test
from pytest_moe_routing.targets import probe
from pytest_moe_routing.targets.probe import Limits

MODELS = load_models(Path(__file__).parent.parent / "golden")
#: Adapters whose kernels do, for a model's router, what its number of experts says.
ADAPTERS = """
import os, time
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.kernels.routers import RouterCall, RouterKernels
from pytest_moe_routing.reference.routing import route
from pytest_moe_routing.routing import recipe_of

class Toy(RouterKernels):
    name = "toy"
    device = "cpu"

    def environment(self):
        return {"gpu": "none", "path": str(self.path), "home": os.environ["HOME"],
                "cache": os.environ["TRITON_CACHE_DIR"], "device": os.environ.get("CUDA_TOY")}

    def calls(self, router):
        recipe = recipe_of(router)
        def run(logits, bias):
            if router.num_experts == 8:
                os.abort()
            if router.num_experts == 16:
                time.sleep(600)
            if router.num_experts == 60:
                raise RuntimeError("no such tile")
            routing = route(logits, recipe, bias)
            scale = 2 if router.num_experts == 64 else 1
            return routing.topk_weights * scale, routing.topk_ids.int()
        if router.num_experts != 32:
            yield RouterCall("toy_topk", recipe, run)

class OnDevice(Toy):
    device = "cuda"

class Unfit(Toy):
    def __init__(self, path):
        raise Unsupported("torch 2.4 does not load toy.so: undefined symbol")

class Broken(Toy):
    def __init__(self, path):
        os.abort()
"""


def of(experts):
    return next(m for m in MODELS.values() if m.router.num_experts == experts)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A function that makes the process of one of the adapters, with a short deadline."""
    (tmp_path / "toy_kernels.py").write_text(ADAPTERS)
    points = textwrap.dedent("""
        [moe_routing.kernels]
        toy = toy_kernels:Toy
        on-device = toy_kernels:OnDevice
        unfit = toy_kernels:Unfit
        broken = toy_kernels:Broken
    """)
    info = tmp_path / "toy_kernels-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-kernels\nVersion: 1\n")
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gpu, "has_driver", lambda: True)
    monkeypatch.setattr(gpu, "device_count", lambda: 1)
    made = []

    def make(name, seconds=60.0):
        monkeypatch.setattr(probe, "LIMITS", Limits(seconds))
        made.append(RouterProcess(name))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_run_goes_on_when_a_kernel_ends_its_process(toy, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("CUDA_TOY", "3")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    kernels = toy("toy@some.whl")
    # Paths are those of this process, and CUDA's variables and caches; the home is not.
    seen = kernels.environment
    assert (seen["path"], seen["device"]) == (str(tmp_path / "here" / "some.whl"), "3")
    assert seen["cache"] == str(tmp_path / "triton")
    assert seen["home"] != str(Path.home())

    right = {"kernels": ["toy_topk"], "problems": []}
    assert kernels.compare(of(128).router, "plain", "bfloat16") == right
    assert kernels.compare(of(32).router, "plain", "float32") == {"kernels": [], "problems": []}
    (problem,) = kernels.compare(of(64).router, "plain", "float32")["problems"]
    assert problem.startswith("toy_topk, 1 tokens: 1/1 tokens (100.0 %) are routed wrongly")
    with pytest.raises(TargetError, match="RuntimeError: no such tile"):
        kernels.compare(of(60).router, "plain", "float32")
    with pytest.raises(pytest.fail.Exception) as failed:
        suite_test(kernels, of(8), "plain", "float32")
    assert "its process ended with -6; its last words:\nFatal Python error: Aborted" in str(
        failed.value
    )
    assert "RouterCall" not in str(failed.value)
    # A new process answers, twice; the library that ended three is not loaded again.
    assert kernels.compare(of(256).router, "plain", "float32") == right
    for _ in range(2):
        with pytest.raises(TargetError, match="Aborted"):
            kernels.compare(of(8).router, "near-ties", "float32")
    with pytest.raises(
        Unsupported, match=r"toy@some\.whl ended 3 times, and will not be restarted"
    ):
        kernels.compare(of(256).router, "saturated", "float32")


def test_a_kernel_that_hangs_ends_with_its_process(toy):
    kernels = toy("toy", seconds=8.0)
    with pytest.raises(TargetError, match=r"no answer within 8 s; its process was ended"):
        kernels.compare(of(16).router, "plain", "float32")


def test_a_fault_of_the_device_ends_the_process(toy):
    """Without a GPU every use of it fails, and so does the question whether it still works."""
    kernels = toy("on-device")
    with pytest.raises(TargetError, match=r"process ended with 1; its last words:\ndevice fault: "):
        kernels.compare(of(128).router, "plain", "float32")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unfit", "unfit: torch 2.4 does not load toy.so: undefined symbol"),
        ("broken", "its process ended with -6"),
        ("nothing", "compiled routers need --moe-kernels broken or on-device or sglang or toy"),
    ],
)
def test_a_library_that_does_not_load_is_not_judged(toy, name, words):
    found = process.find(name)
    assert isinstance(found, str)
    assert words in found


def test_without_a_driver_nothing_is_started(toy, monkeypatch):
    monkeypatch.setattr(gpu, "has_driver", lambda: False)
    assert process.find("toy") == "no NVIDIA driver: libcuda.so.1 is not there"
