"""How a target lays out the weights of a kernel's call."""

from __future__ import annotations

from dataclasses import dataclass

from pytest_moe_routing.oracle.finding import Finding


@dataclass(frozen=True)
class LaidOut:
    """The call of a kernel that is given the weights of a checkpoint.

    Attributes:
        function: The entry point.
        method: The file and the class that prepare the weights.
        findings: What lies otherwise than the entry point reads it.
        switches: Those without which the call is not made; None if that cannot be asked.
        device: The GPU, if it is not the usual one.
        refused: What the target raised when it made a layer; then there is no call.
        run: The lines of the target that made a quantization config, and that called the kernel.
        unanswered: Why nothing is known of the call, if so; then nothing is found either.
    """

    function: str
    method: str
    findings: tuple[Finding, ...]
    switches: tuple[str, ...] | None = ()
    device: str = ""
    refused: Finding | None = None
    unanswered: str = ""
    run: tuple[str, ...] = ()
