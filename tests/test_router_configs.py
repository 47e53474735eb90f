"""Routers of vLLM whose output is not the recipe's, in a release that is made here."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from pytest_moe_routing.oracle.routers import NOT_JUDGED, Output
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.vllm.probe import release, router_case, router_configs

#: Routers that are right, but for what a test changes.
SOURCES = {
    "router_factory.py": """
import os

import torch

from . import zero_expert_router
from .routing_simulator_router import RoutingSimulatorRouter


class Router:
    def __init__(self, **arguments):
        self.__dict__.update(arguments)

    def choose(self, logits):
        logits = logits.double()
        scores = logits.sigmoid() if self.scoring_func == "sigmoid" else logits.softmax(1)
        keys = scores + self.e_score_correction_bias.double()
        ids = keys.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]
        weights = scores.gather(1, ids)
        if self.renormalize:
            weights = weights / weights.sum(1, keepdim=True)
        return (weights * self.routed_scaling_factor).float(), ids

    def select_experts(self, hidden_states, router_logits, topk_indices_dtype):
        weights, ids = self.choose(router_logits)
        if self.num_fused_shared_experts:
            count = self.num_fused_shared_experts
            shared = torch.arange(router_logits.shape[1], router_logits.shape[1] + count)
            ids = torch.cat([ids, shared.expand(len(ids), -1)], 1)
            more = torch.full((len(ids), count), self.shared_expert_weight)
            weights = torch.cat([weights, more], 1)
        if self.zero_expert_type:
            zero_expert_router.zero_experts_compute_triton(
                expert_indices=ids, expert_scales=weights
            )
            is_zero = ids >= self.num_logical_experts
            weights, ids = weights.masked_fill(is_zero, 0.0), ids.masked_fill(is_zero, 0)
        return weights, ids


def create_fused_moe_router(
    top_k, global_num_experts, renormalize=True, use_grouped_topk=False, num_expert_group=None,
    topk_group=None, scoring_func="softmax", routed_scaling_factor=1.0,
    e_score_correction_bias=None, custom_routing_function=None, eplb_state=None,
    zero_expert_type=None, num_logical_experts=None, num_fused_shared_experts=0,
    shared_expert_weight=1.0, enable_eplb=False,
):
    if os.environ.get("VLLM_MOE_ROUTING_SIMULATION_STRATEGY"):
        return RoutingSimulatorRouter(top_k, global_num_experts)
    return Router(**locals())
""",
    "fused_moe_router.py": """
class FusedMoERouter:
    def select_experts(self, hidden_states, router_logits, topk_indices_dtype): ...
""",
    "zero_expert_router.py": """
def zero_experts_compute_triton(expert_indices, expert_scales):
    raise AssertionError("runs on a GPU")
""",
    "routing_simulator_router.py": """
import torch


class RoutingSimulatorRouter:
    def __init__(self, top_k, experts):
        self.top_k, self.experts = top_k, experts

    def select_experts(self, hidden_states, router_logits, topk_indices_dtype):
        ids = torch.rand(len(router_logits), self.experts).argsort(1)[:, : self.top_k]
        return torch.ones(ids.shape), ids
""",
}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes the release, with a text of its sources replaced."""

    def make(old="", new=""):
        assert not old or any(old in text for text in SOURCES.values())
        top = tmp_path / "vllm/model_executor/layers/fused_moe/router"
        for name, text in SOURCES.items():
            file: Path = top / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text.replace(old, new) if old else text)
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.syspath_prepend(tmp_path)
        definitions = stubs.definitions("vllm", str(tmp_path))
        names = Names(Contract.of("vllm"), "0.33.0", definitions, import_module)
        monkeypatch.setattr(release, "names", lambda: names)
        monkeypatch.setattr(stubs, "real_module", import_module)
        return names

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)


ZERO, SHARED = "longcat-flash", "two fused shared experts"
SIMULATED = "VLLM_MOE_ROUTING_SIMULATION_STRATEGY=normal_routing"
#: The last of equal keys comes first: torch leaves their order open.
TIES = (
    "keys.sort(dim=1, descending=True, stable=True).indices",
    "keys.sort(dim=1, stable=True).indices.flip(1)",
)


def problems(names, subject):
    [case] = [case for case in router_configs.cases(names) if case.subject == subject]
    return [(found.kind, found.cause) for found in case.judge(case)]


