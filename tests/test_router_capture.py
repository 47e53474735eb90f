"""Expert ids that a vLLM captures where its load balancer has placed the experts elsewhere."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.vllm.probe import release, router_capture

#: A router that captures before its ids are mapped, and a layer that captures what it is given.
SOURCES = {
    "router/base_router.py": """
def eplb_map_to_physical_and_record(topk_ids, logical_to_physical_map, **others):
    raise AssertionError("runs on a GPU")


class BaseRouter:
    capture_fn = None

    def __init__(self, eplb_state=None, enable_eplb=False):
        self.eplb_state = eplb_state

    def set_capture_fn(self, capture_fn):
        self.capture_fn = capture_fn

    def select_experts(self, hidden_states, router_logits):
        weights, ids = router_logits.topk(4)
        {BEFORE}
        if self.eplb_state is not None:
            state = self.eplb_state
            ids = {PLACED}
        {AFTER}
        return weights, ids
""",
    "router/router_factory.py": """
from .base_router import BaseRouter


def create_fused_moe_router(eplb_state=None, enable_eplb=False):
    return BaseRouter(eplb_state, enable_eplb)
""",
    # Reads what vLLM 0.15.0's reads of its layer.
    "layer.py": """
class FusedMoE:
    def forward_impl(self, hidden_states, router_logits):
        self.ensure_moe_quant_config_init()
        self.ensure_dp_chunking_init()
        chunked, shared = self.use_dp_chunking, self.shared_experts is not None
        _, copied = self._maybe_setup_shared_experts_stream(hidden_states, shared, chunked)
        assert not (chunked or shared or copied or self.gate or self.dp_size * self.pcp_size > 1)
        assert not self.quant_method.is_monolithic
        weights, ids = self.router.select_experts(hidden_states, router_logits)
        self.capture(ids)
        return self.quant_method.apply(
            layer=self, x=hidden_states, topk_weights=weights, topk_ids=ids
        )
""",
}
CAPTURE = "self.capture_fn and self.capture_fn(ids)"
PLACED = """eplb_map_to_physical_and_record(
                topk_ids=ids, logical_to_physical_map=state.logical_to_physical_map
            )"""
PHYSICAL = "captured expert ids are physical ones, after EPLB placed the experts"


@pytest.fixture
def found(tmp_path, monkeypatch):
    """Gives the deviations of a release, whose sources are these with texts replaced."""

    def find(version, before="pass", after="pass", placed=PLACED):
        top = tmp_path / "vllm/model_executor/layers/fused_moe"
        for name, text in SOURCES.items():
            for mark, code in (("{BEFORE}", before), ("{AFTER}", after), ("{PLACED}", placed)):
                text = text.replace(mark, code)
            file: Path = top / name
            for folder in (file.parent, *file.parent.relative_to(tmp_path).parents):
                (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        names = Names(
            Contract.of("vllm"), version, stubs.definitions("vllm", str(tmp_path)), import_module
        )
        monkeypatch.setattr(release, "names", lambda: names)
        monkeypatch.setattr(router_capture, "select", lambda r, x: r.select_experts(None, x))
        found = router_capture.deviations(names.get("router-factory"), num_experts=16)
        return [(deviation.kind, deviation.cause) for deviation in found]

    yield find
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        monkeypatch.delitem(sys.modules, name)


def test_ids_that_are_captured_as_selected(found):
    assert found("0.33.0", before=CAPTURE) == []


@pytest.mark.parametrize("version", ["0.33.0", "0.21.0"])
def test_ids_that_are_captured_as_placed(found, version):
    assert found(version, after=CAPTURE) == [("experts", PHYSICAL)]


def test_a_layer_that_captures_what_its_router_returns(found):
    assert found("0.15.0") == [("experts", PHYSICAL)]


def test_ids_that_are_not_captured(found):
    assert found("0.33.0") == [("experts", "no expert ids are captured")]


def test_other_ids_that_are_captured(found):
    cause = "captured expert ids are not those that the router selected"
    assert found("0.33.0", before=CAPTURE.replace("(ids)", "(ids + 2)")) == [("experts", cause)]


def test_a_release_that_places_no_experts_is_not_judged(found):
    with pytest.raises(Unsupported, match=r"BaseRouter.set_capture_fn does not place experts here"):
        found("0.33.0", before=CAPTURE, placed="ids")
