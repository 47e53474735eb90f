"""What is no other meaning is listed with the share of tokens that it concerns."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import torch
from strategies import DEEPSEEK

from pytest_moe_routing import logits
from pytest_moe_routing.compare import mistakes
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.oracle.effects import mask_notes, share_rerouted
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

R1 = load_models(packaged_directory())["deepseek-r1"]
#: In this pattern scores with their bias lie below -1.125: all kept experts lose to all others.
NOTE = (
    "excluded groups are masked with -1: 100.0% of the tokens of the logits pattern "
    "'bias-below-minus-1' get other experts; none where every score with its bias is above -1"
)


def judged(release, **router):
    model = replace(R1, router=replace(R1.router, **router))
    return judge(BuiltinTarget(FlashInfer.of(release)), model, "fp8_block")


def test_a_mask_is_a_note_with_the_size_of_its_effect():
    found = judged("0.6.0")
    assert (found.verdict, found.got.mask, found.findings) == ("exact", -1.0, ())
    assert found.notes[-1].fact == NOTE
    assert "mask the others with -1" in str(found.got)


def test_releases_that_mask_with_infinity_have_no_note():
    newest = judged(known_releases()[-1])
    assert newest.verdict == "exact"
    assert not any("masked" in note.fact for note in newest.notes)


def test_a_mask_does_nothing_without_a_bias_or_without_groups():
    masked = replace(DEEPSEEK, mask=-1.0)
    unbiased = replace(masked, bias=False)
    assert mask_notes(replace(DEEPSEEK, bias=False), unbiased, 256) == ()
    ungrouped = replace(masked, topk_group=8)
    assert mask_notes(replace(DEEPSEEK, topk_group=8), ungrouped, 256) == ()
    assert mask_notes(DEEPSEEK, masked, 256) == (NOTE,)


def test_what_is_wrong_besides_a_mask_is_told_without_it():
    class NoScale(BuiltinTarget):
        def kernel_call(self, model, scheme, method):
            return replace(super().kernel_call(model, scheme, method), routed_scaling_factor=1.0)

    found = judge(NoScale(FlashInfer.of("0.6.0")), R1, "fp8_block")
    assert found.verdict == "wrong"
    assert [(f.field, f.wanted, f.got) for f in found.findings] == [("scale", 2.5, 1.0)]
    assert set(found.counterexample.wanted) == set(found.counterexample.got)
    assert found.notes[-1].fact == NOTE


def test_shares():
    """Logits 2**-12 apart near 1 collapse in bfloat16; scaling moves no token to other experts."""
    flat = replace(DEEPSEEK, n_group=1, topk_group=1)
    assert share_rerouted(mistakes.BFLOAT16_LOGITS, flat, "near-ties", 256) == 1.0
    assert share_rerouted(mistakes.NO_SCALE, flat, "plain", 256) == 0.0
    assert share_rerouted(mistakes.BFLOAT16_BIAS, replace(flat, bias=False), "plain", 256) == 0.0


def test_without_torch_the_note_says_what_torch_would_add():
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from pytest_moe_routing.routing import Recipe\n"
        "from pytest_moe_routing.oracle.effects import mask_notes\n"
        "wanted = Recipe(top_k=8, score='sigmoid', bias=True, n_group=8, topk_group=4)\n"
        "masked = Recipe(top_k=8, score='sigmoid', bias=True, n_group=8, topk_group=4, mask=-1.0)\n"
        "print(*mask_notes(wanted, masked, 256))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert out.stdout == (
        "excluded groups are masked with -1: to see how many tokens that concerns, install torch\n"
    )


def test_torch_computes_shares_with_one_thread(monkeypatch):
    """Several wait for each other longer than they compute, where children use the cores."""
    threads = []
    monkeypatch.setattr(
        "pytest_moe_routing.logits.make_case",
        lambda *args, make=logits.make_case, **kwargs: (
            threads.append(torch.get_num_threads()) or make(*args, **kwargs)
        ),
    )
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        share_rerouted(
            mistakes.Mistake("none", lambda inputs: inputs), DEEPSEEK, "plain", num_experts=256
        )
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(before)
    assert threads == [1]
