"""Which scheme SGLang's own code finds in the quantization configs of published checkpoints."""

from __future__ import annotations

import pytest
from packaging.version import Version
from sglang_targets import oldest_and_newest, opened
from wheels import unpack, wheels_since

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.served import served_otherwise
from pytest_moe_routing.suite.checkpoints import of_served
from pytest_moe_routing.targets.sglang.model_configs import configs

MODELS = [*load_models(packaged_directory()).values()]
#: What reads the dtype of MiMo-V2's experts.
STORED = 'get("store_dtype")'
#: Files, what is in them, and what takes its place.
EDITS = [
    # Sizes of blocks that are lost.
    ("layers/quantization/fp8.py", "            weight_block_size=weight_block_size,\n", ""),
    # A quantization that is read as another one.
    ("configs/model_config.py", '"quant_method": "modelopt_fp8"', '"quant_method": "modelopt_fp4"'),
    # A file that only ModelOpt writes is read as if it had other groups.
    ("layers/quantization/modelopt_quant.py", "group_size = ModelOptFp4Config.common_group_size(config)",
     "group_size = 32"),
    # A key that marks experts as MXFP4 is ignored. 0.5.18 does not have it.
    ("configs/model_config.py", STORED, 'get("stored_dtype")'),
]  # fmt: skip
#: Groups of DeepSeek V4's experts, which mean none.
GROUPS = ("configs/model_config.py", "self.hf_config.topk_group = n_group", "pass")


def edited(folder, *edits):
    wheels = wheels_since("0.5.18", "sglang")
    if not wheels:
        pytest.skip("MOE_WHEELS has no SGLang whose code is asked")
    root = unpack(wheels[-1], folder)
    for file, old, new in edits:
        path = root / "sglang/srt" / file
        text = path.read_text()
        assert old in text or old == STORED, (file, old)
        path.write_text(text.replace(old, new, 1))
    return opened(root)


@pytest.fixture(scope="module", **oldest_and_newest())
def target(request):
    yield from opened(request.param)


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    yield from edited(tmp_path_factory.mktemp("sglang"), *EDITS)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    yield from edited(tmp_path_factory.mktemp("sglang"), GROUPS)


@pytest.mark.parametrize("scheme", configs()["schemes"])
def test_every_known_format_is_read(target, scheme):
    found = served_otherwise(target, scheme, MODELS)
    assert (found.wrong, found.unanswered) == ((), {})
    # Blocks are built of compressed-tensors' configs elsewhere.
    assert found.answered or scheme in ("bf16", "mxint4")


@pytest.mark.parametrize(
    ("scheme", "format_", "because"),
    [
        ("fp8_block", "quant_method fp8 with blocks", "weight_block_size=None"),
        ("fp8_per_tensor", "ModelOpt's config.json, FP8", "NVFP4 quantization requires group_size"),
        ("nvfp4", "ModelOpt's hf_quant_config.json, NVFP4", "group_size=32"),
        ("mxfp4", "MiMo-V2 with MXFP4 experts", "Fp8MoEMethod serves the experts as no scheme"),
    ],
)
def test_a_checkpoint_that_is_read_as_another(wrong, scheme, format_, because):
    if format_.startswith("MiMo") and Version(wrong.version()) < Version("0.5.23"):
        pytest.skip("this release does not read such experts")
    found = [of_served(wrong, each) for each in served_otherwise(wrong, scheme, MODELS).wrong]
    lines = {line for failure in found if failure.case == format_ for line in failure.lines}
    assert any(line.startswith("  because  ") and because in line for line in lines)
    assert any(line.startswith("  at       sglang/srt/") for line in lines)


def test_groups_that_sglang_no_longer_removes(grouped):
    (failure, *_) = [
        of_served(grouped, each) for each in served_otherwise(grouped, "mxfp4", MODELS).wrong
    ]
    assert failure.case == "DeepSeek-V4 with MXFP4 experts"
    assert "topk_group=4" in "\n".join(failure.lines)
