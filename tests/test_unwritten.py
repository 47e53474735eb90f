"""A method that nobody wrote is not a crash of the framework that has it."""

from __future__ import annotations

import runpy
from contextlib import nullcontext

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.probe import capture

EXPERTS = """
class Base(Module):
    def apply(self):
        "What a subclass defines."
        raise NotImplementedError

    def forward(self):
        raise NotImplementedError

class Experts(Base):
    def run(self):
        return self.apply()

    def check(self):
        raise NotImplementedError("no such layout")

    def operator(self):
        return cudnn(ones, ones)

    def part(self):
        return Module()()
"""


@pytest.fixture
def experts(tmp_path, monkeypatch):
    """Experts of a vLLM, by method; `""` runs the module itself."""
    monkeypatch.setattr(capture, "on_one_gpu", nullcontext)
    path = tmp_path / "vllm/experts.py"
    path.parent.mkdir()
    path.write_text(EXPERTS)
    given = {"Module": torch.nn.Module, "cudnn": torch.cudnn_grid_sampler, "ones": torch.ones(1)}
    made = runpy.run_path(str(path), given)["Experts"]()
    return lambda name: getattr(made, name) if name else made


@pytest.mark.parametrize(
    ("method", "line", "says"),
    [
        ("apply", 5, "raise NotImplementedError"),
        ("", 8, "raise NotImplementedError"),
        ("operator", 18, "Could not run 'aten::cudnn_grid_sampler'"),
        ("part", 21, "Module [Module] is missing the required"),
    ],
)
def test_missing_code_is_not_judged(experts, method, line, says):
    """Whether it is an abstract method that the probe called, or code that only a GPU has."""
    with pytest.raises(Unsupported) as reason:
        capture.recorded(experts(method), {}, "Method.apply")
    place = f"vllm/experts.py:{line}: NotImplementedError: {says}"
    start = f"not judged: Method.apply called code that is not implemented ({place}"
    assert str(reason.value).startswith(start)


@pytest.mark.parametrize(
    ("method", "where", "message", "function"),
    [
        ("check", "vllm/experts.py:15", "no such layout", "check"),
        ("run", "vllm/experts.py:5", "raise NotImplementedError", "apply"),
    ],
)
def test_what_a_release_calls_and_rejects_itself_is_a_crash(
    experts, method, where, message, function
):
    raised = {"type": "NotImplementedError", "message": message, "where": where}
    raised["code"] = f"NotImplementedError-in-experts.py-{function}"
    assert capture.recorded(experts(method), {}, "Method.apply") == {"raised": raised}
