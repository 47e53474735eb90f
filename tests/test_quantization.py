"""Formats against independent implementations that run on a CPU, bit for bit.

Used where installed: ml_dtypes (elements), torch's float8_e8m0fnu, torchao (MX and NVFP4 encoders),
compressed-tensors (FP8 blocks, integers, FP4 packing), flashinfer's CPU decoder of FP4.
"""

import numpy as np
import pytest
import torch
from independent import independent

from pytest_moe_routing.errors import QuantizationError
from pytest_moe_routing.logits import bell, integers
from pytest_moe_routing.reference.quantization import (
    FORMATS,
    decode_ue8m0,
    dequantize,
    fake_quantize,
    quantize,
    real_scales,
)

ALL = sorted(FORMATS)
BLOCKED = [name for name in ALL if FORMATS[name].block != (0, 0)]
E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def matrix(rows=256, columns=512, seed=1):
    """Bell-shaped numbers whose magnitude differs from block to block."""
    sizes = 2.0 ** (integers(rows, columns // 16, seed=seed + 1, bits=3) - 4).to(torch.float32)
    return bell(rows, columns, seed=seed) * sizes.repeat_interleave(16, 1)


def every_float16():
    """All 63,488 finite float16 numbers: every tie of the small formats is among them."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return numbers[numbers.isfinite()].to(torch.float32)


def codes(name, x):
    """Elements of numbers that need no scaling, one to a byte."""
    ones = {
        "mxfp8": torch.tensor([[127]], dtype=torch.uint8),
        "mxfp4": torch.tensor([[127]], dtype=torch.uint8),
        "mxint4": torch.ones(1, 1, dtype=torch.bfloat16),
    }[name]
    x = torch.nn.functional.pad(x, (0, -len(x) % 32)).view(-1, 32)
    q = quantize(x, name, scales=ones.expand(len(x), 1))
    return dequantize(q).flatten(), q.data.view(torch.uint8).flatten()


@pytest.mark.parametrize(
    ("name", "dtype", "largest"),
    [("mxfp8", "float8_e4m3fn", 448), ("mxfp4", "float4_e2m1fn", 6)],
)
def test_elements_are_those_of_ml_dtypes(name, dtype, largest):
    ml_dtypes = independent("ml_dtypes")
    x = every_float16()
    values, _ = codes(name, x)
    other = x.clamp(-largest, largest).numpy().astype(getattr(ml_dtypes, dtype)).astype(np.float32)
    assert values[: len(x)].view(torch.int32).tolist() == other.view(np.int32).tolist()


def test_int4_elements_are_those_of_ml_dtypes():
    ml_dtypes = independent("ml_dtypes")
    x = every_float16()
    values, _ = codes("mxint4", x)
    other = np.rint(x.clamp(-8, 7).numpy()).astype(ml_dtypes.int4).astype(np.float32)
    assert torch.equal(values[: len(x)], torch.from_numpy(other))


def test_powers_of_two_are_those_of_torch():
    every = torch.arange(256, dtype=torch.uint8)
    theirs = every.view(torch.float8_e8m0fnu).to(torch.float32)
    assert torch.equal(decode_ue8m0(every)[:-1], theirs[:-1])
    assert decode_ue8m0(every)[-1].isnan()
    assert theirs[-1].isnan()


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
@pytest.mark.parametrize("rule", ["ceil", "floor"])
def test_mx_is_that_of_torchao(name, rule):
    mx = independent("torchao.prototype.mx_formats.mx_tensor")
    config = independent("torchao.prototype.mx_formats.config")
    mode = {"ceil": "RCEIL", "floor": "FLOOR"}[rule]
    element = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
    x = matrix()
    scales, data = mx.to_mx(x, element, 32, getattr(config.ScaleCalculationMode, mode))
    ours = quantize(x, name, ue8m0=rule)
    assert torch.equal(ours.scales, scales.view(torch.uint8))
    assert torch.equal(ours.data.view(torch.uint8), data.view(torch.uint8).view_as(ours.data))


# Powers of two make every order of the two scales' products exact; and multiples of an odd factor
# are never ties, which torchao, multiplying by a rounded reciprocal, may decide either way.
@pytest.mark.parametrize("overall", [2.0**-9, 1.0, 2.0**-14])
def test_nvfp4_is_that_of_torchao(overall):
    nvfp4 = independent("torchao.prototype.mx_formats.nvfp4_tensor")
    x = matrix() * 1.0009
    scales, data = nvfp4.nvfp4_quantize(x, 16, torch.tensor(overall))
    ours = quantize(x, "nvfp4", global_scale=overall)
    # torchao keeps its scales above 2**-6; those blocks are another choice, not another format.
    normal = ours.scales.to(torch.float32) >= 2.0**-6
    assert normal.float().mean() > 0.5
    assert torch.equal(ours.scales.view(torch.uint8)[normal], scales.view(torch.uint8)[normal])
    packed = (ours.data.unflatten(1, (-1, 8)), data.unflatten(1, (-1, 8)))
    assert torch.equal(packed[0][normal], packed[1][normal])


def test_nvfp4_decodes_as_by_flashinfer():
    theirs = independent("flashinfer.quantization.fp4_quantization")
    ours = quantize(matrix(), "nvfp4", global_scale=2.0**-9)
    decoded = theirs._e2m1_and_ufp8sf_scale_to_float_cpu(
        ours.data, ours.scales.view(torch.uint8), ours.global_scale, 16, 1, False
    )
    assert torch.equal(dequantize(ours), decoded)


def test_mxfp4_decodes_as_by_flashinfer():
    theirs = independent("flashinfer.quantization.fp4_quantization")
    ours = quantize(matrix(), "mxfp4")
    decoded = theirs._e2m1_and_ufp8sf_scale_to_float_cpu(
        ours.data, ours.scales, torch.ones(1), 32, 0, False
    )
    assert torch.equal(dequantize(ours), decoded)


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("fp8", {"strategy": "tensor", "type": "float", "num_bits": 8}),
        ("fp8_128x128", {"strategy": "block", "block_structure": [128, 128], "type": "float"}),
        ("fp8_1x128", {"strategy": "group", "group_size": 128, "type": "float"}),
        ("fp8_channel", {"strategy": "channel", "type": "float", "num_bits": 8}),
        ("mxint4", {"strategy": "group", "group_size": 32, "type": "int", "num_bits": 4}),
    ],
)
def test_elements_given_scales_are_those_of_compressed_tensors(name, how):
    theirs = independent("compressed_tensors.quantization")
    x = matrix()
    ours = quantize(x, name)
    scales = ours.scales.to(torch.float32)
    args = theirs.QuantizationArgs(**how)
    decoded = theirs.lifecycle.forward.fake_quantize(
        x, scales.squeeze() if name == "fp8" else scales, torch.zeros_like(scales), args
    )
    assert torch.equal(dequantize(ours), decoded)


def test_packed_fp4_is_that_of_compressed_tensors():
    theirs = independent("compressed_tensors.compressors.nvfp4.helpers")
    x = torch.tensor(E2M1 + [-value for value in E2M1])[integers(64, 64, seed=3, bits=4)]
    scales = torch.full((64, 2), 127, dtype=torch.uint8)
    ours = quantize(x, "mxfp4", scales=scales)
    assert torch.equal(ours.data, theirs.pack_fp4_to_uint8(x))
    decoded = theirs.unpack_fp4_from_uint8(ours.data, 64, 64, dtype=torch.float32)
    assert torch.equal(dequantize(ours).view(torch.int32), decoded.view(torch.int32))


@pytest.mark.parametrize("name", ALL)
def test_quantizing_again_changes_nothing(name):
    once = quantize(matrix(), name)
    again = quantize(dequantize(once), name, scales=once.scales, global_scale=once.global_scale)
    assert torch.equal(again.data.view(torch.uint8), once.data.view(torch.uint8))


def grid(element):
    """Every finite number of an element format."""
    if element == "e2m1":
        return torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)
    if element == "int4":
        return torch.arange(-8, 8, dtype=torch.float64)
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(torch.float64)
    return every[every.isfinite()]


@pytest.mark.parametrize("name", ["fp8", *BLOCKED])
def test_each_element_is_the_nearest_number_of_its_format(name):
    x = matrix(128, 128)
    q = quantize(x, name)
    scales = real_scales(q, torch.float64)
    rows, columns = (128 // size for size in scales.shape)
    scales = scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    scaled = x / scales
    best = (grid(q.format.element) - scaled.unsqueeze(-1)).abs().amin(-1)
    got = dequantize(q, torch.float64) / scales - scaled
    # The quotient is rounded to float32 before it is rounded to the format.
    assert (got.abs() <= best + 2.0**-23 * scaled.abs()).all()


@pytest.mark.parametrize("name", BLOCKED)
def test_zeros_stay_zeros_whatever_their_neighbours(name):
    x = torch.zeros(256, 256)
    x[200, 200] = 3.0
    got = fake_quantize(x, name)
    assert got[200, 200] == pytest.approx(3.0, rel=0.15)
    got[200, 200] = 0
    assert torch.equal(got, torch.zeros(256, 256))


@pytest.mark.parametrize("name", ALL)
def test_minus_zero_keeps_its_sign_where_there_is_one(name):
    x = torch.full((128, 128), -0.0)
    negative = fake_quantize(x, name).signbit()
    assert negative.all() == (name != "mxint4")
    assert negative.any() == (name != "mxint4")


@pytest.mark.parametrize("name", ["fp8_1x128", "mxfp8", "nvfp4", "mxfp4", "mxint4"])
def test_an_outlier_spoils_its_own_block_only(name):
    x = bell(2, 256, seed=5)
    x[0, 0] = 30000.0
    clean = x.clone()
    clean[0, 0] = 0
    width = FORMATS[name].block[1]
    # The scale over the whole of NVFP4 is given, or the outlier would move it too.
    how = {"global_scale": 30000 / 2688} if name == "nvfp4" else {}
    got, wanted = fake_quantize(x, name, **how), fake_quantize(clean, name, **how)
    assert got[0, 0] == pytest.approx(30000.0, rel=0.15)
    assert torch.equal(got[0, width:], wanted[0, width:])
    assert torch.equal(got[1], wanted[1])
    assert (got[0, 1:width] == 0).float().mean() > 0.9 - (name in ("fp8_1x128", "mxfp8"))


@pytest.mark.parametrize("name", ["fp8", "mxfp8", "nvfp4", "mxfp4", "mxint4"])
def test_too_large_for_a_given_scale_saturates(name):
    fmt = FORMATS[name]
    x = torch.full((1, 32), 1e30)
    x[0, 0] = torch.inf
    x[0, 1] = -torch.inf
    scales = torch.ones(fmt.scale_shape(1, 32)).to(fmt.scale_storage)
    if fmt.scale == "ue8m0":
        scales.fill_(127)
    got = fake_quantize(x, name, scales=scales, global_scale=1.0)
    largest = {"e4m3": 448.0, "e2m1": 6.0, "int4": 7.0}[fmt.element]
    assert got[0, 0] == largest
    assert got[0, 1] == (-8.0 if fmt.element == "int4" else -largest)
    assert (got[0, 2:] == largest).all()


@pytest.mark.parametrize("name", ["fp8_1x128", "fp8_128x128", "mxfp8", "nvfp4", "mxfp4"])
def test_nan_stays_in_its_block_and_is_seen(name):
    x = bell(128, 256, seed=6)
    x[0, 0] = torch.nan
    got = fake_quantize(x, name, **({"global_scale": 1e-3} if name == "nvfp4" else {}))
    assert got[0, 0].isnan()
    assert got[:, FORMATS[name].block[1] :].isfinite().all()


def test_a_row_has_a_scale_of_its_own():
    """As vLLM's and FlashInfer's dynamic quantization: the row's largest over 448, in float32."""
    x = bell(4, 96, seed=8) * torch.tensor([[1.0], [300.0], [0.01], [0.0]])
    x[1, 5] = torch.nan
    for name, least in (("fp8_channel", 0.0), ("fp8_token", 1 / 512)):
        scales = quantize(x, name).scales
        assert scales.shape == (4, 1)
        largest = [max(map(abs, row)) for row in x.tolist()]
        assert scales[0, 0] == torch.tensor(largest[0]) / 448
        assert scales[1].isnan()
        assert scales[2, 0] == torch.tensor(max(largest[2], least)) / 448
    # A row below 1/512 takes the least scale of a token: 1 / (448 * 512).
    assert quantize(x / 100, "fp8_token").scales[2, 0] == torch.tensor(1 / (448 * 512))
    got = fake_quantize(x, "fp8_token")
    assert got[1, 5].isnan()
    assert got[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_subnormal_numbers_are_no_trouble(name):
    x = bell(128, 128, seed=7) * 2.0**-140
    got = fake_quantize(x, name)
    assert got.isfinite().all()
    assert (got.abs() <= x.abs().amax() * 1.2).all()


@pytest.mark.parametrize(
    ("amax", "byte"),
    [
        (0.0, 0),
        (6 * 2.0**-127, 0),
        (6 * 2.0**-126, 1),
        (6.0, 127),
        (6.0 * (1 + 2.0**-22), 128),
        (5.0, 127),
        (3.0, 126),
        (3.4e38, 253),
        (torch.inf, 254),
        (torch.nan, 255),
    ],
)
def test_a_power_of_two_scale_is_the_smallest_that_fits(amax, byte):
    x = torch.zeros(1, 32)
    x[0, 7] = amax
    assert quantize(x, "mxfp4").scales.item() == byte


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("fp8_1x128", (4, 192)),
        ("fp8_128x128", (64, 128)),
        ("mxfp8", (4, 48)),
        ("nvfp4", (4, 24)),
        ("mxfp4", (4, 33)),
        ("mxint4", (4, 16)),
        ("fp8", (0, 32)),
    ],
)
def test_sizes_that_are_not_whole_blocks_are_refused(name, shape):
    with pytest.raises(QuantizationError, match=f"{name}: found {shape[0]} x {shape[1]} elements"):
        quantize(torch.zeros(shape), name)


def test_other_mistakes_are_named():
    with pytest.raises(
        QuantizationError, match="unknown format 'fp5'; formats: float32, bf16, fp8,"
    ):
        quantize(torch.zeros(1, 32), "fp5")
    with pytest.raises(QuantizationError, match=r"mxfp8: found torch.int32 \[1, 32\]"):
        quantize(torch.zeros(1, 32, dtype=torch.int32), "mxfp8")
    with pytest.raises(QuantizationError, match=r"mxfp8 scales: found torch.float32 \[1, 1\]"):
        quantize(torch.zeros(1, 32), "mxfp8", scales=torch.ones(1, 1))


def test_rows_are_taken_from_the_start_of_a_block():
    q = quantize(matrix(), "fp8_128x128")
    assert torch.equal(dequantize(q.rows(128, 256)), dequantize(q)[128:])
    with pytest.raises(QuantizationError, match="found rows from 64, expected a multiple of 128"):
        q.rows(64, 128)
