"""The MoE reference against plain loops in float64, against transformers' blocks, and itself."""

import importlib
import json
import warnings
from dataclasses import dataclass, replace

import pytest
import torch
from inverse_layouts import deinterleave_rows

from pytest_moe_routing.errors import LayerError, MoERoutingError
from pytest_moe_routing.logits import bell, distinct
from pytest_moe_routing.reference import moe as reference
from pytest_moe_routing.reference.activation import ACTIVATIONS, activation
from pytest_moe_routing.reference.moe import MoELayer, moe
from pytest_moe_routing.reference.quantization import FORMATS, Quantized, dequantize, quantize
from pytest_moe_routing.reference.routing import Routing
from pytest_moe_routing.reference.shard import Shard
from pytest_moe_routing.reference.weights import (
    Expert,
    GeneratedExperts,
    SafetensorsExperts,
    stack_rows,
)
from pytest_moe_routing.schemes import COMPUTED_SCHEMES, storage_of

TOKENS, EXPERTS, HIDDEN, INNER, TOP_K = 5, 6, 128, 256, 2
FLOAT = FORMATS["float32"]


@dataclass
class ListOfExperts:
    """The smallest provider there is."""

    experts: list

    def __len__(self):
        return len(self.experts)

    def __getitem__(self, expert):
        return self.experts[expert]


def routing(seed=3):
    ids = distinct(TOKENS, EXPERTS, seed=seed)[:, :TOP_K]
    return Routing(ids, 0.25 + bell(TOKENS, TOP_K, seed=seed).abs())


def generated(format="float32", **how):
    return GeneratedExperts(EXPERTS, HIDDEN, INNER, format, **how)


def hidden(seed=1, louder=1.0):
    return louder * bell(TOKENS, HIDDEN, seed=seed)


def exact(x, experts, routing, act, on_input=False):
    """Plain loops over tokens and slots, in float64, nothing rounded."""
    out = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token in range(len(x)):
        for slot in range(TOP_K):
            e = experts[int(routing.topk_ids[token, slot])]
            weight = routing.topk_weights[token, slot].double()
            w1, w2 = (dequantize(w, torch.float64) for w in (e.gemm1, e.gemm2))
            y = w1 @ (x[token].double() * (weight if on_input else 1))
            y = y + (0 if e.bias1 is None else e.bias1.double())
            y = w2 @ act(y) + (0 if e.bias2 is None else e.bias2.double())
            out[token] += y if on_input else y * weight
    return out


def sigmoid(x):
    return 1 / (1 + (-x).exp())


#: Each activation written out, for one row `[gate, up]`.
FORMULAS = {
    "silu": lambda g, u: g * sigmoid(g) * u,
    "gelu": lambda g, u: g * 0.5 * (1 + torch.special.erf(g * 0.5**0.5)) * u,
    "gelu_tanh": lambda g, u: g * sigmoid(2 * (2 / torch.pi) ** 0.5 * (g + 0.044715 * g**3)) * u,
    "swigluoai": lambda g, u: (
        (u.clip(-7, 7) + 1) * g.minimum(g * 0 + 7) * sigmoid(1.702 * g.minimum(g * 0 + 7))
    ),
    "swiglustep": lambda g, u: (g * sigmoid(g)).minimum(g * 0 + 7) * u.clip(-7, 7),
}


def formula(name):
    if name == "relu2":
        return lambda y: y.clip(0) ** 2
    return lambda y: FORMULAS[name](*y.split(INNER))


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
def test_unquantized_it_is_the_plain_loops(name, on_input):
    experts = generated(gated=name != "relu2", biases=True)
    layer = MoELayer.of("float32", name, "input" if on_input else "output")
    x = hidden(louder=8.0)
    got = moe(x, experts, routing(), layer, dtype=torch.float64, output_dtype=torch.float64)
    wanted = exact(x, experts, routing(), formula(name), on_input)
    assert wanted.abs().max() > 7
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def test_generated_biases_have_both_signs_and_are_small_beside_what_they_are_added_to():
    expert = generated(biases=True)[0]
    for bias in (expert.bias1, expert.bias2):
        assert -0.5 <= bias.min() < -0.4 < 0.4 < bias.max() <= 0.5
        assert abs(bias.mean()) < 0.1