@pytest.mark.parametrize("subject", [ZERO, SHARED, SIMULATED])
@pytest.mark.parametrize("change", [(), TIES], ids=["", "ties"])
def test_a_right_router(made, subject, change):
    assert problems(made(*change), subject) == []


WRONG = "24/24 tokens (100.0 %) are routed wrongly"
ADDED = "shared.expand("
NO_WEIGHT, NO_ID = "weights.masked_fill(is_zero, 0.0)", "ids.masked_fill(is_zero, 0)"
ZERO_SLOTS = "slots of zero experts keep a weight, or an id that no expert has"
REAL_SLOTS = "slots of real experts are not those that were chosen"


@pytest.mark.parametrize(
    ("subject", "old", "new", "problem"),
    [
        (SHARED, "* self.routed_scaling_factor", "", WRONG),
        (SHARED, "self.shared_expert_weight)", "1.0)", "shared experts weigh [1.0, 1.0], not 0.4"),
        (SHARED, ADDED, f"shared.flip(0){ADDED[6:]}", "slots of shared experts hold [129, 128]"),
        (SHARED, "if self.num_fused_shared_experts:", "if False:", "slots of shared experts hold []"),
        (ZERO, "* self.routed_scaling_factor", "", WRONG),
        (ZERO, NO_WEIGHT, "weights", ZERO_SLOTS),
        (ZERO, NO_ID, "ids", ZERO_SLOTS),
        (ZERO, NO_ID, f"{NO_ID}.flip(1)", REAL_SLOTS),
        (ZERO, NO_WEIGHT, f"{NO_WEIGHT} * 2", REAL_SLOTS),
        (SIMULATED, "ids.shape), ids", "ids.shape), ids + 1", "experts that do not exist are chosen"),
        (SIMULATED, "argsort(1)", "argsort(1).floor_divide(2)", "an expert is chosen twice for a token"),
        (SIMULATED, "ids.shape)", "ids.shape).half()", "weights are torch.float16 [256, 8]"),
    ],
)  # fmt: skip
def test_a_wrong_router(made, subject, old, new, problem):
    assert problems(made(old, new), subject) == [("structure", problem)]


def test_configurations_that_a_release_does_not_have_are_left_out(made):
    def subjects(names):
        return {case.subject for case in router_configs.cases(names)}

    assert {ZERO, SHARED, SIMULATED} <= subjects(made())
    lost = subjects(made()) - subjects(made("num_fused_shared_experts", "shared_experts"))
    assert lost == {SHARED}


def test_groups_and_experts_of_the_factory_are_those_that_a_configuration_is_named_after(made):
    names = made()
    subject = "sigmoid and bias, 60 experts in 8 groups, scale 2.5"
    [case] = [case for case in router_configs.cases(names) if case.subject == subject]
    router = case.make(None)
    assert (router.global_num_experts, router.num_expert_group) == (60, 8)
    assert (router.topk_group, router.top_k) == (4, case.recipe.top_k)
    assert router.top_k > 1
    assert (router.scoring_func, router.routed_scaling_factor) == ("sigmoid", 2.5)


@pytest.mark.parametrize(
    ("before", "kind"), [("pass", "crash"), ("bool(Stub('kernels'))", NOT_JUDGED)]
)
def test_what_fails_after_a_stand_in_was_asked_is_no_crash_of_vllm(made, before, kind):
    code = f"from pytest_moe_routing.targets.stubs import Stub; {before}; raise ValueError('x')"
    names = made("logits = logits.double()", code)
    [case] = [case for case in router_configs.cases(names) if case.subject.startswith("softmax,")]
    found = router_case.compare(case, Output())["deviations"]
    assert {deviation["kind"] for deviation in found} == {kind}


@pytest.mark.parametrize("subject", [SHARED, "sigmoid without a bias or groups"])
def test_arguments_that_no_operator_computes_with_are_a_problem_of_the_router(made, subject):
    """What stands for a compiled operator rejects them; the router that passes them is wrong."""
    code = "from pytest_moe_routing.routing import Recipe; Recipe(4, n_group=4, topk_group=8)"
    names = made("logits = logits.double()", code)
    [case] = [case for case in router_configs.cases(names) if case.subject == subject]
    [found] = router_case.compare(case, Output())["deviations"]
    assert found["kind"] == "crash"
    assert found["cause"].startswith("an operator is given arguments that are wrong: Recipe: ")
    assert found["cause"].endswith("found top_k 4, topk_group 8, n_group 4")
