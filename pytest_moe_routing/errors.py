"""Mistakes a user can make. Each is one message; none is shown with a traceback."""

from __future__ import annotations

import os
from types import FrameType

from pytest_moe_routing.escape import brief, printable


class MoERoutingError(Exception):
    """Base of every error that is the user's to fix: what, where, and what would be valid.

    Messages quote files and frameworks; they are safe to show on a terminal.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class ModelError(MoERoutingError):
    """A model description or another YAML file is wrong. Names the file, the line and the key."""


class ReleaseError(MoERoutingError):
    """A FlashInfer release that cannot be judged."""


class DataError(MoERoutingError):
    """A row of this package's own data that cannot be. Names the file and the row."""


class RecipeError(MoERoutingError):
    """A recipe or a tensor that cannot be routed."""


class QuantizationError(MoERoutingError):
    """A tensor that does not fit its number format, its blocks or its layout."""


class LayerError(MoERoutingError):
    """A MoE layer whose tokens, experts, formats or activation do not fit together."""


class TargetError(MoERoutingError):
    """A target cannot be used at all, or failed at a question.

    Attributes:
        cause: What failed, in a few stable words.
        summary: The message in one line, without a traceback.
    """

    def __init__(self, message: str, cause: str = "", summary: str = "") -> None:
        super().__init__(message)
        self.cause = cause or type(self).__name__
        self.summary = printable(summary or brief(message))


class UnknownTarget(TargetError):
    """No target has this name."""


class TargetNotInstalled(TargetError):
    """The target is known, but its package is not in this environment."""


class TargetImportError(TargetError):
    """The target's package is installed and fails to import."""


class GpuMemoryError(MoERoutingError):
    """A GPU test does not get the memory that it needs. Says how much is free."""


class NotSimulated(MoERoutingError):
    """A call that FlashInfer does not reject and the simulator does not model."""


class Unsupported(MoERoutingError):
    """A target cannot answer this question. Becomes a skip with this reason, never a pass."""


def place_of(frame: FrameType, line: int) -> str:
    """Return a line of a package's code as `PACKAGE/FILE:LINE`."""
    name = str(frame.f_globals.get("__name__")).partition(".")[0]
    file = frame.f_code.co_filename.replace(os.sep, "/").rpartition(f"/{name}/")[2]
    return f"{name}/{file}:{line}"
