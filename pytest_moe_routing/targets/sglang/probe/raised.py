"""What an exception in SGLang's code says about a model that is built and run here."""

from __future__ import annotations

import traceback
from pathlib import Path
from textwrap import shorten
from types import FrameType

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import preparation
from pytest_moe_routing.targets.answers import RuleAnswer
from pytest_moe_routing.targets.limits import is_missing
from pytest_moe_routing.targets.stubs import Stub
from pytest_moe_routing.targets.unwritten import frames_of, is_unwritten, raised_in


class NotBuiltError(Unsupported):
    """SGLang's code rejects what it is to build, before it has all layers of a block."""


def verdict_on(error: Exception, *, is_built: bool) -> tuple[str, str, str]:
    """Return whether SGLang rejects a model, fails over the method, or nothing can be said.

    The second is the exception in words, the third the place: see `Finding.raised_in`.

    Code that does not build rejects a model when the server starts. What raises in a forward pass
    ends a server that has taken requests.

    Raises:
        Exception: The error, if code does not build as FlashInfer lacks what it needs.
    """
    frames = frames_of(error)
    places = [_within(frame.filename) for frame in frames]
    last, place = frames[-1], places[-1]
    text = shorten(f"{type(error).__name__}: {error}", 300)
    # Stand-ins fail in files of ours or of torch: what matters is who asked them.
    asked = next((i for i in reversed(range(len(frames))) if places[i]), -1)
    file = f"sglang/srt/{places[asked]}" if places[asked] else Path(last.filename).name
    where = f"{file}:{frames[asked].lineno}"
    code = raised_in(error, lambda file: bool(_within(file)))
    line = last.line or ""
    if is_missing(error):
        if not is_built:
            # Nobody has meant to reject the model.
            raise error
        return "failed", f"{text} ({where})", code
    is_judged = not (_saw_a_stub(error) or is_unwritten(error, lambda file: bool(_within(file))))
    # What FlashInfer asserts about weights is part of what a server does when it starts.
    of_flashinfer = last.filename == preparation.__file__
    if (place or of_flashinfer) and "Stub" not in text and is_judged:
        if isinstance(error, AssertionError) or line.startswith("raise "):
            # An assertion without a message is told by what it asserts.
            shown = f"{text} ({where})" if str(error) else f"{text[:-1]} ({where}: {line})"
            return "failed" if is_built else "refused", shown, code
        if "routing_method_type" in line or "TopKOutput" in text:
            return "failed", f"{text} ({where}: {line})", code
    return "unknown", f"it does not build and run on a CPU: {text} ({where})", code


def raising(error: Exception) -> RuleAnswer:
    """Return the function of SGLang's in which an exception was raised, and its line."""
    *_, last = (
        f for f, _ in traceback.walk_tb(error.__traceback__) if _within(f.f_code.co_filename)
    )
    return place_of(last)


def place_of(frame: FrameType) -> RuleAnswer:
    """Return the function that a frame runs, or ran last, and its line."""
    module = frame.f_globals["__name__"].replace(".", "/")
    source = f"{module}.py:{frame.f_lineno}"
    return {"name": frame.f_code.co_qualname, "source": source, "instead": ""}


def is_of_stand_ins(error: Exception) -> bool:
    """Return whether an exception comes of what is not here: a GPU, its libraries, whole weights.

    Such an operator of torch raises a `RuntimeError` where no code of SGLang raises it. Everything
    else is SGLang's own doing.
    """
    last = traceback.extract_tb(error.__traceback__)[-1]
    of_torch = isinstance(error, RuntimeError) and not (last.line or "").startswith("raise ")
    return of_torch or "Stub" in str(error) or _saw_a_stub(error)


def _within(file: str) -> str:
    """Return the path of a file within SGLang's code; "" for any other file."""
    return file.replace("\\", "/").partition("/sglang/srt/")[2]


def _saw_a_stub(error: Exception) -> bool:
    """Return whether the function that raised had a stand-in, which may be why it did."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return any(isinstance(value, Stub) for value in frame.f_locals.values())
