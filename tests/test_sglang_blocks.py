"""Which blocks, quantizations and layers the sources of a miniature SGLang have."""

from __future__ import annotations

from textwrap import dedent

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.sglang.model_configs import published_of
from pytest_moe_routing.targets.sglang.probe.sources import Sources

LEAF = """
    class {block}:
        def __init__(self, config, late=False):
            self.experts = get_moe_impl_class(None)(num_experts=8)
            self.topk = TopK(top_k=2)
"""


@pytest.fixture
def tree(tmp_path):
    """Writes modules of `sglang.srt`, and reads them."""

    #: What the contract expects of every release.
    layers = {
        "layers__moe__topk": "class TopK: ...",
        "layers__moe__fused_moe_triton__layer": "class FusedMoE: ...",
        "layers__moe__ep_moe__layer": "def get_moe_impl_class(quant_config): ...",
    }

    def write(version="0.5.6", **modules):
        for name, text in {**layers, **modules}.items():
            file = tmp_path / "sglang/srt" / f"{name.replace('__', '/')}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(dedent(text))
        definitions = stubs.definitions("sglang", str(tmp_path))
        return Sources(Names(Contract.of("sglang"), version, definitions), str(tmp_path))

    return write


def blocks(sources, architecture="Model"):
    found = sources.blocks(architecture)
    return [f"{m.removeprefix('sglang.srt.models.')}.{name}" for m, name, _ in found]


def test_a_block_is_found_through_classes_constants_and_modules(tree):
    sources = tree(
        models__model="""
            from sglang.srt.models.inner import Layer
            LAYERS = {"moe": Layer}
            class Model(Base):
                def __init__(self):
                    self.layer = LAYERS["moe"]()
        """,
        models__inner="""
            import sglang.srt.models.leaf as leaf
            class Layer:
                def __init__(self, config):
                    self.mlp = leaf.Block(config, late=True)
        """,
        models__leaf=LEAF.format(block="Block"),
    )
    assert blocks(sources) == ["leaf.Block"]
    assert sources.blocks("Model")[0][2] == {"late": True}


def test_a_base_class_does_not_bring_the_layers_that_its_child_replaces(tree):
    sources = tree(
        models__base=LEAF.format(block="OldBlock")
        + """
    class OldLayer:
        def __init__(self, config):
            self.mlp = OldBlock(config)
    class BaseModel:
        def __init__(self, config, layer=OldLayer):
            layer = layer or OldLayer
            self.layers = [layer(config)]
    class Model(Root):
        def __init__(self, config):
            self.model = BaseModel(config)
""",
        models__child=LEAF.format(block="NewBlock")
        + """
    from sglang.srt.models.base import BaseModel
    class NewLayer:
        def __init__(self, config):
            self.mlp = NewBlock(config)
    class NewModel(BaseModel):
        def __init__(self, config):
            super().__init__(config, layer=NewLayer)
    class Child(Root):
        def __init__(self, config):
            self.model = NewModel(config)
""",
    )
    assert blocks(sources, "Child") == ["child.NewBlock"]
    assert blocks(sources, "Model") == ["base.OldBlock"]


def test_what_is_not_there_is_said(tree):
    sources = tree(models__dense="class Model(Root):\n    def __init__(self): ...\n")
    with pytest.raises(Unsupported, match="this release has no Other"):
        sources.blocks("Other")
    with pytest.raises(Unsupported, match="the code of Model makes no FusedMoE layer"):
        sources.blocks("Model")


CHECKS = """
    def check(self):
        if self.moe_runner_backend == "flashinfer_cutlass":
            assert self.quantization in ["cutlass-only"]
        if {test}:
            assert self.quantization in ["fp8", None], "no"
"""


@pytest.mark.parametrize(
    ("test", "allowed"),
    [
        ('self.moe_runner_backend == "flashinfer_trtllm"', ["fp8", None]),
        ('view.moe_runner_backend in ["flashinfer_trtllm", "other"]', ["fp8", None]),
        ('self.moe_runner_backend != "flashinfer_trtllm"', None),
        ('self.moe_runner_backend == "flashinfer_trtllm_routed"', None),
    ],
)
def test_the_servers_own_check_of_the_quantization_is_read(tree, test, allowed):
    """Releases before 0.5.6 may have none."""
    check = CHECKS.format(test=test)
    assert tree("0.5.5", server_args=check).accepted_quantizations() == allowed
    hook = tree("0.5.5", server_args="", arg_groups__hook=check)
    assert hook.accepted_quantizations() == allowed


def test_a_release_whose_check_is_not_found_is_not_judged(tree):
    """Releases from 0.5.6 on have one; nothing is taken to be accepted where it moved."""
    other = CHECKS.format(test="self.runner == 'flashinfer_trtllm'")
    sources = tree("99.0", server_args=other, arg_groups__fields__exec_="")
    with pytest.raises(Unsupported, match=r"^not judged: .* in SGLang 99\.0 assert nothing about"):
        sources.accepted_quantizations()


def test_a_layer_of_another_name_is_not_judged(tree):
    leaf = LEAF.format(block="Block").replace("class Block:", "class Block(nn.Module):")
    sources = tree(models__leaf=leaf, layers__moe__topk="class Other: ...")
    with pytest.raises(Unsupported, match=r"has no sglang\.srt\.layers\.moe\.topk:TopK .*'topk'"):
        sources.blocks("Block")


def test_layers_that_differ_from_the_others_are_not_judged():
    model = load_models(packaged_directory())["step-3.7-flash"]
    variant = model.variants()["43-44"]
    with pytest.raises(Unsupported, match=f"code of {model.architecture} for some layers"):
        published_of(variant, "")
