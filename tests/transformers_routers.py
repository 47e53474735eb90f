"""The routers of the transformers library: which class, made how, called how. Data for the oracle.

Class names and calls are those of transformers 5.19.0 to 5.24.0; a family that is newer than the
installed release is left out, by its `since`. Most routers return (logits, weights, experts); what
does otherwise has a function here that says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import transformers
from packaging.version import Version
from transformers_calls import (
    afmoe,
    bias_given,
    block,
    dbrx,
    either_order,
    gemma,
    inkling,
    jamba,
    jetmoe,
    laguna,
    llama4,
    logits_first,
    without_experts,
)

from pytest_moe_routing.models.huggingface.families import table

#: Experts, experts per token, groups, groups kept. With 4 experts in a group, a token needs two.
E, K, GROUPS, KEPT = 32, 4, 8, 3


@dataclass(frozen=True)
class Case:
    """A family's router class and a small config of it.

    Attributes:
        family: The row of `families.yaml`, which names the config class.
        router: The router's class, or its block's where the block does a part of it.
        config: Arguments of the config class.
        make: Makes the router from its class and the config.
        call: Runs it: hidden states `[T, H]`, bias `[E]` or None -> experts, weights, logits.
        rounds_scores: In bfloat16 it computes the scores in bfloat16, not float32.
        void: Mutations that mean nothing for this config, beyond those of the family's kind.
    """

    family: str
    router: str
    config: dict = field(default_factory=dict)
    make: Callable = lambda cls, config: cls(config)
    call: Callable = lambda router, x, bias: logits_first(router(x))
    rounds_scores: bool = False
    void: tuple = ()
    id: str = ""

    def __str__(self):
        return self.id or self.family


def _ffn(norm=1.0):
    sizes = {"moe_num_experts": E, "moe_top_k": K, "ffn_hidden_size": 16}
    return {"ffn_config": {**sizes, "moe_normalize_expert_weights": norm}}


def _sized(cls, config):
    return cls(config.hidden_size, config.num_local_experts, config.num_experts_per_tok)


GROUPED = {
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "n_group": GROUPS,
    "topk_group": KEPT,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
GROUPS_OF_4 = {"n_group": GROUPS, "topk_group": KEPT, "routed_scaling_factor": 2.5}
GROUPED_LOCAL = {"num_local_experts": E, "num_experts_per_tok": K, **GROUPS_OF_4}
NAMED = {"num_experts": E, "num_experts_per_tok": K}
LOCAL = {"num_local_experts": E, "num_experts_per_tok": K}
PLAIN = {"n_routed_experts": E, "num_experts_per_tok": K}
GREEDY = {**PLAIN, "routed_scaling_factor": 16.0}
ERNIE = {"moe_num_experts": E, "moe_k": K}
ARIA = {"moe_num_experts": E, "moe_topk": K}
LONGCAT = {"n_routed_experts": E, "moe_topk": K}
GEMMA = {"num_experts": E, "top_k_experts": K, "moe_intermediate_size": 16}
LIMITED = {
    **GREEDY,
    "topk_method": "group_limited_greedy",
    "n_group": GROUPS,
    "topk_group": KEPT,
}
KIMI = {
    "num_experts": E,
    "num_experts_per_token": K,
    "num_expert_group": GROUPS,
    "topk_group": KEPT,
}
LFM2 = {**NAMED, "routed_scaling_factor": 1.5}
SIGMOID = {**NAMED, "expert_selection_fn": "sigmoid"}
#: Heads that divide the small width.
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}
#: Widths of blocks whose experts are not called: anything but E, by which the gate is recognised.
NARROW = {"intermediate_size": 16, "moe_intermediate_size": 16}

UNGROUPED = ("groups ignored", "other group score")
UNSCALED = ("scale ignored",)
#: A softmax over the chosen already sums to 1.
SUMS_TO_ONE = ("renormalize flipped",)
#: Mutations that mean nothing for a kind of router, the row's `router`: it has no such step.
VOID = {
    "noaux-tc": (),
    "sigmoid-bias": UNGROUPED,
    "sigmoid": ("bias ignored", *UNGROUPED, *UNSCALED),
    "softmax": ("bias ignored", *UNGROUPED, *UNSCALED),
    "softmax-bias": UNGROUPED,
    "softmax-groups": ("bias ignored",),
    "logits-first": ("bias ignored", *UNGROUPED, *UNSCALED),
}

CASES = [
    # sigmoid, bias, groups
    Case("deepseek_v3", "DeepseekV3TopkRouter", GROUPED),
    Case("deepseek_v3", "DeepseekV3TopkRouter", {**GROUPED, "norm_topk_prob": False}, id="raw_v3"),
    Case(
        "deepseek_v3",
        "DeepseekV3TopkRouter",
        {**GROUPED, "n_group": 1, "topk_group": 1},
        void=UNGROUPED,
        id="kimi_k2",
    ),
    Case("deepseek_v32", "DeepseekV32TopkRouter", GROUPED),
    Case("axk1", "AXK1TopkRouter", GROUPED),
    Case("axk2", "AXK2TopkRouter", PLAIN, void=UNGROUPED),
    Case("dots1", "Dots1TopkRouter", GROUPED),
    Case("exaone_moe", "ExaoneMoeTopkRouter", {**NAMED, "n_group": GROUPS, "topk_group": KEPT}),
    Case("glm4_moe", "Glm4MoeTopkRouter", GROUPED),
    Case("glm4_moe_lite", "Glm4MoeLiteTopkRouter", GROUPED),
    Case("glm4v_moe_text", "Glm4vMoeTextTopkRouter", GROUPED),
    Case("glm5_next_text", "Glm5NextTextTopkRouter", GROUPED),
    Case("glm_moe_dsa", "GlmMoeDsaTopkRouter", GROUPED),
    Case("hy_v4", "HYV4TopkRouter", GROUPED),
    Case("kimi_linear", "KimiLinearTopkRouter", KIMI),
    Case("mimo_v2_flash", "MiMoV2FlashTopkRouter", GROUPED),
    Case("nemotron_h", "NemotronHTopkRouter", GROUPED),
    Case("solar_open", "SolarOpenTopkRouter", GROUPED),
    # sigmoid, bias
    Case("minimax_m2", "MiniMaxM2TopKRouter", LOCAL, call=bias_given, void=UNSCALED),
    Case("minimax_m3_vl_text", "MiniMaxM3VLSparseMoeBlock", {**LOCAL, **NARROW}, **block("gate")),
    Case(
        "step3p5",
        "Step3p7SparseMoeBlock",
        {**PLAIN, **NARROW, "moe_router_scaling_factor": 3.0},
        **block("gate", 0),
    ),
    Case("hy_v3", "HYV3TopKRouter", NAMED, call=bias_given),
    Case("afmoe", "AfmoeTokenChoiceRouter", {**NAMED, "route_scale": 2.826}, call=afmoe),
    Case(
        "laguna",
        "LagunaSparseMoeBlock",
        {**NAMED, **NARROW, "moe_routed_scaling_factor": 2.5},
        **block("gate"),
    ),
    Case("lfm2_moe", "Lfm2MoeTopKRouter", LFM2, call=bias_given, rounds_scores=True),
    Case(
        "lfm2_moe",
        "Lfm2MoeTopKRouter",
        {**LFM2, "use_expert_bias": False},
        rounds_scores=True,
        void=("bias ignored",),
        id="lfm2_moe-unbiased",
    ),
    Case("deepseek_v4", "DeepseekV4TopKRouter", PLAIN, rounds_scores=True),
    Case("bailing_hybrid", "BailingHybridTopkRouter", {**GROUPED_LOCAL, "norm_topk_prob": True}),
    Case("beam", "BeamMoE", {**NAMED, **NARROW, **GROUPS_OF_4}, **block("gate")),
    Case("dots3_note_text", "Dots3NoteTextTopkRouter", GROUPED),
    Case("hy_v4_vl_text", "HYV4VLTopkRouter", GROUPED),
    # transformers runs these two as other families' classes.
    Case("sarvam_mla", "deepseek_v3.DeepseekV3TopkRouter", GROUPED),
    Case("sarvam_moe", "glm4_moe.Glm4MoeTopkRouter", GROUPED),
    Case("flint", "FlintTopKRouter", NAMED),
    # softmax
    Case("mistral_large4_text", "MistralLarge4TextTopkRouter", GROUPED, void=()),
    Case("unlimited_ocr_text", "UnlimitedOcrTextTopkRouter", {**GREEDY, **HEADS}, void=UNGROUPED),
    Case(
        "unlimited_ocr_text",
        "UnlimitedOcrTextTopkRouter",
        {**LIMITED, **HEADS},
        id="unlimited_ocr-grouped",
    ),
    Case("lara_mini", "LaraMiniTopKRouter", NAMED),
    Case("deepseek_v2", "DeepseekV2TopkRouter", GREEDY, void=UNGROUPED),
    Case("deepseek_v2", "DeepseekV2TopkRouter", LIMITED, id="deepseek_v2-grouped"),
    Case("deepseek_ocr2_text", "DeepseekOcr2TextTopkRouter", GREEDY, void=UNGROUPED),
    Case("mistral4", "Mistral4TopkRouter", GROUPED, rounds_scores=True),
    Case("qwen2_moe", "Qwen2MoeTopKRouter", NAMED),
    Case("qwen3_moe", "Qwen3MoeTopKRouter", {**LOCAL, "norm_topk_prob": True}),
    Case("qwen3_next", "Qwen3NextTopKRouter", NAMED),
    Case("qwen3_5_moe_text", "Qwen3_5MoeTopKRouter", NAMED),
    Case("qwen3_vl_moe_text", "Qwen3VLMoeTextTopKRouter", LOCAL),
    Case("qwen3_omni_moe_text", "Qwen3OmniMoeThinkerTextTopKRouter", NAMED),
    Case("qwen3_omni_moe_talker_text", "Qwen3OmniMoeTalkerTextTopKRouter", LOCAL),
    Case("qwen4_exp_text", "Qwen4ExpTextTopKRouter", NAMED),
    Case("olmoe", "OlmoeTopKRouter", NAMED),
    Case("flex_olmo", "FlexOlmoTopKRouter", NAMED),
    Case("mellum", "MellumTopKRouter", LOCAL),
    Case("mixtral", "MixtralTopKRouter", LOCAL),
    Case("minimax", "MiniMaxTopKRouter", LOCAL),
    Case(
        "hunyuan_v1_moe",
        "HunYuanMoEV1Gate",
        {"num_experts": E, "moe_topk": K},
        make=lambda cls, config: cls(config, 0),
    ),
    Case(
        "jamba", "JambaSparseMoeBlock", {**NAMED, "intermediate_size": 16}, without_experts, jamba
    ),
    Case("dbrx", "DbrxFFN", _ffn(), without_experts, dbrx, rounds_scores=True),
    Case(
        "dbrx",
        "DbrxFFN",
        _ffn(None),
        without_experts,
        dbrx,
        rounds_scores=True,
        id="dbrx-unnormalized",
    ),
    Case("ernie4_5_moe", "Ernie4_5_MoeTopKRouter", ERNIE, void=UNSCALED),
    Case("ernie4_5_vl_moe_text", "Ernie4_5_VLMoeMoeTopKRouter", ERNIE, void=UNSCALED),
    Case("longcat_flash", "LongcatFlashTopkRouter", {**LONGCAT, "zero_expert_num": 0}),
    # logits first
    Case("llama4_text", "Llama4Router", {**LOCAL, "num_experts_per_tok": 1}, call=llama4),
    Case("llama4_text", "Llama4Router", LOCAL, call=llama4, id="llama4_text-top4"),
    Case("cohere2_moe", "Cohere2MoeTopKRouter", NAMED, rounds_scores=True, void=SUMS_TO_ONE),
    Case("cohere2_moe", "Cohere2MoeTopKRouter", SIGMOID, rounds_scores=True, id="cohere2-sigmoid"),
    Case(
        "cohere2_moe",
        "Cohere2MoeTopKRouter",
        {**SIGMOID, "norm_topk_prob": False},
        rounds_scores=True,
        id="cohere2-sigmoid-unnormalized",
    ),
    Case("gpt_oss", "GptOssTopKRouter", LOCAL, rounds_scores=True, void=SUMS_TO_ONE),
    Case(
        "openai_privacy_filter",
        "OpenAIPrivacyFilterMLP",
        LOCAL,
        void=SUMS_TO_ONE,
        **block("router"),
    ),
    Case("granitemoe", "GraniteMoeTopKRouter", LOCAL, call=either_order, void=SUMS_TO_ONE),
    Case(
        "granitemoeshared",
        "GraniteMoeSharedTopKRouter",
        LOCAL,
        call=either_order,
        void=SUMS_TO_ONE,
    ),
    Case(
        "granitemoehybrid",
        "GraniteMoeHybridTopKRouter",
        {**LOCAL, "mamba_n_heads": 2},
        call=either_order,
        void=SUMS_TO_ONE,
    ),
    Case("granitemoe_swa", "GraniteMoeSWATopKRouter", LOCAL, void=SUMS_TO_ONE),
    Case(
        "aria_text",
        "AriaTextTopKRouter",
        ARIA,
        call=either_order,
        rounds_scores=True,
        void=SUMS_TO_ONE,
    ),
    Case("jetmoe", "JetMoeTopKGating", LOCAL, _sized, jetmoe, void=SUMS_TO_ONE),
]

#: Families of the table that no router can be compared for, and why.
NOT_COMPARED = {
    "bailing_moe": "not in transformers",
    "bailing_moe_v2": "not in transformers",
    **dict.fromkeys(
        (
            *("bailing_moe_linear", "bailing_moe_v3", "param2moe", "pangu_ultra_moe"),
            *("deepseek_v41", "step5", "alice_ai", "k2_horizon", "mistral_large_3", "deepseek"),
            *("interns1_pro", "interns2_mobius", "grok-1", "step3_text", "gigachat35"),
            *("llada2_moe", "sdar_moe", "iquest_q1", "xverse_moe", "minicpm"),
        ),
        "not in transformers",
    ),
    "zaya": "the router is a small network with a state from the layer before; not expressible",
}


#: The dtype of the logits that a family's router returns for bfloat16 hidden states and weights, where
#: it is another than the family's `logits_dtype`.
LOGITS = {
    # The gate's product is bfloat16; vLLM takes it in float32.
    "minimax_m2": torch.bfloat16,
    "minimax_m3_vl_text": torch.bfloat16,
    "step3p5": torch.bfloat16,  # transformers does not read need_fp32_gate
    "deepseek_v4": torch.bfloat16,
    "hunyuan_v1_moe": torch.bfloat16,  # float32 where its weight was left so
    # The product is bfloat16 here as well, and widened before the softmax.
    "granitemoe": torch.float32,
    "granitemoeshared": torch.float32,
    "granitemoehybrid": torch.float32,
    "granitemoe_swa": torch.float32,
    "jetmoe": torch.float32,
}


#: Routers that no recipe expresses. The import gives the nearest recipe, and must differ.
INEXPRESSIBLE = [
    Case("gemma4_text", "Gemma4TextRouter", {**GEMMA, "enable_moe_block": True}, call=gemma),
    Case("diffusion_gemma_text", "DiffusionGemmaTextRouter", GEMMA, call=gemma),
    Case("kolibri1", "Kolibri1TopKRouter", LOCAL),
    Case("phimoe", "PhimoeTopKRouter", {"num_local_experts": E, "num_experts_per_tok": 2}),
    Case("inkling_text", "InklingTopkRouter", PLAIN, call=inkling),
    Case(
        "laguna",
        "LagunaTopKRouter",
        {**NAMED, "moe_router_logit_softcapping": 2.0},
        call=laguna,
        id="laguna-softcap",
    ),
    Case("dbrx", "DbrxFFN", _ffn(2.0), call=dbrx, id="dbrx-2-norm"),
    Case(
        "longcat_flash",
        "LongcatFlashTopkRouter",
        {**LONGCAT, "zero_expert_num": 8},
        id="longcat_flash-zero-experts",
    ),
]


#: Families whose router is a usual one, and whose experts no recipe describes.
EXPERTS_INEXPRESSIBLE = [
    Case("muse_spark_text", "MuseSparkTopkRouter", {**LOCAL, **HEADS}),
    Case("inkling2_text", "Inkling2TopKRouter", PLAIN),
    Case("inkling2_loop_text", "Inkling2LoopTopKRouter", PLAIN),
]


def is_there(family):
    """Whether the installed transformers has a family's classes."""
    return Version(transformers.__version__) >= Version(table().families[family].since)


def config_class(family):
    folder, _, name = table().families[family].config.rpartition(".")
    module = importlib.import_module(f"transformers.models.{folder}.configuration_{folder}")
    return getattr(module, name)


def make_config(case):
    """A small config, in which hidden states have as many columns as there are experts."""
    width = "d_model" if case.family == "dbrx" else "hidden_size"
    return config_class(case.family)(**{width: E, **case.config})


def make_router(case):
    folder, _, name = case.router.rpartition(".")
    folder = folder or table().families[case.family].config.split(".")[0]
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return case.make(getattr(module, name), make_config(case)).eval()