@pytest.mark.parametrize("scheme", sorted(COMPUTED_SCHEMES))
def test_quantized_it_is_close_to_the_plain_loops(scheme):
    """Within what its coarsest rounding makes of it, on average: no format is taken for another."""
    experts = generated(storage_of(scheme).weight)
    x = hidden()
    got = moe(x, experts, routing(), MoELayer.of(scheme), output_dtype=torch.float32)
    wanted = exact(x, experts, routing(), formula("silu"))
    off = ((got - wanted).norm() / wanted.norm()).item()
    by_scheme = {"float32": (0, 1e-6), "nvfp4": (0.05, 0.3), "nvfp4_per_token": (0.05, 0.3)}
    low, high = by_scheme.get(scheme, (0.001, 0.12))
    assert low <= off <= high


@pytest.mark.parametrize("scheme", sorted(COMPUTED_SCHEMES))
def test_float32_and_float64_agree_but_for_rounding(scheme):
    experts = generated(storage_of(scheme).weight, intermediate_scale=0.01)
    outputs = [
        moe(
            hidden(),
            experts,
            routing(),
            MoELayer.of(scheme),
            dtype=dtype,
            output_dtype=torch.float64,
        )
        for dtype in (torch.float32, torch.float64)
    ]
    assert outputs[0].dtype == torch.float64
    assert ((outputs[0] - outputs[1]).norm() / outputs[1].norm()).item() < 0.02


@pytest.mark.parametrize("scheme", sorted(COMPUTED_SCHEMES))
def test_shards_sum_up_to_the_whole(scheme):
    experts = generated(storage_of(scheme).weight, intermediate_scale=0.01)
    layer, how = MoELayer.of(scheme), {"output_dtype": torch.float64, "dtype": torch.float64}
    whole = moe(hidden(), experts, routing(), layer, **how)
    shards = [Shard(0, 1), Shard(1, 3), Shard(4, EXPERTS - 4)]
    parts = [moe(hidden(), experts, routing(), layer, shard=shard, **how) for shard in shards]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)
    assert sum(part.abs().sum() > 0 for part in parts) > 1


@pytest.mark.parametrize("scheme", sorted(COMPUTED_SCHEMES))
def test_scaling_the_weights_scales_the_output(scheme):
    experts = generated(storage_of(scheme).weight, intermediate_scale=0.01)
    once = routing()
    twice = Routing(once.topk_ids, 2 * once.topk_weights)
    outputs = [moe(hidden(), experts, r, MoELayer.of(scheme)) for r in (once, twice)]
    assert torch.equal(outputs[1], 2 * outputs[0])


@pytest.mark.parametrize("scheme", ["bf16", "nvfp4", "fp8_block"])
def test_order_of_tokens_and_slots_does_not_matter(scheme):
    experts = generated(storage_of(scheme).weight, intermediate_scale=0.01)
    x = quantize(hidden(), storage_of(scheme).input)
    r = routing()
    flipped = Routing(r.topk_ids.flip(1), r.topk_weights.flip(1))
    whole = moe(x, experts, r, MoELayer.of(scheme), dtype=torch.float64)
    assert torch.equal(moe(x, experts, flipped, MoELayer.of(scheme), dtype=torch.float64), whole)
    for token in range(TOKENS):
        one = Quantized(
            x.format,
            x.data[token : token + 1],
            None if x.scales is None else x.scales[token : token + 1],
            x.global_scale,
        )
        alone = Routing(r.topk_ids[token : token + 1], r.topk_weights[token : token + 1])
        got = moe(one, experts, alone, MoELayer.of(scheme), dtype=torch.float64)
        torch.testing.assert_close(got, whole[token : token + 1], rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("scheme", sorted(COMPUTED_SCHEMES))
def test_rows_in_pieces_are_the_whole(monkeypatch, scheme):
    experts = generated(storage_of(scheme).weight, intermediate_scale=0.01)
    how = {"layer": MoELayer.of(scheme), "dtype": torch.float64}
    whole = moe(hidden(), experts, routing(), **how)
    monkeypatch.setattr(reference, "_CHUNK", 1024)
    assert torch.equal(moe(hidden(), experts, routing(), **how), whole)


def test_no_tokens_is_no_trouble():
    nothing = Routing(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 2))
    assert moe(hidden()[:0], generated(), nothing, MoELayer.of("nvfp4")).shape == (0, HIDDEN)


