"""Gates and selectors of vLLM on each Blackwell device, and ranks that have other tokens."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.vllm.probe import (
    blocks,
    choice,
    devices,
    release,
    sequence_parallel,
)
from pytest_moe_routing.targets.vllm.probe.apart import Apart, Linear, SplitLinear

PLATFORM = release._Blackwell()


def test_a_platform_is_asked_for_its_capability_in_each_way():
    def answers():
        return (
            PLATFORM.is_device_capability(100),
            PLATFORM.is_device_capability((10, 3)),
            PLATFORM.is_device_capability_family(100),
            PLATFORM.is_device_capability_family(120),
            PLATFORM.has_device_capability(103),
            PLATFORM.has_device_capability((9, 0)),
            PLATFORM.get_device_capability().to_int(),
        )

    assert answers() == (True, False, True, False, False, True, 100)
    with release.on_device(10, 3):
        assert answers() == (False, True, True, False, True, True, 103)
    assert answers()[0]


def family():
    return PLATFORM.is_device_capability_family(100)


def one_device():
    return PLATFORM.is_device_capability(100)


def all_gates():
    """Ask all gates at once."""


def select(config):
    """Take experts."""


@pytest.fixture
def asked(monkeypatch):
    """Ask with a gate of monolithic and one of modular experts, and with what a selector takes."""
    forgotten = []

    def ask(
        monolithic, modular, takes=lambda: "Experts by default", *, has_modular=True, together=None
    ):
        def gates(model, scheme, method, is_modular):
            if is_modular and not has_modular:
                raise Unsupported("no modular experts")
            gate = modular if is_modular else monolithic
            whole = gate() and (together or gate)()
            return [["device", gate(), "no"], ["is_supported_config", whole, "no"]]

        monkeypatch.setattr(devices, "gates", gates)
        kinds = (monolithic, modular)
        monkeypatch.setattr(
            devices,
            "function_of",
            lambda _scheme, gate, *, modular: kinds[modular] if gate == "device" else all_gates,
        )
        selector = SimpleNamespace(function=select)
        monkeypatch.setattr(devices, "selector_of", lambda *_: selector)
        monkeypatch.setattr(devices, "default_experts", lambda _: takes())
        monkeypatch.setattr(choice, "forget", lambda: forgotten.append(one_device()))
        answer = devices.other_device({}, "nvfp4", "DeepSeekV3")
        # What functions have cached is forgotten before and after, and the device is back.
        assert forgotten[-2:] == [True, True]
        return answer["answer"], answer["why"], answer["source"]

    return ask


def test_gates_that_accept_both(asked):
    usual = ("honored", "all gates and the selector answer as on 10.0", "")
    assert asked(family, family) == usual
    assert asked(family, one_device, has_modular=False) == usual


def test_a_gate_that_accepts_one_is_named_without_those_that_ask_it(asked):
    for gates in ((one_device, family), (family, one_device), (one_device, one_device)):
        answer, why, source = asked(*gates)
        assert (answer, why) == ("ignored", "one_device answers yes on 10.0 and no on 10.3")
        assert "test_devices.py:" in source


def test_all_gates_at_once_are_named_if_no_single_one_differs(asked):
    answer = asked(family, family, lambda: "A" if one_device() else "B", together=one_device)
    assert answer[:2] == ("ignored", "all_gates answers yes on 10.0 and no on 10.3")


def test_a_selector_that_takes_other_experts(asked):
    taken = asked(family, family, lambda: "A" if one_device() else "B")
    assert taken[:2] == ("ignored", "select answers A on 10.0 and B on 10.3")


class Shared(torch.nn.Module):
    def __init__(self, **linear):
        super().__init__()
        self.gate = Linear(4, 1)
        self.up, self.down = SplitLinear(4, 8, **linear), SplitLinear(8, 4, **linear)


@pytest.fixture
def split(monkeypatch):
    """What is split of the shared experts with which a block makes its layer."""
    world = object.__new__(Apart)
    world.names = SimpleNamespace(require=lambda question: None)
    parallel = SimpleNamespace(use_sequence_parallel_moe=False)
    vars(world)["vllm_config"] = SimpleNamespace(parallel_config=parallel)
    monkeypatch.setattr(sequence_parallel, "world", lambda: world)

    def ask(shared, *, nested=False):
        def build(row, values, _run):
            given = {
                "shared_experts": shared,
                "is_sequence_parallel": parallel.use_sequence_parallel_moe,
            }
            arguments = {"kwargs": given} if nested else given
            layers = [SimpleNamespace(arguments=arguments)]
            return blocks.Block("a.Block", "", torch.nn.Module(), layers)

        monkeypatch.setattr(blocks, "build", build)
        found = sequence_parallel.split_shared_experts({}, {})
        # Other questions are asked of a server without ranks.
        assert not parallel.use_sequence_parallel_moe
        assert found["block"] == "a.Block"
        return found["layers"]

    return ask


def test_shared_experts_are_whole_where_ranks_have_other_tokens(split):
    assert split(Shared()) == ["up", "down"]
    assert split(Shared(), nested=True) == ["up", "down"]
    assert split(Shared(disable_tp=True)) == []
    assert split(None) == []


def test_ranks_that_gather_their_tokens_may_split_them(split):
    shared = Shared()
    shared.shard_sequence_parallel = True
    assert split(shared) == []


def test_shared_experts_of_a_stub_are_not_judged(split):
    with pytest.raises(Unsupported, match="Block builds its shared experts of a stub"):
        split(object())


def test_an_installed_vllm_is_not_asked(monkeypatch):
    monkeypatch.setattr(sequence_parallel, "world", object)
    with pytest.raises(Unsupported, match="needs a vLLM apart from its dependencies"):
        sequence_parallel.split_shared_experts({}, {})
