"""What happens around a call of a kernel that routes: what a server can ask of it besides routing.

Rows that pad a batch must not be routed, experts that do not lie in order must be found where they
lie, and the ids that the kernel chooses must reach a consumer that captures them. Experts whose
input has the router weight must not apply it again. A target honors such a request, rejects it
(other experts serve the layer then), or ignores it, which is wrong. The same holds for what a user
asks of the code that chooses the experts: a backend, the reasons why it chooses none, and the same
choice on each device that the kernels run on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Request(StrEnum):
    """What a server asks of the experts besides routing."""

    PADDING = "padding rows"
    BALANCING = "expert placement by load (EPLB)"
    ROUND_ROBIN = "round-robin expert placement"
    UNEVEN = "experts that ranks cannot share out evenly"
    CAPTURE = "captured expert ids"
    WEIGHT = "router weight already on the input"
    REASONS = "reasons for choosing no experts"
    BACKEND = "--moe-backend"
    DEVICE = "compute capability 10.3"
    COMPILE = "--enable-torch-compile"


class Answer(StrEnum):
    """What a target does with a request."""

    HONORED = "honored"
    REJECTED = "rejected"
    IGNORED = "ignored"
    #: Accepted, until a forward pass raises: that ends a server that has taken requests.
    FAILED = "failed"
    #: Not asked; the response says why.
    NOT_JUDGED = "not judged"


@dataclass(frozen=True)
class Response:
    """A target's answer to one request, for one model.

    Attributes:
        why: The code that decides, or what the kernel receives.
        switches: What a user has to switch on to make the request.
        source: File and line of that code, if they are known.
        raised_in: Of a forward pass that raises, see `Finding.raised_in`.
    """

    answer: Answer
    why: str
    switches: tuple[str, ...] = ()
    source: str = ""
    raised_in: str = ""


def read(answers: Mapping[str, Mapping[str, Any]]) -> dict[Request, Response]:
    """Read the answers of a child process."""
    return {
        Request(name): Response(
            Answer(given["answer"]),
            given["why"],
            tuple(given["switches"]),
            given.get("source", ""),
            given.get("raised_in", ""),
        )
        for name, given in answers.items()
    }
