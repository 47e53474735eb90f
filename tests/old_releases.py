"""Routers out of the wheels of old releases, run as they were.

vLLM and SGLang choose experts in functions that need nothing but torch: such a function is taken out
of its file and run here. transformers is imported whole, in a process of its own (this file, run as
a script), where a block's experts write down what they are called with.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path
from unittest.mock import MagicMock

import torch

# -- functions of vLLM and SGLang ------------------------------------------------------------------

#: vLLM's switches, all off: the torch code runs.
ENVS = types.SimpleNamespace(VLLM_USE_FUSED_MOE_GROUPED_TOPK=False, VLLM_BATCH_INVARIANT=False)


def load_function(wheel, path, name, *constants):
    """A function of a file in a wheel, and constants of the file that it reads.

    Its decorators (torch.compile) are left out.
    """
    wanted = {name, *constants}
    with zipfile.ZipFile(wheel) as files:
        tree = ast.parse(files.read(path))
    tree.body = [node for node in tree.body if _defines(node) in wanted]
    for node in tree.body:
        node.decorator_list = []
    space = {"torch": torch, "envs": ENVS}
    # It inherits our `from __future__ import annotations`: they name what its file imports.
    exec(compile(tree, path, "exec"), space)
    return space[name]


def _defines(node):
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
        return node.targets[0].id
    return getattr(node, "name", None)


def call_function(function, logits, recipe, bias):
    """Experts and weights, by those of the arguments that the function has."""
    arguments = {
        "hidden_states": logits,
        "gating_output": logits,
        "topk": recipe.top_k,
        "renormalize": recipe.normalize == "sum",
        "num_expert_group": recipe.n_group,
        "topk_group": recipe.topk_group,
        "scoring_func": recipe.score,
        "e_score_correction_bias": bias,
        "correction_bias": bias,
    }
    accepted = inspect.signature(function).parameters
    weights, ids = function(**{k: v for k, v in arguments.items() if k in accepted})
    return ids, weights


# -- blocks of transformers ------------------------------------------------------------------------


def small_config(recipe, num_experts):
    """Arguments of a config class. What is not its own key, it keeps as an attribute."""
    return {
        "hidden_size": num_experts,
        "moe_intermediate_size": 8,
        "n_shared_experts": 1,
        "n_routed_experts": num_experts,
        "moe_num_experts": num_experts,
        "num_experts_per_tok": recipe.top_k,
        "moe_k": recipe.top_k,
        "n_group": recipe.n_group,
        "topk_group": recipe.topk_group,
        "norm_topk_prob": recipe.normalize == "sum",
        "routed_scaling_factor": recipe.scale,
    }


def run_blocks(wheel, jobs):
    """Run MoE blocks of the transformers in a wheel.

    Args:
        jobs: `run_block`'s arguments, for each.

    Returns:
        What `run_block` returns, for each.
    """
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as files:
        files.extractall(folder)
        exchange = Path(folder, "exchange.pt")
        torch.save(jobs, exchange)
        child = subprocess.run(
            [sys.executable, "-W", "ignore", __file__, exchange],
            env=os.environ | {"PYTHONPATH": folder, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        return torch.load(exchange)


class Experts(torch.nn.Module):
    """In the place of a block's experts: keeps the experts and weights that it is called with."""

    def forward(self, x, ids, weights):
        self.called_with = ids, weights
        return torch.zeros_like(x)


@torch.no_grad()
def run_block(folder, block_class, config_class, config, inputs):
    """Experts and weights for each of `inputs`, which are pairs of logits and bias.

    With the identity as its gate, a block sees the very logits that we want it to see.
    """
    package = f"transformers.models.{folder}"
    configuration = importlib.import_module(f"{package}.configuration_{folder}")
    modeling = importlib.import_module(f"{package}.modeling_{folder}")
    block = getattr(modeling, block_class)(getattr(configuration, config_class)(**config)).eval()
    block.experts = Experts()
    block.gate.weight.copy_(torch.eye(len(block.gate.weight)))
    state = block.state_dict()
    (bias_name,) = (name for name in state if name.endswith("e_score_correction_bias"))
    found = []
    for logits, bias in inputs:
        state[bias_name].copy_(bias.view_as(state[bias_name]))
        block(logits.unsqueeze(0))
        found.append(block.experts.called_with)
    return found


def allow_other_dependencies():
    """Import transformers beside dependencies that it does not ask for: no router calls them.

    Its own check of their versions is left out, and httpx, where it is missing, is a dummy.
    """
    check = types.ModuleType("transformers.dependency_versions_check")
    check.dep_version_check = lambda *args: None
    sys.modules[check.__name__] = check
    if importlib.util.find_spec("httpx") is None:
        sys.modules["httpx"] = MagicMock()


def main(exchange):
    allow_other_dependencies()
    torch.set_num_threads(1)
    found = importlib.import_module("transformers").__file__
    assert Path(found).is_relative_to(exchange.parent), f"{found} is not the wheel's"
    jobs = torch.load(exchange)
    torch.save([run_block(*job) for job in jobs], exchange)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
