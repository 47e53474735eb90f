"""Benchmarks run with one thread, so that their ratios do not depend on what else is running."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    torch.set_num_threads(1)
