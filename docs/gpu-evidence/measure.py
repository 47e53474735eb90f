"""What the routing kernels on this GPU do, where it was only read from source before.

Run on a GPU with flashinfer-python >= 0.7.0 and Triton. Output of an H200: measure.txt.
"""

import torch
import triton
import triton.language as tl

from pytest_moe_routing.flashinfer import KernelCall
from pytest_moe_routing.kernels.routing import run_routing
from pytest_moe_routing.logits import make_case
from pytest_moe_routing.routing import Recipe

BIASED = ("MiniMax2", "DeepSeekV3")
METHODS = ("Default", "Renormalize", "TopK", "TopKSigmoid", "Sigmoid", "SigmoidRenorm", *BIASED)


@triton.jit
def _kernel_sigmoid(x, y, block: tl.constexpr):
    at = tl.program_id(0) * block + tl.arange(0, block)
    half = tl.load(x + at) * 0.5
    tanh = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
    )
    tl.store(y + at, 0.5 * tanh + 0.5)


def kernel_sigmoid(x):
    """The formula of the kernels, 0.5 * tanh.approx(0.5 x) + 0.5, float32."""
    y = torch.empty_like(x)
    _kernel_sigmoid[(len(x) // 1024,)](x, y, block=1024)
    return y


def run(method, logits, bias=None, top_k=4, **arguments):
    num_experts = logits.shape[1]
    if method == "DeepSeekV3":
        arguments = {"n_group": 1, "topk_group": 1, **arguments}
    if method in BIASED:
        bias = torch.zeros(num_experts) if bias is None else bias
        arguments["bias"] = "router"
    call = KernelCall("nvfp4", method, num_experts, top_k, "float32", **arguments)
    return run_routing(logits.cuda(), None if bias is None else bias.cuda(), call)


def sigmoid():
    grid = torch.linspace(-24, 24, 1 << 22).cuda()
    got = kernel_sigmoid(grid)
    error = (got.double() - grid.double().sigmoid()).abs()
    print(f"sigmoid: at most {error.max():.3e} off, at {grid[error.argmax()]:.4f}")
    print(f"  monotone: {bool((got[1:] >= got[:-1]).all())}, below zero: {int((got < 0).sum())}")
    for low, high in ((-24, -12), (-12, -8), (-8, -4), (-4, 0), (0, 4), (4, 24)):
        part = error[(grid >= low) & (grid < high)]
        print(f"  logits in [{low}, {high}): at most {part.max():.3e} off")
    logits = torch.full((16384, 8), -60.0)
    logits[:, 0] = torch.linspace(-20, 20, 16384)
    weights = run("TopKSigmoid", logits, top_k=1).topk_weights[:, 0]
    same = weights == kernel_sigmoid(logits[:, 0].cuda()).bfloat16().cpu()
    print(f"  weights of TopKSigmoid are its bfloat16: {int(same.sum())} of {len(same)}")


def ties():
    for method in METHODS:
        for num_tokens in (1, 5, 17, 300, 2000):
            ids = run(method, torch.zeros(num_tokens, 128), top_k=8).topk_ids
            if not bool((ids == torch.arange(8)).all()):
                print(f"ties: {method}, {num_tokens} tokens: {ids[0].tolist()}")
    print(f"ties: lowest indices in ascending order, {', '.join(METHODS)}; exceptions above")


def not_finite():
    nan, inf = torch.nan, torch.inf
    names = ("NaN", "-NaN", "all NaN", "+inf", "-inf", "one finite", "all -inf", "-0 and +0")
    rows = torch.linspace(-1, 1, 128).repeat(8, 1)
    rows[0, 5], rows[2], rows[3, 5], rows[4, 127] = nan, nan, inf, -inf
    rows[1, 5] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)[0]
    rows[5:7] = -inf
    rows[5, 3], rows[7], rows[7, 4], rows[7, 9] = 0.0, -1.0, -0.0, 0.0
    for method in (*METHODS, "Llama4"):
        got = run(method, rows, top_k=1 if method == "Llama4" else 4)
        print(f"not finite: {method}")
        for row, name in enumerate(names):
            weights = [f"{w:.5g}" for w in got.topk_weights[row].tolist()]
            print(f"  {name}: {got.topk_ids[row].tolist()} {' '.join(weights)}")


def limits():
    shapes = (
        ("Default", 512, 8),
        ("Sigmoid", 256, 9),
        ("MiniMax2", 1025, 8),
        ("MiniMax2", 512, 33),
    )
    shapes += (("Renormalize", 2049, 8), ("Llama4", 129, 1), ("Llama4", 128, 2))
    for method, num_experts, top_k in shapes:
        try:
            run(method, torch.zeros(4, num_experts), top_k=top_k)
            print(f"limits: {method} runs {num_experts} experts, top {top_k}")
        except RuntimeError as error:
            text = str(error).strip().splitlines()[-1].rpartition("/")[2]
            print(f"limits: {method} refuses {num_experts} experts, top {top_k}: {text[:110]}")


def bias_rounding():
    for n_group, topk_group in ((8, 4), (1, 1)):
        recipe = Recipe(
            top_k=8,
            score="sigmoid",
            bias=True,
            n_group=n_group,
            topk_group=topk_group,
            normalize="sum",
        )
        case = make_case("narrow-bias", recipe, num_tokens=256, num_experts=256)
        groups = {"n_group": n_group, "topk_group": topk_group}
        whole = run("DeepSeekV3", case.logits, case.bias, top_k=8, **groups).topk_ids
        rounded = case.bias.bfloat16().float()
        same = run("DeepSeekV3", case.logits, rounded, top_k=8, **groups).topk_ids == whole
        other = int((~same).any(1).sum())
        print(f"bias: {n_group} groups: rounded to bfloat16, {other} of 256 tokens differ")


for part in (sigmoid, ties, not_finite, limits, bias_rounding):
    part()
