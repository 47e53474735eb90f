"""Wheels of SGLang as targets, for fixtures."""

from __future__ import annotations

import pytest
from wheels import wheels_since

from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.targets.sglang.target import SglangTarget
from pytest_moe_routing.targets.source import Source


def params(wheels):
    """Parameters of a fixture that has a target of each wheel, or a skip."""
    return {"params": wheels or [None], "ids": lambda path: path.name if path else "-"}


def oldest_and_newest():
    """Parameters for the first and the last wheel whose code is asked."""
    wheels = wheels_since("0.5.18", "sglang")
    return params(sorted({wheels[0], wheels[-1]}) if wheels else [])


def opened(path):
    """Yield the target of a wheel, and close it."""
    if path is None:
        pytest.skip("MOE_WHEELS has no SGLang whose code is asked")
    source = Source.at("sglang", path)
    target = SglangTarget(FlashInfer.of(source.flashinfer), source)
    yield target
    target.close()
