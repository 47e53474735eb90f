"""What the children of targets are made of: stubs, the recorder, what a model's code says."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import stubs
from pytest_moe_routing.targets.contract import Contract, Names
from pytest_moe_routing.targets.vllm.probe.models import ModelSources


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return str(root)


def run(root, code):
    """Run code in a process of its own: stubs stay for good."""
    begin = f"""
import sys
from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets import recorder, stubs
from pytest_moe_routing.targets.contract import Contract
root = {str(root)!r}
def contract(*run, third_party=()):
    return Contract("frame", "Frame", ("frame",), {{}}, run, ("frame.unbuilt",), third_party)
"""
    done = subprocess.run(
        [sys.executable, "-c", begin + textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FRAMEWORK = {
    "frame/__init__.py": "raise RuntimeError('not to be run')",
    "frame/layers/moe/__init__.py": """
        from frame.layers.moe.experts import Experts
        import no_such_package.deep
        """,
    "frame/platforms.py": "platform = None",
    "frame/logger/__init__.py": "",
    "frame-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: frame\nVersion: 1.0\n"
    "Requires-Dist: no-such-package>=1\n"
    "Requires-Dist: another_missing_package ; python_version > '3'\n",
    "frame/layers/moe/kernel.py": "class Base:\n    real = True\n",
    "frame/layers/moe/experts.py": """
        import frame.layers.moe.kernel as mk
        from frame.platforms import platform
        from frame.logger import init_logger
        import another_missing_package

        logger = init_logger(__name__)

        @another_missing_package.decorate
        class Experts(mk.Base):
            on_gpu = platform.is_cuda()
        """,
}


def test_real_modules_run_and_all_else_is_a_stub(tmp_path):
    write(tmp_path, FRAMEWORK)
    said = run(
        tmp_path,
        """
        stubs.install(contract("frame.layers.moe"), root)
        module = stubs.real_module("frame.layers.moe.experts")
        print(module.Experts.real, bool(module.Experts.on_gpu), module.logger)
        """,
    )
    assert said == ["True", "False", "frame.logger.init_logger()"]


@pytest.mark.parametrize(
    ("code", "missing"),
    [
        ("import frame.layers.moe.nothing", "frame.layers.moe.nothing"),
        ("from frame.nowhere import anything", "frame.nowhere"),
        ("import not_in_the_metadata.deep", "not_in_the_metadata"),
    ],
)
def test_what_exists_nowhere_is_no_stub(tmp_path, code, missing):
    write(tmp_path, {**FRAMEWORK, "frame/layers/moe/more.py": code})
    said = run(
        tmp_path,
        """
        stubs.install(contract("frame.layers.moe"), root)
        try:
            stubs.real_module("frame.layers.moe.more")
        except Unsupported as reason:
            print(reason)
        """,
    )
    text = " ".join(said)
    assert text.startswith(f"not judged: frame.layers.moe.more imports {missing}")
    assert text.endswith("which neither Frame nor its METADATA nor the contract has")


def test_what_the_contract_names_is_a_stub(tmp_path):
    code = "import listed.deep\nimport frame.unbuilt\nfrom frame.platforms import gone"
    write(tmp_path, {**FRAMEWORK, "frame/layers/moe/more.py": code})
    said = run(
        tmp_path,
        """
        stubs.install(contract("frame.layers.moe", third_party=("listed",)), root)
        module = stubs.real_module("frame.layers.moe.more")
        print(type(module.listed.deep).__name__, module.gone)
        """,
    )
    assert said == ["_StubModule", "frame.platforms.gone"]


def test_the_recorder_has_the_entry_points_of_its_release():
    said = run(
        "",
        """
        from pytest_moe_routing.flashinfer import FlashInfer
        stubs.install(contract(third_party=("flashinfer",)), root)
        recorder.install(FlashInfer.of("0.6.4"))
        import flashinfer, flashinfer.fused_moe.core as core
        print(hasattr(core, "trtllm_bf16_moe"), hasattr(flashinfer, "trtllm_gen_routing_moe"))
        print(int(flashinfer.RoutingMethodType.Unspecified), core.ActivationType.Relu2.name)
        call = {name: name for name in "routing_logits routing_bias hidden_states gemm1_weights "
                "gemm2_weights num_experts top_k n_group topk_group intermediate_size "
                "local_expert_offset local_num_experts".split()}
        try:
            flashinfer.fused_moe.trtllm_bf16_moe(**call)
        except recorder.Reached as reached:
            print(reached.function, reached.arguments["top_k"])
            print(reached.arguments["routed_scaling_factor"])
        try:
            flashinfer.fused_moe.trtllm_bf16_moe(**call, norm_topk_prob=True)
        except recorder.DoesNotBind as error:
            print(str(error).replace(" ", "_"))
        """,
    )
    assert said == [
        *("True", "False", "6", "Relu2", "trtllm_bf16_moe", "top_k", "None"),
        "trtllm_bf16_moe_of_FlashInfer_0.6.4:_got_an_unexpected_keyword_argument_'norm_topk_prob'",
    ]


MODELS = "vllm/model_executor/models"
LAYERS = "vllm/model_executor/layers/fused_moe/layer.py"
CODE = {
    LAYERS: "def FusedMoEFactory(): ...",
    f"{MODELS}/registry.py": """
        _VLLM_MODELS = {
            "Tells": ("tells", "Tells"),
            "Asks": ("asks", "Asks"),
            "Itself": ("itself", "Itself"),
            "Router": ("router", "Router"),
            "Wraps": ("wraps", "Wraps"),
            "Package": ("vllm.models.package", "Package"),
            "Default": ("default", "Default"),
            "Open": ("open", "Open"),
            "OpenParameter": ("open_parameter", "OpenParameter"),
            "OpenFactor": ("open_factor", "OpenFactor"),
            "Dense": ("dense", "Dense"),
        }
        """,
    f"{MODELS}/tells.py": (
        "FusedMoEFactory(8, routed_scaling_factor=f, apply_routed_scale_to_output=True)"
    ),
    f"{MODELS}/asks.py": """
        class Asks:
            def __init__(self, apply_routed_scale_to_output=False):
                FusedMoEFactory(
                    routed_scaling_factor=f,
                    apply_routed_scale_to_output=apply_routed_scale_to_output,
                    custom_routing_function=Asks.route,
                )

        Asks(apply_routed_scale_to_output=not aiter.is_enabled())
        """,
    f"{MODELS}/default.py": """
        class Default:
            def __init__(self, told=True):
                FusedMoEFactory(routed_scaling_factor=f, apply_routed_scale_to_output=told)
        """,
    f"{MODELS}/itself.py": "FusedMoEFactory(routed_scaling_factor=1.0 if not aiter else f)",
    f"{MODELS}/router.py": "FusedMoEFactory(routed_scaling_factor=f)",
    f"{MODELS}/wraps.py": "language_model = make(architectures=['Tells'])",
    f"{MODELS}/open.py": "FusedMoEFactory(apply_routed_scale_to_output=not config.other)",
    f"{MODELS}/open_parameter.py": "FusedMoEFactory(apply_routed_scale_to_output=told)",
    f"{MODELS}/open_factor.py": "FusedMoEFactory(routed_scaling_factor=1.0 if config.other else f)",
    f"{MODELS}/dense.py": "Linear()",
    "vllm/models/package/__init__.py": """
        from .mtp import Mtp
        from .model import Model
        """,
    "vllm/models/package/mtp.py": "from vllm.model_executor.models.tells import Tells",
    "vllm/models/package/model.py": "from .moe import Moe",
    "vllm/models/package/moe.py": "FusedMoEFactory(routed_scaling_factor=f)",
}


def sources(root):
    definitions = stubs.definitions("vllm", root)
    return ModelSources(Names(Contract.of("vllm"), "unknown", definitions), root)


@pytest.mark.parametrize(
    ("architecture", "scaled_by"),
    [
        ("Tells", "layer"),
        ("Asks", "layer"),
        ("Default", "layer"),
        ("Itself", "model"),
        ("Router", "router"),
        ("Wraps", "layer"),
        ("Package", "router"),
        ("Unknown", "router"),
    ],
)
def test_who_applies_the_factor_is_read_from_the_models_code(tmp_path, architecture, scaled_by):
    code = sources(write(tmp_path, CODE))
    assert code.scaled_by(architecture) == scaled_by
    assert code.has_architecture(architecture) is (architecture != "Unknown")


@pytest.mark.parametrize(
    ("architecture", "stated"),
    [
        ("Router", {"routed_scaling_factor"}),
        ("Default", {"routed_scaling_factor", "apply_routed_scale_to_output"}),
        # What stands at a position has no name.
        ("Tells", None),
        ("Unknown", None),
    ],
)
def test_the_arguments_of_a_layer_are_read_from_the_models_code(tmp_path, architecture, stated):
    assert sources(write(tmp_path, CODE)).stated(architecture) == stated


@pytest.mark.parametrize(
    ("code", "activation"),
    [
        ("FusedMoEFactory(activation='gelu_tanh')", "gelu_tanh"),
        ("FusedMoEFactory(activation=MoEActivation.GELU_TANH)", "gelu_tanh"),
        ("FusedMoEFactory(activation='gelu'); FusedMoEFactory(activation='gelu')", "gelu"),
        # What depends on the config, or on the layer.
        ("FusedMoEFactory(activation=config.hidden_act)", None),
        ("FusedMoEFactory(activation='gelu' if config.old else 'silu')", None),
        ("FusedMoEFactory(activation='gelu'); FusedMoEFactory()", None),
        ("FusedMoEFactory()", None),
        ("Linear(activation='gelu')", None),
    ],
)
def test_a_constant_activation_is_read_from_the_models_code(tmp_path, code, activation):
    files = {**CODE, f"{MODELS}/router.py": code}
    assert sources(write(tmp_path, files)).activation("Router") == activation
    assert sources(str(tmp_path)).activation("Unknown") is None


@pytest.mark.parametrize(
    ("architecture", "question"),
    [
        ("Open", r"open.py:1 of vLLM unknown leaves open whether the layer or its router applies"),
        ("OpenParameter", r"open_parameter.py:1 .* whether the layer or its router applies"),
        ("OpenFactor", r"open_factor.py:1 .* which scaling factor the layer is given"),
        ("Dense", r"the code of Dense in vLLM unknown .* makes no layer with FusedMoEFactory"),
    ],
)
def test_what_the_models_code_does_not_prove_is_not_judged(tmp_path, architecture, question):
    with pytest.raises(Unsupported, match=f"^not judged: .*{question}"):
        sources(write(tmp_path, CODE)).scaled_by(architecture)


def test_a_layer_of_another_name_is_not_judged(tmp_path):
    renamed = {path: text.replace("FusedMoEFactory", "Renamed") for path, text in CODE.items()}
    with pytest.raises(Unsupported, match=r"has no .*layer:FusedMoEFactory .*'layer-factory'"):
        sources(write(tmp_path, renamed)).scaled_by("Router")


def test_an_unreadable_registry_is_not_judged(tmp_path):
    registry = {f"{MODELS}/registry.py": "_VLLM_MODELS = load('registry.json')"}
    with pytest.raises(Unsupported, match="registry of vLLM unknown lists no architecture"):
        sources(write(tmp_path, {**CODE, **registry})).has_architecture("Router")


def test_a_routing_function_of_the_models_own(tmp_path):
    code = sources(write(tmp_path, CODE))
    module = "vllm.model_executor.models.asks"
    assert code.routing_function("Asks") == (module, "Asks.route")
    assert code.routing_function("Router") is None
    assert code.routing_function("Unknown") is None


def test_an_outer_architecture_leaves_the_layer_to_that_of_its_text_config(tmp_path):
    code = sources(write(tmp_path, CODE))
    assert code.maker(("Dense", "Tells")) == "Tells"
    assert code.maker(("Tells", "Router")) == "Tells"
    assert code.maker(("Unknown", "Dense")) == "Unknown"