def test_progress_is_shown_when_asked_for(capsys, monkeypatch):
    """Not in the first two seconds, in which the first expert is begun."""
    monkeypatch.setattr(reference.time, "monotonic", iter([0, 2, *[2.5] * 9]).__next__)
    moe(hidden(), generated(), routing(), MoELayer.of("float32"), progress=True)
    shown = capsys.readouterr().err
    used = sorted({*routing().topk_ids.flatten().tolist()})
    assert shown == "".join(f"\rexpert {number + 1} of 6" for number in used[1:]) + "\n"
    moe(hidden(), generated(), routing(), MoELayer.of("float32"))
    assert capsys.readouterr().err == ""


def block(name, *arguments, **fields):
    """A MoE block of transformers with small sizes and weights from the portable generator."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
            config = importlib.import_module(f"transformers.models.{name}.configuration_{name}")
        except ImportError as error:
            pytest.skip(f"no independent implementation to compare with: {error}")
    return module, config


def from_tensors(gate_up, down, bias1=None, bias2=None):
    return ListOfExperts(
        [
            Expert(
                Quantized(FLOAT, gate_up[e].contiguous()),
                Quantized(FLOAT, down[e].contiguous()),
                None if bias1 is None else bias1[e],
                None if bias2 is None else bias2[e],
            )
            for e in range(EXPERTS)
        ]
    )


def run_float(x, experts, routing, layer):
    return moe(x, experts, routing, layer, output_dtype=torch.float32)


def test_gpt_oss_is_that_of_transformers():
    module, config = block("gpt_oss")
    theirs = module.GptOssExperts(
        config.GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS)
    )
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data = bell(*parameter.shape, seed=seed) / 4
    gate_up = theirs.gate_up_proj.data.transpose(1, 2)
    biases = theirs.gate_up_proj_bias.data
    experts = from_tensors(
        deinterleave_rows(gate_up),
        theirs.down_proj.data.transpose(1, 2),
        deinterleave_rows(biases.unsqueeze(-1)).squeeze(-1),
        theirs.down_proj_bias.data,
    )
    r = routing()
    with torch.no_grad():
        wanted = theirs(hidden(), r.topk_ids, r.topk_weights).view(TOKENS, HIDDEN)
    got = run_float(hidden(), experts, r, MoELayer.of("float32", "swigluoai"))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-2)
    assert wanted.abs().mean() > 10


def test_deepseek_v3_is_that_of_transformers():
    module, config = block("deepseek_v3")
    naive = getattr(module, "DeepseekV3NaiveMoe", None) or module.DeepseekV3Experts
    theirs = naive(
        config.DeepseekV3Config(
            hidden_size=HIDDEN,
            moe_intermediate_size=INNER,
            n_routed_experts=EXPERTS,
            num_local_experts=EXPERTS,
        )
    )
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data = bell(*parameter.shape, seed=seed) / 8
    experts = from_tensors(theirs.gate_up_proj.data, theirs.down_proj.data)
    r = routing()
    with torch.no_grad():
        wanted = theirs(hidden(), r.topk_ids, r.topk_weights)
    got = run_float(hidden(), experts, r, MoELayer.of("float32"))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    assert wanted.abs().mean() > 1


def test_llama4_is_that_of_transformers():
    module, config = block("llama4")
    theirs = module.Llama4TextExperts(
        config.Llama4TextConfig(
            hidden_size=HIDDEN, intermediate_size=INNER, num_local_experts=EXPERTS
        )
    )
    for seed, parameter in enumerate(theirs.parameters()):
        parameter.data = bell(*parameter.shape, seed=seed) / 8
    experts = from_tensors(
        theirs.gate_up_proj.data.transpose(1, 2), theirs.down_proj.data.transpose(1, 2)
    )
    ids = distinct(TOKENS, EXPERTS, seed=4)[:, :1]
    r = Routing(ids, bell(TOKENS, 1, seed=5).sigmoid())
    # The block weighs the input of all experts, 0 where they were not chosen, and sums them.
    weighted = hidden().repeat(EXPERTS, 1) * r.dense(EXPERTS).T.reshape(-1, 1)
    with torch.no_grad():
        wanted = theirs(weighted).view(EXPERTS, TOKENS, HIDDEN).sum(0)
    got = run_float(hidden(), experts, r, MoELayer.of("float32", "silu", "input"))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-3)
    assert wanted.abs().mean() > 0.1


@pytest.mark.parametrize(
    ("scheme", "format"),
    [("bf16", "bf16"), ("fp8_per_tensor", "fp8"), ("fp8_block", "fp8_128x128"), ("nvfp4", "nvfp4")],
)
def test_a_checkpoint_on_disk_is_opened_expert_by_expert(tmp_path, scheme, format):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    tensors = {}
    parts = {}
    for e in range(2):
        for n, (name, shape) in enumerate(
            {"gate_proj": (128, 256), "up_proj": (128, 256), "down_proj": (256, 128)}.items()
        ):
            q = quantize(bell(*shape, seed=10 * e + n), format)
            prefix = f"model.layers.3.mlp.experts.{e}.{name}"
            parts[e, name] = dequantize(q)
            tensors[f"{prefix}.weight"] = q.data
            if q.scales is not None:
                inverse = "_inv" if format == "fp8_128x128" else ""
                scales = q.scales.squeeze() if format == "fp8" else q.scales
                tensors[f"{prefix}.weight_scale{inverse}"] = scales.clone()
            if q.global_scale is not None:
                tensors[f"{prefix}.weight_scale_2"] = q.global_scale.clone()
        tensors[f"model.layers.3.mlp.experts.{e}.down_proj.input_scale"] = torch.tensor(0.5 + e)
    names = sorted(tensors)
    for shard in range(2):
        kept = {name: tensors[name] for name in names[shard::2]}
        safetensors.save_file(kept, tmp_path / f"model-{shard}.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    experts = SafetensorsExperts(tmp_path, "model.layers.3.mlp.experts", 2, scheme)
    assert len(experts) == 2
    for e in range(2):
        expert = experts[e]
        both = torch.cat([parts[e, "gate_proj"], parts[e, "up_proj"]])
        assert torch.equal(dequantize(expert.gemm1), both)
        assert torch.equal(dequantize(expert.gemm2), parts[e, "down_proj"])
        assert expert.intermediate_scale == 0.5 + e
        assert torch.equal(torch.cat(list(reference.real_rows(expert.gemm1, torch.float32))), both)
    with pytest.raises(
        LayerError, match=r"has no tensor model\.layers\.3\.mlp\.experts\.1\.w1\.weight"
    ):
        replace(experts, names=("w1", "w3", "w2"))[1]
    with pytest.raises(IndexError, match="expert 2 of 2"):
        experts[2]


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_generated_experts_are_the_same_everywhere_and_all_different(format):
    one, again = generated(format), generated(format)
    other = generated(format, seed=1)
    matrices = [dequantize(experts[e].gemm1) for experts in (one, other) for e in range(EXPERTS)]
    assert torch.equal(matrices[2], dequantize(again[2].gemm1))
    assert all(m.isfinite().all() for m in matrices)
    assert len({m.sum().item() for m in matrices}) == 2 * EXPERTS
    # Activations keep their size: a row times bell-shaped numbers of size 1 is about 1.
    size = torch.stack(matrices).square().sum(-1).mean().sqrt().item()
    assert 0.4 < size < 2.5
    with pytest.raises(IndexError, match="expert 6 of 6"):
        one[6]


def test_stacked_rows_keep_their_scales():
    parts = [quantize(bell(128, 128, seed=s) * 10**s, "fp8") for s in range(2)]
    both = stack_rows(parts)
    assert both.format.block == (128, 0)
    assert torch.equal(dequantize(both), torch.cat([dequantize(part) for part in parts]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"routing": Routing(torch.zeros(4, 2, dtype=torch.int64), torch.zeros(4, 2))}, "5 hidden"),
        ({"routing": Routing(torch.full((5, 1), 6), torch.zeros(5, 1))}, r"outside 0\.\.5"),
        ({"routing": Routing(torch.zeros(5, 2, dtype=torch.int64), torch.zeros(5, 1))}, "twice"),
        ({"shard": Shard(4, 4)}, r"shard: found Shard\(.*4.*4\), expected experts within 0\.\.5"),
        ({"shard": Shard(3, 0)}, "shard: found"),
        ({"shard": Shard(-1, 2)}, "shard: found"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, message):
    arguments = {"hidden": hidden(), "experts": generated(), "routing": routing()}
    with pytest.raises(LayerError, match=message):
        moe(**{**arguments, "layer": MoELayer.of("float32"), **change})


def test_unknown_names_are_refused():
    with pytest.raises(MoERoutingError, match="unknown scheme 'fp5'; schemes: float32, fp8_block,"):
        MoELayer.of("fp5")
    with pytest.raises(LayerError, match="unknown activation 'mish'; activations: silu, gelu,"):
        activation("mish")
