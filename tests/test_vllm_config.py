"""What vLLM's configs are told in each scheme, and the stand-ins around what is made with them."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict

import pytest
import torch

from pytest_moe_routing.flashinfer import known_releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_model
from pytest_moe_routing.targets.contract import Contract
from pytest_moe_routing.targets.vllm.probe import (
    choice,
    config,
    gates,
    main,
    other_experts,
    routers,
    weight_on_input,
)
from pytest_moe_routing.targets.vllm.probe.experts import SCHEMES
from pytest_moe_routing.targets.vllm.probe.ranks import Ranks
from pytest_moe_routing.targets.vllm.probe.world import Installed

WEIGHTS = {"w1_scale", "w2_scale"}
#: Where the scales of weights are not swizzled, the config says so.
SCALED = {*WEIGHTS, "is_scale_swizzled", "is_nvfp4_scale_swizzled"}
#: By scheme: what quantizes activations and weights, the block, and what else the config has.
TOLD = {
    "fp8_block": (torch.float8_e4m3fn, None, [128, 128], SCALED),
    "fp8_per_tensor": (torch.float8_e4m3fn, None, None, {*SCALED, "a1_scale", "a2_scale"}),
    "mxfp8": ("mxfp8", None, [1, 32], SCALED),
    "nvfp4": (
        "nvfp4",
        None,
        None,
        {*SCALED, "g1_alphas", "g2_alphas", "a1_gscale", "a2_gscale"},
    ),
    "bf16": (None, None, None, set()),
    "mxfp4": ("mxfp8", "mxfp4", None, SCALED),
    "mxint4": (None, "int4", [0, 32], SCALED),
}


class Release:
    """A release whose quantization config is a plain mapping, and takes everything."""

    def get(self, key):
        return dict

    def accepted(self, key, arguments):
        return arguments


@pytest.fixture(autouse=True)
def _release(monkeypatch):
    monkeypatch.setattr(config, "names", Release)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_scheme(scheme):
    told = config.quant_config(SCHEMES[scheme], 4)
    *formats, more = TOLD[scheme]
    assert [told.pop(key) for key in ("quant_dtype", "weight_dtype", "block_shape")] == formats
    assert told.keys() == more
    # Scales of activations are one number, those of weights are blocks, all others are one for each
    # expert; all of them are 1.
    scales = {key: value for key, value in told.items() if not key.startswith("is_")}
    shapes = {"a1_scale": (), "a2_scale": (), "w1_scale": (4, 1, 1), "w2_scale": (4, 1, 1)}
    for key, value in scales.items():
        assert torch.equal(value.float(), torch.ones(shapes.get(key, 4)))
    wanted = torch.bfloat16 if scheme == "mxint4" else torch.float32
    assert {scales[key].dtype for key in WEIGHTS & scales.keys()} <= {wanted}
    assert not any(told[key] for key in told.keys() - scales.keys())


@pytest.mark.parametrize(
    ("kind", "field"),
    [("method-", "methods"), ("hands-", "modular_methods"), ("select-", "selector")],
)
def test_the_contract_names_for_a_scheme_what_serves_it(kind, field):
    """The table of the probe and the contract, which state it twice."""
    rows = Contract.of("vllm").rows.items()
    said = {(k, scheme) for k, row in rows if k.startswith(kind) for scheme in row.schemes or ()}
    said = {(key, scheme) for key, scheme in said if not set(".(") & set(key)}
    used = {scheme: getattr(row, field) for scheme, row in SCHEMES.items()}
    listed = {s: (keys,) if isinstance(keys, str) else keys for s, keys in used.items()}
    # What selects GPT-OSS's MXFP4 is chosen by its architecture.
    assert {(key, scheme) for scheme, keys in listed.items() for key in keys} == said - {
        ("select-gpt-oss-mxfp4", "mxfp4")
    }


def test_operators_that_a_stand_in_does_not_have_are_not_there():
    """A stand-in without one is no reason to pass over what vLLM asks of it."""
    operators = weight_on_input._Operators(torch.zeros(2, 1), 4)
    assert operators.cutlass_fp4_moe_mm
    for stand_in in (operators, routers._Cpu()):
        with pytest.raises(AttributeError, match="cutlass_blockscaled"):
            getattr(stand_in, "cutlass_blockscaled")  # noqa: B009


def test_an_installed_release_is_imported_from_where_it_lies(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", list(sys.path))
    folder = tmp_path / "vllm/model_executor/layers/fused_moe"
    folder.mkdir(parents=True)
    folder.joinpath("config.py").write_text("class RoutingMethodType: ...\n")
    try:
        assert (
            Installed(str(tmp_path), "0.32.0").names.get("methods").__name__ == "RoutingMethodType"
        )
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            del sys.modules[name]


def test_a_release_without_a_selector_has_no_experts_that_weigh_the_input(monkeypatch):
    monkeypatch.setattr(weight_on_input, "selector_of", lambda *_: None)
    model = {"router": {"weight_on": "input"}}
    assert weight_on_input.weight_on_input(model, "nvfp4", "Llama4") is None


def test_what_answers_for_all_gates_is_the_function_of_a_class(monkeypatch):
    class Experts:
        @staticmethod
        def is_supported_config(cls, config):
            raise AssertionError

    def experts(config):
        raise AssertionError

    monkeypatch.setattr(gates, "experts_of", lambda *_, modular: Experts)
    assert gates.function_of("nvfp4", gates.ALL) is Experts.is_supported_config
    assert gates.function_of("nvfp4", "no such gate") is None
    # Old releases have a function in the place of the class.
    monkeypatch.setattr(gates, "experts_of", lambda *_, modular: experts)
    assert gates.function_of("nvfp4", gates.ALL) is experts


@pytest.mark.parametrize(
    ("num_experts", "shards"),
    [
        (60, [1, 4, 2, 8, 1]),
        (256, [1, 4, 2, 3, 1]),
        (257, [1, 4, 1]),
        # Each rank has the experts that have different scales.
        (8, [1, 2, 2, 1]),
    ],
)
def test_experts_are_shared_out_evenly_and_unevenly(num_experts, shards):
    ways = [*other_experts._ways({"router": {"num_experts": num_experts}})]
    assert [ranks.shards for ranks in ways] == shards


def test_ranks_name_the_flags_of_their_server():
    assert Ranks().flags == ()
    assert Ranks(2, split=True).flags == ("--tensor-parallel-size 2",)
    assert Ranks(4).flags == ("--enable-expert-parallel", "--tensor-parallel-size 4")
    assert Ranks(3, dispatched=True, exchange="deepep").flags == (
        *("--enable-expert-parallel", "--data-parallel-size 3", "--all2all-backend deepep"),
    )


@pytest.mark.parametrize(("model", "width"), [("nemotron-3-super", 1024), ("deepseek-r1", 7168)])
def test_routed_experts_of_a_latent_width_have_that_width(monkeypatch, model, width):
    told_by_others = ("_activation", "_activation_arguments", "activation_name", "method_named")
    for name in (*told_by_others, "told_dtype"):
        monkeypatch.setattr(config, name, lambda *_: {})
    monkeypatch.setattr(config, "parallel_config", lambda *_, **__: None)
    monkeypatch.setattr(config.server_defaults, "moe_backend", lambda: "auto")
    spec = asdict(load_model(packaged_directory() / model / "model.yaml"))
    told = config.moe_config({**spec, "architecture": ""}, "DeepSeekV3")
    assert told["hidden_dim"] == width


def test_transformers_is_not_imported_for_annotations(monkeypatch):
    absent = []
    monkeypatch.setattr(main.release, "install", lambda *_: None)
    monkeypatch.setattr(main.stubs, "extend", lambda **given: absent.extend(given["absent"]))
    main.handlers("", known_releases()[-1], "0.33.0")
    assert absent == ["transformers"]


def test_only_variables_that_differ_are_set(monkeypatch):
    changed = []
    environment = {"KEPT": "1", "OTHER": "1", "GONE": "1"}

    class Environment(dict):
        def update(self, values):
            changed.extend(values)
            super().update(values)

        def __delitem__(self, name):
            changed.append(name)
            super().__delitem__(name)

    monkeypatch.setattr(os, "environ", Environment(environment))
    wanted = {"KEPT": "1", "OTHER": "2", "NEW": "1"}
    choice._set_environment(wanted)
    assert os.environ == wanted
    assert sorted(changed) == ["GONE", "NEW", "OTHER"]
