"""How far a correct implementation may be off, by its arithmetic. One table.

Each number has a derivation. None is a guess, and none is a share of elements that may be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Precision:
    """Error bounds of an implementation.

    Attributes:
        sigmoid: Largest absolute error of its sigmoid (values lie in 0..1), if more than relative.
        relative: Largest relative error of a score, of a score plus bias, and of a sum.
        weight: Largest relative error of rounding a finished weight to its dtype.
    """

    sigmoid: float
    relative: float
    weight: float


PRECISIONS: Mapping[str, Precision] = {
    # A few units of 2**-53 in exp, sums and quotients.
    "float64": Precision(sigmoid=1e-15, relative=1e-14, weight=1e-14),
    # torch on a CPU or GPU: exp to 2 ulp of 2**-24, sums over up to 2048 experts, one division. Its
    # sigmoid, 1 / (1 + exp(-x)), is as exact where it is tiny (1.5e-7 over 16 million x in +-120).
    "float32": Precision(sigmoid=0.0, relative=2e-6, weight=1e-6),
    # The same, with weights that are rounded to bfloat16 (half a step is 2**-9) before and after
    # they are normalized and scaled, as transformers rounds them.
    "bfloat16-weights": Precision(sigmoid=0.0, relative=2e-6, weight=2**-7),
    # vLLM's grouped_topk: 0.5 * tanhf(0.5 * x) + 0.5. CUDA documents tanhf to 2 ulp, which near -1
    # is 2**-23; it is halved, and the sum is rounded to 2**-25: 9e-8 in all, however small the
    # sigmoid is. Measured on an H100 over +-24 (docs/gpu-evidence/router-scores.txt): 6.8e-8.
    "vllm-grouped": Precision(sigmoid=1e-7, relative=2e-6, weight=1e-6),
    # FlashInfer's kernels: 0.5 * tanh.approx.f32(0.5 * x) + 0.5, which CUDA documents to 2**-10.987
    # relative, so at most 2.5e-4 for the sigmoid; exp and division to a few 2**-22; weights are
    # rounded to bfloat16, whose numbers near 1 are 2**-7 apart.
    "flashinfer": Precision(sigmoid=2.5e-4, relative=4e-6, weight=2**-8),
    # The same kernels on Hopper. Measured on an H200 (docs/gpu-evidence): over 4 million logits in
    # +-24 the sigmoid is off by at most 3.9e-6, and is not monotone; three times that is allowed.
    "flashinfer-sm90": Precision(sigmoid=1.2e-5, relative=4e-6, weight=2**-8),
}
