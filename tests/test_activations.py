"""gelu and its approximation with tanh: two activations, in configs, kernels and frameworks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from miniatures import AsksForTwo

from pytest_moe_routing.data import read_data
from pytest_moe_routing.failure import Rank
from pytest_moe_routing.flashinfer import FlashInfer, known_releases
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import load_models
from pytest_moe_routing.models.spec import MOST_APART, NEARLY
from pytest_moe_routing.oracle.calls import ACTIVATIONS, CUTLASS_ACTIVATIONS, wrong_activation
from pytest_moe_routing.oracle.finding import Finding, Kind, nearly
from pytest_moe_routing.oracle.judge import judge
from pytest_moe_routing.oracle.model_code import compare_request
from pytest_moe_routing.oracle.other_experts import WrongCall, other_calls
from pytest_moe_routing.oracle.target import Captured, OtherCall
from pytest_moe_routing.oracle.verdict import Verdict
from pytest_moe_routing.reference.activation import activation
from pytest_moe_routing.report.text import sentence
from pytest_moe_routing.suite.causes import of_model_code, of_other_experts
from pytest_moe_routing.targets.builtin.target import BuiltinTarget

MODELS = load_models(packaged_directory())
R1, GEMMA = MODELS["deepseek-r1"], MODELS["gemma-4-26b-a4b"]
FLASHINFER = FlashInfer.of(known_releases()[-1])
NAMES = read_data("pytest_moe_routing.models.huggingface", "families.yaml")["activations"]
#: ActivationType of FlashInfer 0.6.14 and later.
SWIGLU, GEGLU, GEGLU_TANH = 3, 4, 8
SLIGHT = nearly("gelu_tanh", "gelu")


def with_activation(name):
    return replace(R1, experts=replace(R1.experts, activation=name))


@pytest.mark.parametrize("name", ["gelu", *(name for name in NAMES if name.startswith("gelu_"))])
def test_names_of_transformers_mean_what_its_functions_compute(name):
    functions = pytest.importorskip("transformers.activations").ACT2FN
    if name not in functions:
        assert name == "gelu_tanh"  # A name of the frameworks alone.
        return
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    ones = torch.ones_like(x)
    ours = activation(NAMES[name])(torch.stack([x, ones], -1)).squeeze(-1)
    torch.testing.assert_close(ours, functions[name](x), rtol=0, atol=1e-11)


def test_no_name_stands_for_an_activation_of_another_shape():
    """gelu_10 is clipped, and quick_gelu is 0.02 away."""
    assert not {"gelu_10", "quick_gelu"} & NAMES.keys()


def test_the_two_are_no_further_apart_than_is_said():
    x = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    both = torch.stack([x, torch.ones_like(x)], -1)
    apart = (activation("gelu")(both) - activation("gelu_tanh")(both)).abs().max()
    assert 0.9 * MOST_APART < apart < MOST_APART
    assert {NEARLY[other]: other for other in NEARLY} == NEARLY


def test_models_have_the_one_of_their_code():
    """xai-org/grok-1 calls jax.nn.gelu, which approximates; Gemma's config names the function."""
    assert GEMMA.experts.activation == MODELS["grok-1"].experts.activation == "gelu_tanh"


def told(name, number, kernels, release=FLASHINFER.release):
    found = wrong_activation("activation_type", number, name, kernels, FlashInfer.of(release))
    return [(finding.kind, sentence(finding)) for finding in found]


SLIGHTLY = "; the two differ by at most 0.0005"


