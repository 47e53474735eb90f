"""transformers as a target: its MoE blocks, run by the releases' own code."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.flashinfer import FlashInfer
from pytest_moe_routing.goldens import packaged_directory
from pytest_moe_routing.models import RouterConfig, load_models
from pytest_moe_routing.oracle.routers import NOT_JUDGED
from pytest_moe_routing.targets.source import Source
from pytest_moe_routing.targets.transformers.block import Block
from pytest_moe_routing.targets.transformers.target import TransformersTarget, config_of

MODELS = load_models(packaged_directory())
#: A package of transformers with one model, whose block is right but for what a test changes.
CONFIGURATION = """
class TinyConfig:
    def __init__(self):
        self.n_routed_experts, self.num_experts_per_tok, self.hidden_size = 2, 1, 8
        self.n_group, self.topk_group, self.norm_topk_prob = 1, 1, False
        self.routed_scaling_factor = 1.0
"""
MODELING = """
import torch
from torch import nn


class Gate(nn.Module):
    def __init__(self, config):
        super().__init__()
        rows = config.n_routed_experts + {SHARED}
        self.weight = nn.Parameter(torch.empty(rows, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.empty(config.n_routed_experts))


class TinyMoE(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.gate = config, Gate(config)
        self.experts = nn.Module()

    def forward(self, hidden):
        c = self.config
        flat = hidden.flatten(0, 1)
        with torch.autocast("cpu", torch.bfloat16, enabled={AUTOCAST}):
            scores = (flat @ self.gate.weight.T).sigmoid().float()[:, : c.n_routed_experts]
        keys = scores + self.gate.e_score_correction_bias
        grouped = keys.reshape(-1, c.n_group, c.n_routed_experts // c.n_group)
        kept = grouped.topk(2)[0].sum(2).topk(c.topk_group)[1]
        mask = torch.zeros(grouped.shape[:2]).scatter(1, kept, 1).unsqueeze(2).expand_as(grouped)
        keys = keys.masked_fill(mask.reshape(keys.shape) == 0, {FILL})
        ids = keys.topk(c.num_experts_per_tok)[1]
        weights = scores.gather(1, ids)
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
        return self.experts(flat, ids, weights).view_as(hidden) * c.routed_scaling_factor


class TinyPreTrainedModel(nn.Module):
    def __init__(self, config):
        super().__init__()

    def post_init(self):
        pass

    def save_pretrained(self, folder):
        torch.save(dict(self.named_buffers()), f"{folder}/model")

    @classmethod
    def from_pretrained(cls, folder, dtype):
        self = cls(None)
        for name, x in torch.load(f"{folder}/model").items():
            self.get_buffer(name).copy_({LOADED})
        return self
"""
RIGHT = {"{FILL}": "float('-inf')", "{LOADED}": "x", "{AUTOCAST}": "False", "{SHARED}": "0"}


def package(folder, **changes):
    """A transformers whose DeepSeek-V3 is the block above."""
    model = folder / "transformers/models/deepseek_v3"
    model.mkdir(parents=True)
    for place in (folder / "transformers", model.parent, model):
        (place / "__init__.py").write_text("")
    text = MODELING
    for mark, code in {**RIGHT, **{f"{{{k}}}": v for k, v in changes.items()}}.items():
        text = text.replace(mark, str(code))
    configuration = CONFIGURATION.replace("TinyConfig", "DeepseekV3Config")
    (model / "configuration_deepseek_v3.py").write_text(configuration)
    (model / "modeling_deepseek_v3.py").write_text(text)
    return folder


def runs_of(root, *models):
    chosen = [MODELS.get(model, model) for model in models]
    target = TransformersTarget(FlashInfer.of("0.7.0"), Source.at("transformers", root))
    try:
        return target.router_runs(chosen)
    finally:
        target.close()


def kinds(runs):
    return {(run.way, d.kind, d.cause) for run in runs for d in run.deviations}


UNDIVIDED = "groups that do not divide the experts"
MIXED = (UNDIVIDED, "experts", "the scores of several tokens are mixed")


def test_a_block_that_is_right(tmp_path):
    """But for experts that its groups do not divide, which no config class rejects here."""
    runs = runs_of(package(tmp_path), "deepseek-r1")
    assert kinds(runs) == {MIXED}
    assert {run.function for run in runs} == {"deepseek_v3.TinyMoE"}


def test_a_block_that_chooses_otherwise(tmp_path):
    runs = runs_of(package(tmp_path, FILL="0.0"), "deepseek-r1", "deepseek-v3")
    [(way, kind, cause)] = kinds(runs) - {MIXED}
    assert (way, kind) == ("eager", "experts")
    assert cause.startswith("experts of excluded groups take part")
    wrong = [run.subject for run in runs if run.way == "eager" and run.deviations]
    assert wrong == ["deepseek-r1", "deepseek-v3"]


def test_a_bias_that_is_rounded_when_a_model_is_loaded(tmp_path):
    runs = runs_of(package(tmp_path, LOADED="x.bfloat16()"), "deepseek-r1")
    assert kinds(runs) - {MIXED} == {
        ("loaded in bfloat16", "precision", "the router's correction bias is rounded to bfloat16")
    }


ROUNDED = "distinct scores become equal when autocast rounds them to bfloat16"


def test_scores_that_autocast_rounds(tmp_path):
    """With a recipe and without: a block is compared with itself. Its gate has a shared expert."""
    root = package(tmp_path, AUTOCAST="torch.is_autocast_enabled('cpu')", SHARED=1)
    other = MODELS["deepseek-v3"]
    no_recipe = replace(other.router, not_expressible="a reason")
    runs = runs_of(root, "deepseek-r1", replace(other, router=no_recipe))
    under_autocast = [run for run in runs if run.way == "under torch.autocast"]
    assert [(run.subject, run.reach) for run in under_autocast] == [
        ("deepseek-r1", "opt-in"),
        ("deepseek-v3", "opt-in"),
    ]
    assert kinds(under_autocast) == {("under torch.autocast", "precision", ROUNDED)}
    assert "tokens get other experts than without autocast" in runs[0].deviations[0].text
    assert kinds(run for run in runs if run.subject == other.id) - kinds(under_autocast) == {
        ("eager", NOT_JUDGED, "no recipe computes the router: a reason")
    }


def test_what_cannot_be_asked_is_told(tmp_path):
    [run, _, *_] = runs_of(package(tmp_path), "glm-4.5", "deepseek-r1")
    [deviation] = run.deviations
    assert (run.subject, deviation.kind) == ("glm-4.5", NOT_JUDGED)
    assert deviation.text.startswith("this release has no glm4_moe.Glm4MoeConfig")
    with pytest.raises(
        Unsupported, match="transformers is not known to have Grok1ModelForCausalLM"
    ):
        config_of(MODELS["grok-1"])


class TinyBlock(nn.Module):
    """A block with so many gates and biases, whose forward pass a test gives."""

    def __init__(self, forward, gates=1, biases=0):
        super().__init__()
        for number in range(gates):
            self.register_buffer(f"gate{number}", torch.empty(4, 4))
        for number in range(biases):
            self.register_module(f"of{number}", nn.Module())
            self.get_submodule(f"of{number}").register_buffer("expert_bias", torch.empty(4))
        self.experts = nn.Identity()
        self._forward = forward

    def forward(self, hidden):
        return self._forward(self, hidden.flatten(0, 1)).view_as(hidden)


def scaled(block, x):
    weights, ids = (x @ block.gate0.T).topk(2)
    return 2.5 * block.experts(x, ids, weights)


TINY = RouterConfig(
    num_experts=4,
    top_k=2,
    scoring_func="softmax",
    correction_bias=None,
    renormalize=False,
    logits_dtype="float32",
)


def test_the_factor_on_the_output_of_a_block_is_measured():
    """Its gate becomes the identity: these logits are what it sees."""
    logits = torch.tensor([[1.0, 0.0, 4.0, 2.0], [8.0, 2.0, 1.0, 4.0]])
    weights, ids = Block(TinyBlock(scaled), TINY).route(logits, None)
    assert ids.tolist() == [[2, 3], [0, 3]]
    assert weights.tolist() == [[10.0, 5.0], [20.0, 10.0]]


@pytest.mark.parametrize(
    ("router", "block", "problem"),
    [
        (TINY, nn.Linear(4, 4), "Linear has no experts of its own"),
        (TINY, TinyBlock(scaled, gates=0), "TinyBlock has 0 gates, not one"),
        (TINY, TinyBlock(scaled, gates=2), "TinyBlock has 2 gates, not one"),
        (TINY, TinyBlock(scaled, biases=1), "TinyBlock has 1 correction biases, not 0"),
        (
            replace(TINY, correction_bias="float32"),
            TinyBlock(scaled),
            "TinyBlock has 0 correction biases, not 1",
        ),
        (
            TINY,
            TinyBlock(lambda block, x: block.experts(x, x)),
            "the block does not call its experts with ids and weights",
        ),
        (TINY, TinyBlock(lambda block, x: x), "TinyBlock calls its experts 0 times"),
        (
            TINY,
            TinyBlock(lambda block, x: scaled(block, x) + scaled(block, x)),
            "TinyBlock calls its experts 2 times",
        ),
        (
            TINY,
            TinyBlock(lambda block, x: scaled(block, x) * x),
            "TinyBlock does more than scale what its experts return",
        ),
    ],
)
def test_a_block_that_is_not_judged(router, block, problem):
    logits = torch.tensor([[1.0, 0.0, 4.0, 2.0]])
    with pytest.raises(Unsupported) as error, torch.no_grad():
        Block(block, router).route(logits, None)
    assert str(error.value) == problem


def test_keys_of_a_config_that_decide():
    """A value that the class has by default is left to it, unless the model has another."""
    assert "topk_method" not in config_of(MODELS["deepseek-v2-lite"])["keys"]
    assert config_of(MODELS["deepseek-v2"])["keys"]["topk_method"] == "group_limited_greedy"
    assert "moe_router_score_func" not in config_of(MODELS["laguna-xs.2"])["keys"]


def test_only_routers_are_tested(tmp_path, pytester):
    """A target that calls no fused kernel is not asked for verdicts, and so has none to give."""
    target = f"transformers@{package(tmp_path / 'package')}"
    result = pytester.runpytest_subprocess(
        "--moe-golden", "--moe-target", target, "--collect-only", "-q"
    )
    tests = [line.partition("::")[2] for line in result.outlines if "::" in line]
    assert sorted(tests) == ["test_router[block]", "test_router_precision[block]"]


def test_models_that_are_not_judged_are_counted(tmp_path, pytester):
    target = f"transformers@{package(tmp_path / 'package')}"
    models = "deepseek-r1,glm-4.5,grok-1"
    result = pytester.runpytest_subprocess(
        "--moe-golden", "--moe-target", target, "--moe-models", models, "-v"
    )
    result.stdout.fnmatch_lines(
        [
            "the framework's own routers: 1 run is not judged",
            "1 x this release has no glm4_moe.Glm4MoeConfig*",
            "the framework's own routers: 1 model is not judged",
            "1 x transformers is not known to have Grok1ModelForCausalLM",
        ]
    )
