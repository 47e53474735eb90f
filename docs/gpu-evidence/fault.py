"""A real device fault among GPU tests: it fails its own test, and the worker is replaced.

    pytest docs/gpu-evidence/fault.py -n 4

Output of an H200: fault.txt. The faulty test counts twice: as failed, and as its worker's last.
"""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("n", range(12))
def test_gpu(moe_gpu, n):
    numbers = torch.arange(8, device="cuda")
    if n == 5:
        import triton
        import triton.language as tl

        @triton.jit
        def wild_store(pointer):
            tl.store(pointer + (1 << 40), 1)

        wild_store[(1,)](numbers)
    assert int(numbers.sum()) == 28
