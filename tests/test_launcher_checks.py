"""The simulator rejects what FlashInfer rejects, with its exception, and names file and line."""

import re
import zipfile

import pytest
import torch
from good_calls import FLASHINFER, bound, changed, good_call
from launcher_cases import CASES as FRONT_CASES
from launcher_moe_cases import CASES as MOE_CASES
from test_not_simulated import CASES as NOT_SIMULATED
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


#: Rejections that FlashInfer makes twice: no call passes all other checks. The second one, and why.
TWICE = {
    "core:4782": ("launcher:5839", "DeepSeek FP8 takes Swiglu alone"),
    "core:4795": ("launcher:5866", "no other quantization is known"),
    "enums:221": ("launcher:6088", "no scales have no block size"),
    "launcher:5857": ("launcher:4340", "only FP8 hidden states are left"),
    "launcher:4241": ("launcher:4257", "0 groups are fewer than those to keep"),
    "launcher:4242": ("launcher:4255", "at least 1 group must be kept"),
    "launcher:1347": ("launcher:1352", "twice the intermediate size is even"),
    "binding:96": ("binding:110", "0 groups are fewer than those to keep"),
    "binding:97": ("binding:109", "at least 1 group must be kept"),
    "deepseek:549": ("deepseek:565", "33 shared experts are more than 32 with the routed ones"),
}


def rejecting(case):
    """The rows that reject a call: that which does, and those that would without it."""
    names = bound(*changed(case))
    first = broken(names)
    assert first is not None, f"{case}: no check rejects it"
    others = []
    for check in checks():
        # The simulator's own rows are about calls that FlashInfer takes.
        if check is first or names["entry"] not in check.entries or (first.at and not check.at):
            continue
        try:
            if not check.holds(names):
                others.append(check)
        except (AttributeError, ZeroDivisionError):
            # A row that the first one guards: it asks for the shape of what is absent.
            assert first.must.endswith("is not None") or first.must == "n_group", check
    return first, others


def test_every_check_has_a_call_that_no_other_check_rejects():
    """With one row of checks.yaml less, a call goes unnoticed that FlashInfer rejects."""
    alone, twice = set(), {}
    for case in [*CASES, *NOT_SIMULATED]:
        first, others = rejecting(case)
        if others:
            twice.setdefault(first, []).append({check.at for check in others})
        else:
            alone.add(first)
    missing = [check for check in checks() if check not in alone]
    assert {check.at for check in missing} == set(TWICE)
    for check in missing:
        assert all(TWICE[check.at][0] in others for others in twice[check]), check


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
