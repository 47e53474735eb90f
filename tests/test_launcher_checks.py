"""The simulator rejects what FlashInfer rejects, with its exception, and names file and line."""

import re
import zipfile

import pytest
import torch
from good_calls import FLASHINFER, bound, changed, good_call
from launcher_cases import CASES as FRONT_CASES
from launcher_moe_cases import CASES as MOE_CASES
from wheels import find_wheel

from pytest_moe_routing.simulator.checks import broken, checks, files, release
from pytest_moe_routing.simulator.simulator import Simulator

CASES = [*FRONT_CASES, *MOE_CASES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rejected_where_flashinfer_rejects(case):
    function, given = changed(case)
    name, _, line = case.at.partition(":")
    with pytest.raises(case.raises, match=re.escape(f"({files()[name]}:{line}): found ")) as error:
        getattr(Simulator(FLASHINFER), function)(**given)
    assert type(error.value) is case.raises


def test_every_check_has_a_case():
    made = {broken(bound(*changed(case))) for case in CASES}
    missing = [f"{c.at} {c.must}" for c in checks() if c.at and c not in made]
    assert missing == []


def test_a_message_says_what_was_found_and_what_is_valid():
    function, given = good_call("bf16", activated="relu2")
    given["gemm1_alpha"] = torch.ones(8)
    with pytest.raises(ValueError, match="only supported") as error:
        getattr(Simulator(FLASHINFER), function)(**given)
    assert str(error.value) == (
        "gemm1_alpha, gemm1_beta, and gemm1_clamp_limit are only supported "
        "(flashinfer/fused_moe/shared/validation.py:46): found activation = 'Relu2'; "
        "expected activation in ('Swiglu', 'SwigluStep')"
    )


def test_lines_are_those_of_the_wheel():
    """Every text stands at its line of the release's own source."""
    wheel = find_wheel(f"flashinfer_python {release()}")
    if wheel is None:
        pytest.skip(f"no flashinfer_python {release()} in MOE_WHEELS")
    with zipfile.ZipFile(wheel) as archive:
        sources = {path: archive.read(path).decode().splitlines() for path in files().values()}
    wrong = [
        f"{check.at}: {check.text}"
        for check in checks()
        if check.at and check.text not in sources[check.path][int(check.at.split(":")[1]) - 1]
    ]
    assert wrong == []
