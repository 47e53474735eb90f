"""Weights of a checkpoint that a framework's model code loads into another matrix's place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MisnamedWeight:
    """A weight of an expert, or of shared experts, that takes another one's place.

    Attributes:
        name: What the checkpoint calls it.
        own: Which matrix that is: gate, up or down; empty if the name is not known.
        place: The matrix whose place it takes.
        line: The line in its file.
        file: The file, from the package on.
        function: The class or function that the line is in.
    """

    name: str
    own: str
    place: str
    line: int
    file: str = ""
    function: str = ""
