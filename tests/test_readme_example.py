"""README's example test passes a right kernel, and fails on each of a set of wrong ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
[EXAMPLE] = re.findall(
    r"```python\n(.*?def test_my_kernel.*?)```", README.read_text("utf-8"), re.DOTALL
)
#: A routing kernel in plain torch, with one mistake; each is one that a real kernel has made.
KERNEL = """
import pytest
import torch

MISTAKE = {mistake!r}


def my_kernel(logits, bias, recipe):
    logits = logits.double()
    scores = {{"sigmoid": torch.sigmoid, "identity": lambda x: x}}[recipe.score](logits)
    keys = scores if bias is None or MISTAKE == "no bias" else scores + bias
    if recipe.n_group > 1 and MISTAKE != "no groups":
        groups = keys.unflatten(1, (recipe.n_group, -1))
        rank = groups.amax(2) if MISTAKE == "max of groups" else groups.topk(2).values.sum(2)
        kept = torch.zeros_like(rank, dtype=torch.bool)
        kept.scatter_(1, rank.sort(descending=True, stable=True).indices[:, : recipe.topk_group], 1)
        fill = 0.0 if MISTAKE == "masked with 0" else -torch.inf
        keys = groups.masked_fill(~kept.unsqueeze(2), fill).flatten(1)
    order = keys.sort(descending=True, stable=True).indices
    if MISTAKE == "ties to the higher index":
        order = keys.shape[1] - 1 - keys.flip(1).sort(descending=True, stable=True).indices
    ids = order[:, : recipe.top_k]
    source = keys if MISTAKE == "weights of biased scores" else scores
    weights = source.gather(1, ids)
    if recipe.weigh_by != recipe.score:
        weights = torch.sigmoid(weights)
    if recipe.normalize == "sum" and MISTAKE != "not normalized":
        weights = weights / (weights.sum(1, keepdim=True) + recipe.epsilon)
    if MISTAKE != "no scale":
        weights = weights * recipe.scale
    if MISTAKE == "last token lost" and len(ids) % 16 == 1 and len(ids) > 1:
        ids[-1], weights[-1] = 0, 0
    return ids, weights
"""
MISTAKES = (
    "no bias",
    "no groups",
    "max of groups",
    "masked with 0",
    "ties to the higher index",
    "weights of biased scores",
    "not normalized",
    "no scale",
    "last token lost",
)


def run(pytester, mistake):
    pytester.makepyfile(test_kernel=KERNEL.format(mistake=mistake) + EXAMPLE)
    return pytester.runpytest_subprocess("-q", "-p", "no:cacheprovider", "-n0")


def test_the_example_passes_a_right_kernel(pytester):
    result = run(pytester, None)
    outcomes = result.parseoutcomes()
    assert outcomes["passed"] > 30
    assert set(outcomes) == {"passed"}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_example_fails_on_a_wrong_kernel(pytester, mistake):
    assert run(pytester, mistake).parseoutcomes()["failed"] > 0
