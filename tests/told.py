"""Findings in the words that a reader gets, for tests."""

from __future__ import annotations

from pytest_moe_routing.report.text import sentence


def code_sentences(judgement):
    """What is wrong with a request of model code, each with the argument that it passes."""
    who = "the model", "the model code asks for"
    return [
        sentence(finding, *who) + (f" ({finding.where})" if finding.where else "")
        for finding in judgement.findings
    ]
