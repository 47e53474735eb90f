"""NVIDIA's own rules for the sizes of weights agree with ours, for every layer of the zoo.

`isValidConfig` of the batched GEMM's interface is host code: compiled with g++ from the headers in
the wheel of flashinfer-cubin (MOE_WHEELS) and those of CUDA, it answers without a GPU.
"""

import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
from wheels import find_wheel

from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.kernels.padding import misaligned, padded_sizes
from pytest_moe_routing.models import load_models

RELEASE = "flashinfer_cubin 0.6.13"
CUDA = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"

#: Kernels by their operands, whether they are DeepSeek's, and the layout of the weights.
KINDS = {
    "bf16": "_Bfloat16Bfloat16 {act} other layout2",
    "fp8_block": "_E4m3E4m3 none deepseek layout0",
    "fp8_per_tensor": "_E4m3E4m3 {act} other layout0",
    "mxfp8": "_MxE4m3MxE4m3 {act} other layout0",
    "nvfp4": "_E2m1E2m1 {act} other layout0",
    "mxfp4": "_MxE2m1MxE4m3 {act} other layout0",
    "mxint4": "_MxInt4Bfloat16_castBfloat16 {act} other layout2",
}


def layers():
    """The sizes of every published layer, by scheme."""
    found = set()
    for model in load_models(packaged_directory()).values():
        experts = model.experts
        sizes = (experts.latent_size or experts.hidden_size, experts.intermediate_size)
        found |= {
            (*sizes, experts.gated, scheme) for scheme in model.checkpoints if scheme in KINDS
        }
    return sorted(found)


def weights(hidden, inner, gated, scheme):
    """Rows, columns and kind of kernel of both weights."""
    act = "act" if gated else "none"
    yield inner * (2 if gated else 1), hidden, KINDS[scheme].format(act=act)
    yield hidden, inner, KINDS[scheme].format(act="none")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """`valid(weights)`: whether NVIDIA has a kernel for both weights of each layer."""
    wheel, compiler = find_wheel(RELEASE), shutil.which("g++")
    if wheel is None or compiler is None or not (CUDA / "cuda.h").is_file():
        pytest.skip(f"no {RELEASE} in MOE_WHEELS, no g++, or no cuda.h in {CUDA}")
    folder = tmp_path_factory.mktemp("nvidia")
    with zipfile.ZipFile(wheel) as archive:
        headers = [n for n in archive.namelist() if "/batched_gemm" in n and n.endswith(".h")]
        archive.extractall(folder, headers)
    (meta,) = folder.rglob("flashinferMetaInfo.h")
    (folder / "flashinfer/trtllm").mkdir(parents=True)
    (folder / "flashinfer/trtllm/batched_gemm").symlink_to(meta.parent)
    program = folder / "nvidia_shapes"
    defines = ("EXPORT_INTERFACE", "EXPORT_FLASHINFER", 'GEMM_CUBIN_PATH="none"')
    subprocess.run(
        [
            *(compiler, "-std=c++17", "-O0", "-DTLLM_ENABLE_CUDA"),
            *(f"-DTLLM_GEN_{name}" for name in defines),
            *(f"-I{path}" for path in (folder, meta.parent, CUDA)),
            *(Path(__file__).with_name("nvidia_shapes.cpp"), "-o", program),
        ],
        check=True,
    )

    def ask(asked):
        sizes = sorted({(rows, columns) for rows, columns, _ in asked})
        numbers = [str(number) for size in sizes for number in size]
        done = subprocess.run([program, *numbers], check=True, capture_output=True, text=True)
        # The number of kernels for a weight, whatever the first GEMM returns.
        lines = re.findall(r"^(\d+) (\d+) bmm_[^_]+(_.*) (\d+)$", done.stdout, re.M)
        counts = {}
        for rows, columns, kind, count in lines:
            key = int(rows), int(columns), kind
            counts[key] = counts.get(key, 0) + int(count)
        return {key: counts[key] > 0 for key in asked}

    return ask


def test_sizes_that_we_pad_to_have_kernels(valid):
    given = layers()
    padded = {(*padded_sizes(h, i, s, g), g, s): misaligned(h, i, s, g) for h, i, g, s in given}
    answers = valid([weight for layer in padded for weight in weights(*layer)])
    wrong = [
        (layer, reason)
        for layer, reason in padded.items()
        if all(answers[weight] for weight in weights(*layer)) != (not reason)
    ]
    assert wrong == []
    assert len(padded) > 30


@pytest.mark.parametrize(("rows", "taken"), [(1856, False), (1920, True), (2880, False)])
def test_rows_come_in_multiples_of_128(valid, rows, taken):
    weight = (rows, 2688, KINDS["nvfp4"].format(act="none"))
    assert valid([weight]) == {weight: taken}
