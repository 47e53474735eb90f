"""Wheels are found by distribution and exact version, in every folder."""

from __future__ import annotations

import os

import pytest
from wheels import find_wheel, wheels_since


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("sglang-0.4.3.post2", "sglang-0.10.0", "sglang-0.9.1", "vllm-0.9.1"):
        (tmp_path / f"{name}-py3-none-any.whl").touch()
    monkeypatch.setenv("MOE_WHEELS", f"{tmp_path / 'empty'}{os.pathsep}{tmp_path}")


def test_one(tmp_path, monkeypatch):
    assert find_wheel("sglang 0.4.3.post2") == tmp_path / "sglang-0.4.3.post2-py3-none-any.whl"
    assert find_wheel("sglang 0.4.3") is None
    monkeypatch.delenv("MOE_WHEELS")
    assert find_wheel("sglang 0.4.3.post2") is None


def test_all_from_a_release_on():
    found = wheels_since("0.5", "sglang", "vllm")
    assert [wheel.name.split("-py3")[0] for wheel in found] == [
        "sglang-0.9.1",
        "vllm-0.9.1",
        "sglang-0.10.0",
    ]