@pytest.mark.parametrize(
    ("name", "number", "found"),
    [
        ("gelu", GEGLU, []),
        ("gelu_tanh", GEGLU_TANH, []),
        (
            "gelu",
            GEGLU_TANH,
            [(Kind.NEARLY, f"activation: the experts have gelu, the kernel gelu_tanh{SLIGHTLY}")],
        ),
        (
            "gelu_tanh",
            GEGLU,
            [(Kind.NEARLY, f"activation: the experts have gelu_tanh, the kernel gelu{SLIGHTLY}")],
        ),
        (
            "gelu_tanh",
            SWIGLU,
            [(Kind.ARGUMENT, "activation_type arrives as Swiglu, the layer has GegluTanh")],
        ),
    ],
)
def test_cutlass_kernels_have_both(name, number, found):
    assert told(name, number, CUTLASS_ACTIVATIONS) == found


def test_what_a_release_cannot_compute_more_nearly_is_a_note():
    """FlashInfer has GegluTanh from 0.6.14 on."""
    note = f"the kernel computes gelu for gelu_tanh{SLIGHTLY}"
    assert told("gelu_tanh", GEGLU, CUTLASS_ACTIVATIONS, "0.6.13") == [(Kind.PRECISION, note)]
    assert told("gelu_tanh", GEGLU, CUTLASS_ACTIVATIONS, "0.6.14")[0][0] is Kind.NEARLY


def test_trtllms_kernels_have_the_approximation():
    assert told("gelu_tanh", GEGLU, ACTIVATIONS) == []
    note = f"the kernel computes gelu_tanh for gelu{SLIGHTLY}"
    assert told("gelu", GEGLU, ACTIVATIONS) == [(Kind.PRECISION, note)]
    for name in NEARLY:
        (found,) = told(name, GEGLU_TANH, ACTIVATIONS)
        assert found[1] == "activation_type arrives as GegluTanh, the layer has Geglu"


class Told(BuiltinTarget):
    """Makes a call with a note."""

    def gates(self, model, scheme, method):
        return ()

    def capture(self, model, scheme, method):
        note = replace(SLIGHT, kind=Kind.PRECISION)
        return Captured(self.kernel_call(model, scheme, method), (note,))

    def other_experts(self, model, scheme):
        wrong = Finding(Kind.ARGUMENT, "ep_rank", 1, 0, SLIGHT.where)
        return (OtherCall("Experts", "Blackwell", (), requests=False, findings=(SLIGHT, wrong)),)


def test_what_the_kernel_has_nothing_nearer_to_is_a_note_in_its_verdict():
    record = judge(Told(FLASHINFER), with_activation("gelu"), "nvfp4").record()
    assert record.verdict is Verdict.EXACT
    assert SLIGHT.fact in [note.fact for note in record.notes]


def test_a_slight_difference_is_a_cause_of_its_own_in_other_experts():
    target = Told(FLASHINFER)
    slight, wrong = other_calls(target, "nvfp4", [R1]).wrong
    assert (slight.findings, [f.field for f in wrong.findings]) == ((SLIGHT,), ["ep_rank"])
    failure = of_other_experts(target, "nvfp4", slight)
    assert (failure.rank, failure.cause) == (
        Rank.DOWNCAST,
        "other-experts:nearly-activation:Experts",
    )
    loud = WrongCall(slight.call, (SLIGHT, *wrong.findings), (R1,))
    assert of_other_experts(target, "nvfp4", loud).rank is Rank.SILENT


def test_a_slight_difference_is_a_cause_of_its_own_in_model_code():
    request = replace(AsksForTwo(FLASHINFER).layer_request(R1), experts={"activation": "gelu"})
    judgement = compare_request(with_activation("gelu_tanh"), request)
    parts = [of_model_code(part) for part in judgement.by_effect()]
    assert [part.rank for part in parts] == [Rank.SILENT, Rank.DOWNCAST]
    assert [part.cause.split(":")[1] for part in parts][1] == "nearly-activation"
    text = f"activation: the experts have gelu_tanh, the model code asks for gelu{SLIGHTLY}"
    assert text in parts[1].lines[1]
    assert text not in "".join(parts[0].lines)
    # Another activation is another matter.
    [wrong] = compare_request(with_activation("silu"), request).by_effect()
    assert "nearly" not in of_model_code(wrong).cause
