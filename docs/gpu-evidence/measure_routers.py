"""How exactly compiled and Triton routers score, and where they break.

python measure_routers.py NAME@PATH...      # as routers.py has them
"""

import sys
from pathlib import Path

import torch
from routers import ADAPTERS

from pytest_moe_routing.models import RouterConfig

GRID = torch.linspace(-24, 24, 1 << 16)


def router(score, experts=256, top_k=1, **more):
    values = {"correction_bias": "float32", "renormalize": False, "logits_dtype": "float32"}
    return RouterConfig(num_experts=experts, top_k=top_k, scoring_func=score, **{**values, **more})


def call_of(adapter, config, kernel):
    return next((c for c in adapter.calls(config) if c.kernel == kernel), None)


def scores(adapter, kernel, config):
    """Scores of single logits: of the only experts that are not far below, not normalized."""
    call = call_of(adapter, config, kernel)
    if call is None:
        return
    experts, top_k = config.num_experts, config.top_k
    logits = torch.full((len(GRID), experts), -60.0)
    logits[:, :top_k] = GRID[:, None]
    weights = call.run(logits.cuda(), torch.zeros(experts).cuda())[0].cpu()
    got = weights.double() / config.routed_scaling_factor
    if config.renormalize:
        print(f"{kernel}: normalized, so only the sum can be told:", got.sum(1).unique()[:3])
        return
    want = (
        GRID.double().sigmoid()
        if config.scoring_func == "sigmoid"
        else (torch.nn.functional.softplus(GRID.double()).sqrt())
    )
    error = (got[:, 0] - want).abs()
    print(
        f"{kernel} ({config.scoring_func}): at most {error.max():.2e} off absolutely, "
        f"{(error / want).max():.2e} relatively, at logit {GRID[(error / want).argmax()]:.2f}"
    )
    for low, high in ((-24, -16), (-16, -12), (-12, -8), (-8, -4), (-4, 0), (0, 24)):
        part = (low <= GRID) & (high > GRID)
        print(
            f"   logits in [{low}, {high}): {error[part].max():.2e} absolutely, "
            f"{(error / want)[part].max():.2e} relatively"
        )


def low_keys(adapter, kernel, counts):
    """Numbers of experts for which keys below -1 give one expert again and again."""
    broken, right = [], []
    for experts in counts:
        config = router("sigmoid", experts, 4, renormalize=True)
        call = call_of(adapter, config, kernel)
        if call is None:
            return
        logits = torch.arange(experts).flip(0)[None] / experts - 0.5
        _, ids = (x.cpu() for x in call.run(logits.cuda(), torch.full((experts,), -2.0).cuda()))
        (right if sorted(ids[0].tolist()) == [0, 1, 2, 3] else broken).append(experts)
    print(f"{kernel}: bias -2 for every expert, top 4: right for {right}; broken for {broken}")
    if broken:
        config = router("sigmoid", broken[0], 4, renormalize=True)
        logits = torch.arange(broken[0]).flip(0)[None] / broken[0] - 0.5
        for bias in (-2.0, -1.7, -1.5, -1.3, 0.0):
            out = call_of(adapter, config, kernel).run(
                logits.cuda(), torch.full((broken[0],), bias).cuda()
            )
            keys = logits.sigmoid() + bias
            print(
                f"   {broken[0]} experts, bias {bias}: largest key {float(keys.max()):.4f}, "
                f"ids {out[1].tolist()}, weights {[round(w, 4) for w in out[0][0].tolist()]}"
            )


def tie(adapter):
    """Two best experts of a group with the same key: the group's score is their sum."""
    config = router(
        "sigmoid", 8, 2, n_group=2, topk_group=1, group_score="top2_sum", renormalize=True
    )
    call = call_of(adapter, config, "biased_grouped_topk_gpu")
    if call is None:
        return
    logits = torch.tensor([[2.0, 2.0, -4, -4, 1.5, 1.5 - 2**-10, -4, -4]])
    bias = torch.zeros(8)
    weights, ids = call.run(logits.cuda(), bias.cuda())
    top = logits.sigmoid().view(2, 4).topk(2).values
    print(
        f"biased_grouped_topk_gpu: group scores {[round(x, 4) for x in top.sum(1).tolist()]}, "
        f"so experts 0 and 1; got {ids.tolist()} {weights.tolist()}"
    )


def main():
    print("torch", torch.__version__, torch.cuda.get_device_name())
    for argument in sys.argv[1:]:
        name, _, path = argument.partition("@")
        adapter = ADAPTERS[name](Path(path))
        print(f"== {name}@{Path(path).name}")
        scores(adapter, "topk_sigmoid", router("sigmoid"))
        scores(
            adapter,
            "grouped_topk",
            router("sigmoid", n_group=1, topk_group=1, group_score="top2_sum"),
        )
        scores(adapter, "topk_softplus_sqrt", router("sqrtsoftplus", top_k=6))
        scores(adapter, "moe_topk_sigmoid", router("sigmoid"))
        scores(adapter, "biased_topk_jit_kernel_impl", router("sigmoid"))
        scores(adapter, "biased_topk_jit_kernel_impl", router("sqrtsoftplus"))
        counts = (8, 16, 60, 64, 128, 160, 192, 256, 288, 320, 384, 512, 576, 896)
        low_keys(adapter, "topk_sigmoid", counts)
        low_keys(adapter, "moe_topk_sigmoid", counts)
        tie(adapter)


if __name__ == "__main__":
    main()
