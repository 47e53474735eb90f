"""What the children of targets are made of: stubs, the recorder, what a model's code says."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from pytest_moe_routing.targets.vllm.probe.models import (
    has_architecture,
    routing_function,
    scales_output,
)


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
    return str(root)


def run(root, code):
    """Run code in a process of its own: stubs stay for good."""
    begin = f"import sys\nfrom pytest_moe_routing.targets.probes import recorder, stubs\nroot = {str(root)!r}\n"
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
        stubs.install("frame", root, real=["frame.layers.moe"])
        module = stubs.real_module("frame.layers.moe.experts")
        print(module.Experts.real, bool(module.Experts.on_gpu), module.logger)
        try:
            stubs.real_module("frame.layers.moe.nothing")
        except ModuleNotFoundError as error:
            print(error.name)
        """,
    )
    assert said == ["True", "False", "frame.logger.init_logger()", "frame.layers.moe.nothing"]


def test_the_recorder_has_the_entry_points_of_its_release():
    said = run(
        "",
        """
        from pytest_moe_routing.schemes import FlashInfer
        stubs.install("frame", root, real=[], absent=["flashinfer"])
        recorder.install(FlashInfer.of("0.6.4"))
        import flashinfer, flashinfer.fused_moe.core as core
        print(hasattr(flashinfer, "trtllm_bf16_moe"), hasattr(flashinfer, "trtllm_gen_routing_moe"))
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
CODE = {
    f"{MODELS}/registry.py": """
        _MODELS = {
            "Tells": ("tells", "Tells"),
            "Asks": ("asks", "Asks"),
            "Itself": ("itself", "Itself"),
            "Router": ("router", "Router"),
            "Wraps": ("wraps", "Wraps"),
            "Package": ("vllm.models.package", "Package"),
        }
        """,
    f"{MODELS}/tells.py": "FusedMoE(8, routed_scaling_factor=f, apply_routed_scale_to_output=True)",
    f"{MODELS}/asks.py": """
        class Asks:
            def __init__(self, apply_routed_scale_to_output=False):
                FusedMoE(
                    routed_scaling_factor=f,
                    apply_routed_scale_to_output=apply_routed_scale_to_output,
                    custom_routing_function=Asks.route,
                )

        Asks(apply_routed_scale_to_output=not aiter.is_enabled())
        """,
    f"{MODELS}/itself.py": "SharedFusedMoE(routed_scaling_factor=1.0 if not aiter else f)",
    f"{MODELS}/router.py": "FusedMoEFactory(routed_scaling_factor=f)",
    f"{MODELS}/wraps.py": "language_model = make(architectures=['Tells'])",
    "vllm/models/package/__init__.py": """
        from .mtp import Mtp
        from .model import Model
        """,
    "vllm/models/package/mtp.py": "from vllm.model_executor.models.tells import Tells",
    "vllm/models/package/model.py": "from .moe import Moe",
    "vllm/models/package/moe.py": "FusedMoEFactory(routed_scaling_factor=f)",
}


@pytest.mark.parametrize(
    ("architecture", "output"),
    [
        ("Tells", True),
        ("Asks", True),
        ("Itself", True),
        ("Router", False),
        ("Wraps", True),
        ("Package", False),
        ("Unknown", False),
    ],
)
def test_who_applies_the_factor_is_read_from_the_models_code(tmp_path, architecture, output):
    root = write(tmp_path, CODE)
    assert scales_output(root, architecture) is output
    assert has_architecture(root, architecture) is (architecture != "Unknown")


def test_a_routing_function_of_the_models_own(tmp_path):
    root = write(tmp_path, CODE)
    module = "vllm.model_executor.models.asks"
    assert routing_function(root, "Asks") == (module, "Asks.route")
    assert routing_function(root, "Router") is None
    assert routing_function(root, "Unknown") is None
