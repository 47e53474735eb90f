"""Tells exceptions of a framework's code apart.

One kind says that code is not there, another that it rejects its input. Both raise
`NotImplementedError`. Only a framework's own `raise` says something about a model, and only if the
framework, not the probe, chose to call that function.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import PurePath


def is_unwritten(error: BaseException, is_own: Callable[[str], bool]) -> bool:
    """Return whether an exception only means that code is missing.

    So does the error of an operator of torch that has no kernel for a CPU, that of a stand-in, and
    that of an abstract method of the framework if the probe called it.

    Args:
        is_own: Whether a file, given by its path, is of the framework's own code.
    """
    if not isinstance(error, NotImplementedError):
        return False
    *callers, last = traceback.extract_tb(error.__traceback__)
    if not is_own(last.filename) or not (last.line or "").startswith("raise "):
        return True
    # A module's `forward` is called by torch, for whoever called the module.
    caller = next((f.filename for f in reversed(callers) if "/torch/" not in f.filename), "")
    return not error.args and not is_own(caller)


def frames_of(error: BaseException) -> traceback.StackSummary:
    """Return the frames that an exception went through, without columns: these take most time."""
    return traceback.StackSummary.extract(traceback.walk_tb(error.__traceback__))


def raised_in(error: BaseException, is_own: Callable[[str], bool]) -> str:
    """Return the type of an exception, with file and function of the framework that it came from.

    Neither lines nor the message are part of it: other code and other values change those.

    Args:
        is_own: As above.
    """
    frames = frames_of(error)
    last = next((frame for frame in reversed(frames) if is_own(frame.filename)), None)
    place = "" if last is None else f"-in-{PurePath(last.filename).name}-{last.name.strip('<>')}"
    return type(error).__name__ + place
