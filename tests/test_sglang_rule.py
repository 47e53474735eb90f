"""Which function of a made SGLang keeps the kernel from routing, or names another runner."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import dataclass

import pytest

from pytest_moe_routing.targets.sglang.probe import world
from pytest_moe_routing.targets.sglang.probe.rule import rule, runner_rules

LAYER = """
def is_known(config):
    return True

def is_fused(config):
    return False

def is_small(config):
    return False

class Layer:
    def is_new(self):
        return False

    def forward(self, config):
        return select_experts(config)
"""
MODULE = "sglang.srt.layers.moe"
FORWARD = {"name": "Layer.forward", "source": f"{MODULE.replace('.', '/')}.py:16", "instead": ""}
FUSED = {"name": "is_fused", "source": f"{MODULE.replace('.', '/')}.py:6", "instead": ""}


@dataclass
class TopKConfig:
    top_k: int = 2


class Names:
    """The names of a release that has a config of TopK, or has none."""

    def __init__(self, *, config=True):
        self.config = config

    def has(self, key):
        assert key == "router-topk-config"
        return self.config

    def get(self, key):
        return TopKConfig


def code(name, text=LAYER):
    """What a module of this name defines."""
    namespace = {"__name__": name, "select_experts": world.select_experts}
    exec(compile(text, "layer.py", "exec"), namespace)
    return namespace


OURS, TORCH = code(MODULE), code("torch.nn")
CONFIG = TopKConfig()


@pytest.mark.parametrize(
    ("steps", "answer"),
    [
        ([("is_known", CONFIG), ("forward", CONFIG)], FORWARD),
        ([("is_fused", CONFIG), ("is_known", CONFIG), ("forward", CONFIG)], FUSED),
        ([("is_small", CONFIG), ("is_fused", CONFIG), ("forward", CONFIG)], FUSED),
        # Not about a config of TopK, or none of SGLang's code.
        ([("is_fused", 8), ("is_new",), ("forward", CONFIG)], FORWARD),
        ([(TORCH["is_fused"], CONFIG), ("forward", CONFIG)], FORWARD),
        # What is asked after routing has no part in it.
        ([("forward", CONFIG), ("is_fused", CONFIG)], FORWARD),
        ([("is_known", CONFIG)], None),
    ],
)
def test_what_has_another_router_route(steps, answer):
    layer = OURS["Layer"]()

    def run():
        for step, *arguments in steps:
            function = step if callable(step) else OURS.get(step) or getattr(layer, step)
            with suppress(world.RoutedOutside):
                function(*arguments)

    assert rule(Names(), run) == answer
    assert sys.getprofile() is None


def test_a_release_without_such_configs_is_known_by_its_own_router():
    def run():
        OURS["is_fused"](CONFIG)
        with suppress(world.RoutedOutside):
            OURS["Layer"]().forward(CONFIG)

    assert rule(Names(config=False), run) == FORWARD


class ServerNames:
    """The names of a release that has a function by which others declare, or has none."""

    def __init__(self, declare=None):
        self.declare = declare

    def expects(self, key):
        assert key == "overrides-declare"
        return self.declare is not None

    def get(self, key):
        return self.declare


OVERRIDES = """
def declare(server, **fields):
    server.update(fields)

def of_pass(server, function):
    declare(server, **function(1))

def of_hook(server):
    declare(server, attention=1)
    declare(server, moe_runner_backend="deep_gemm")

def of_model(names):
    return {"moe_runner_backend": "triton"} if names else {"quantization": "fp8"}

def of_all(names):
    return {"attention": 1} if not names else {"moe_runner_backend": "auto"}

def of_none(names):
    return {"attention": 1}
"""


def test_functions_that_may_name_a_runner_are_told_in_order():
    functions = code("sglang.srt.overrides", OVERRIDES)

    def choose():
        functions["of_model"](0)
        functions["of_all"](1)
        functions["of_none"](1)
        functions["of_model"](1)

    named = [("of_model", 13, ""), ("of_all", 16, "auto"), ("of_model", 13, "triton")]
    assert runner_rules(ServerNames(), choose) == [
        {"name": name, "source": f"sglang/srt/overrides.py:{line}", "instead": runner}
        for name, line, runner in named
    ]


def test_a_function_that_declares_a_runner_is_told_once():
    functions, server = code("sglang.srt.overrides", OVERRIDES), {}

    def choose():
        functions["of_pass"](server, functions["of_model"])
        functions["of_hook"](server)

    named = [("of_model", 13, "triton"), ("of_hook", 10, "deep_gemm")]
    assert runner_rules(ServerNames(functions["declare"]), choose) == [
        {"name": name, "source": f"sglang/srt/overrides.py:{line}", "instead": runner}
        for name, line, runner in named
    ]


def test_nothing_is_watched_after_an_error():
    def fail():
        raise RuntimeError("no server")

    with pytest.raises(RuntimeError, match="no server"):
        runner_rules(ServerNames(), fail)
    assert sys.getprofile() is None
