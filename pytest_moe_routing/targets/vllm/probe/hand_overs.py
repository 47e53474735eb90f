"""Which lines of vLLM make a quantization config or call FlashInfer while a layer is run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from pytest_moe_routing.targets.vllm.hand_overs import MAKES
from pytest_moe_routing.targets.vllm.probe import release
from pytest_moe_routing.targets.vllm.probe.method import class_of
from pytest_moe_routing.targets.vllm.probe.release import names

_MAKES = MAKES.fullmatch
_END = "_moe_quant_config"


@contextmanager
def noting(found: dict[str, None]) -> Iterator[None]:
    """Note each line that calls a function that makes a quantization config, meanwhile.

    Args:
        found: Gets the lines, as `vllm/FILE:LINE`.
    """
    made = names().get("quant-config")
    makes = made.__code__, class_of(made).__init__.__code__

    def note(frame: FrameType, _event: str, _: Any) -> None:
        # Called for each function of Python's: what is not looked for has to be left soon.
        name = frame.f_code.co_name
        if (name.endswith(_END) and _MAKES(name)) or frame.f_code in makes:
            caller = frame.f_back
            if caller is not None and release.is_of_vllm(caller.f_code.co_filename):
                file = release.vllm_path(caller.f_code.co_filename)
                found[f"{file}:{caller.f_lineno}"] = None

    before = sys.gettrace()
    sys.settrace(note)
    try:
        yield
    finally:
        sys.settrace(before)


def called_at(error: BaseException) -> str:
    """Return the line of vLLM that called a kernel, of what the call ended in."""
    frames, traced = [], error.__traceback__
    while traced is not None:
        frames.append((traced.tb_frame, traced.tb_lineno))
        traced = traced.tb_next
    return release.line_of_kernel(release.lines(frames))
