"""The weight preparation of released vLLM and SGLang, run from their wheels on the CPU.

Functions are taken out of a wheel's files and run without the files' imports: what they call of
FlashInfer comes from FlashInfer's wheel, but for the interleaving of block scales, a CUDA operator,
for which torchao's `to_blocked` stands. Nothing of this package is involved.
"""

import ast
import sys
import zipfile
from functools import cache
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torchao.prototype.mx_formats.utils import to_blocked
from wheels import find_wheel

VLLM, SGLANG, FLASHINFER = "vllm 0.33.0", "sglang 0.5.23", "flashinfer_python 0.7.2.post1"


def wheel_or_skip(release):
    wheel = find_wheel(release)
    if wheel is None:
        pytest.skip(f"no {release} in MOE_WHEELS")
    return wheel


def functions(wheel, path, *methods, **names):
    """Every function of a file, the named methods of its classes, and its literal constants."""
    namespace = {"torch": torch, **names}
    exec(_compiled(wheel, path, methods), namespace)
    return SimpleNamespace(**{k: v for k, v in namespace.items() if not k.startswith("__")})


@cache
def _compiled(wheel, path, methods):
    with zipfile.ZipFile(wheel) as archive:
        tree = ast.parse(archive.read(path), path)
    constants = [n for n in tree.body if isinstance(n, ast.Assign) and _is_constant(n.value)]
    owned = [n for owner in tree.body if isinstance(owner, ast.ClassDef) for n in owner.body]
    found = [n for n in tree.body if isinstance(n, ast.FunctionDef)]
    found += [n for n in owned if isinstance(n, ast.FunctionDef) and n.name in methods]
    for node in found:
        node.decorator_list = []
        # Defaults that name what the file imports.
        for defaults in (node.args.defaults, node.args.kw_defaults):
            defaults[:] = [
                value if value is None or _is_constant(value) else ast.Constant(None)
                for value in defaults
            ]
    future = ast.parse("from __future__ import annotations").body
    module = ast.Module([*future, *constants, *found], [])
    return compile(ast.fix_missing_locations(module), path, "exec")


def _is_constant(node):
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def interleave(scales):
    """FlashInfer's `block_scale_interleave`: 128x4 tiles, flat, one expert after another."""
    if scales.ndim == 3:
        return torch.stack([interleave(expert) for expert in scales])
    return to_blocked(scales).flatten()


@pytest.fixture
def flashinfer(monkeypatch):
    """The modules that production code imports from FlashInfer."""
    wheel = wheel_or_skip(FLASHINFER)
    utils = functions(wheel, "flashinfer/utils.py")
    rows = {name: f for name, f in vars(utils).items() if name.startswith("get_shuffle")}
    quantization = functions(
        wheel,
        "flashinfer/quantization/fp4_quantization.py",
        block_scale_interleave=interleave,
        **rows,
    )
    core = functions(wheel, "flashinfer/fused_moe/core.py", Union=None, Optional=None, **rows)
    both = {
        "block_scale_interleave": interleave,
        "nvfp4_block_scale_interleave": interleave,
        "shuffle_matrix_a": quantization.shuffle_matrix_a,
        "reorder_rows_for_gated_act_gemm": core.reorder_rows_for_gated_act_gemm,
    }
    for name, content in {
        "flashinfer": both,
        "flashinfer.utils": vars(utils),
        "flashinfer.quantization": both,
        "flashinfer.quantization.fp4_quantization": both,
        "flashinfer.fp4_quantization": both,
        "flashinfer.fused_moe": vars(core),
        "flashinfer.fused_moe.core": vars(core),
    }.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)


class Names:
    """An enum whose every member is its own name."""

    def __getattr__(self, name):
        return name


LOG = SimpleNamespace(
    **{f"{level}{once}": lambda *_: None for level in ("info", "warning") for once in ("", "_once")}
)


class Vllm:
    """vLLM's preparation, by scheme."""

    def __init__(self, monkeypatch):
        wheel = wheel_or_skip(VLLM)
        layers = "vllm/model_executor/layers"
        common = {"round_up": lambda size, multiple: -(-size // multiple) * multiple, "logger": LOG}
        utils = f"{layers}/quantization/utils"
        self.utils = functions(wheel, f"{utils}/flashinfer_utils.py", **common)
        largest = {"amax_for_moe_activation_quant": lambda scale, _: scale.max()}
        self.fp4 = functions(
            wheel,
            f"{utils}/flashinfer_fp4_moe.py",
            **{**vars(self.utils), **largest},
        )
        self.mxint4 = functions(
            wheel, f"{utils}/flashinfer_mxint4_moe.py", functools=SimpleNamespace(cache=None)
        )
        self.mxfp4 = functions(
            wheel,
            f"{layers}/fused_moe/oracle/mxfp4.py",
            Mxfp4MoeBackend=Names(),
            TRTLLM_BACKENDS=("TRTLLM",),
            FLASHINFER_MOE_EP_MXFP4_BACKENDS=(),
            B12X_BACKENDS=(),
            **common,
        )
        for name, content in {
            f"{layers}/fused_moe/oracle/nvfp4": {
                "NvFp4MoeBackend": Names(),
                "is_global_sf_supported_for_nvfp4_backend": lambda _: True,
            },
            f"{utils}/flashinfer_fp4_moe": vars(self.fp4),
            f"{utils}/quant_utils": {"convert_packed_uint4b8_to_signed_int4_inplace": None},
        }.items():
            module = ModuleType(name.replace("/", "."))
            vars(module).update(content)
            parts = module.__name__.split(".")
            for count in range(1, len(parts)):
                parent = ".".join(parts[:count])
                if parent not in sys.modules:
                    monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
            monkeypatch.setitem(sys.modules, module.__name__, module)

    @staticmethod
    def layer(gated, block=None):
        config = SimpleNamespace(
            is_act_and_mul=gated,
            hidden_dim=0,
            hidden_dim_unpadded=None,
            moe_parallel_config=SimpleNamespace(enable_eplb=False),
        )
        activation = SimpleNamespace(is_gated=gated)
        return SimpleNamespace(moe_config=config, activation=activation, weight_block_size=block)

    def fp8(self, w, gated, block):
        one = torch.ones(len(w["w13"]))
        w13, w2, s13, s2 = self.utils.prepare_fp8_moe_layer_for_fi(
            self.layer(gated, block),
            w["w13"],
            w["w2"],
            w.get("s13", one),
            one,
            w.get("s2", one),
            one,
            is_trtllm=True,
        )
        found = {"gemm1_weights": w13, "gemm2_weights": w2}
        return found | ({"gemm1_weights_scale": s13, "gemm2_weights_scale": s2} if block else {})

    def prepare(self, scheme, w, gated):
        if scheme == "bf16":
            w13, w2, _ = self.utils.align_moe_weights_for_fi(w["w13"], w["w2"], gated, 128)
            convert = self.utils.convert_moe_weights_to_flashinfer_trtllm_block_layout
            one, two = convert({}, w13.clone(), w2.clone(), gated)
            return {"gemm1_weights": one, "gemm2_weights": two}
        if scheme.startswith("fp8") or scheme == "mxfp8":
            block = {"fp8_per_tensor": None, "mxfp8": [1, 32]}.get(scheme, [128, 128])
            return self.fp8(w, gated, block)
        if scheme == "nvfp4":
            one = torch.ones(len(w["w13"]), 2)
            given = (w["w13"], w["s13"], one, one, w["w2"], w["s2"], one, one)
            given = tuple(t.clone() for t in given)
            found = self.fp4.prepare_nvfp4_moe_layer_for_fi_or_cutlass(
                "FLASHINFER_TRTLLM", self.layer(gated), *given, gated
            )
            names = (
                "gemm1_weights",
                "gemm1_weights_scale",
                "",
                "",
                "gemm2_weights",
                "gemm2_weights_scale",
            )
            return {name: tensor for name, tensor in zip(names, found, strict=False) if name}
        if scheme == "mxint4":
            given = (w["w13"].clone(), w["s13"].clone(), w["w2"], w["s2"])
            found = self.mxint4.prepare_static_weights_for_trtllm_mxint4_moe(*given)
            return {name.replace("scales", "weights_scale"): t for name, t in found.items()}
        return self.gpt_oss(w)

    def gpt_oss(self, w):
        """MXFP4 of gpt-oss: rows of gate and up alternate in the checkpoint."""

        def alternate(rows):
            return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2)

        names = ("w13", "w2", "s13", "s2", "b13", "b2")
        given = [alternate(w[n]) if "13" in n else w[n] for n in names]
        found = self.mxfp4.convert_gpt_oss_weight_to_mxfp4_moe_kernel_format(
            "TRTLLM", None, *given, _cache_permute_indices={}
        )
        arguments = ("gemm1_weights", "gemm2_weights", "gemm1_weights_scale", "gemm2_weights_scale")
        return dict(zip((*arguments, "bias1", "bias2"), found, strict=True))


class Sglang:
    """SGLang's preparation, by scheme; its loader stores [up; gate] where vLLM's stores [gate; up]."""

    def __init__(self, monkeypatch):
        wheel = wheel_or_skip(SGLANG)
        layers = "sglang/srt/layers"
        self.trtllm = functions(
            wheel,
            f"{layers}/moe/moe_runner/flashinfer_trtllm.py",
            cast=lambda _, value: value,
            logger=LOG,
            Parameter=torch.nn.Parameter,
            copy_or_rebind_param=lambda layer, name, value: setattr(layer, name, Tagged(value)),
            _flashinfer_trtllm_shuffle_row_indices_cache_mxfp8={},
        )
        self.unquant = functions(
            wheel,
            f"{layers}/quantization/unquant.py",
            "_trtllm_bf16_row_permutation",
            "_apply_trtllm_bf16_block_layout",
        )
        utils = functions(wheel, f"{layers}/quantization/utils.py")
        name = "sglang.srt.layers.quantization.utils"
        for count in range(1, 6):
            part = ".".join(name.split(".")[:count])
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
        vars(sys.modules[name]).update(vars(utils))

    def prepare(self, scheme, w, gated):
        given = {k: _swapped(v) if gated and "13" in k else v.clone() for k, v in w.items()}
        one = torch.ones(len(w["w13"]))
        config = SimpleNamespace(is_gated=gated, activation="silu" if gated else "relu2")
        layer = SimpleNamespace(
            moe_runner_config=config,
            w13_weight=given["w13"],
            w2_weight=given["w2"],
            w13_weight_scale=given.get("s13", one),
            w2_weight_scale=given.get("s2", one),
            w13_weight_scale_inv=given.get("s13"),
            w2_weight_scale_inv=given.get("s2"),
            w13_input_scale=one,
            w2_input_scale=one,
            w2_input_scale_quant=one,
            g1_alphas=one,
            num_local_experts=len(w["w13"]),
        )
        scales = ("w13_weight_scale", "w2_weight_scale")
        if scheme == "bf16":
            method = SimpleNamespace(_cache_permute_indices={})
            method._trtllm_bf16_row_permutation = lambda *args: (
                self.unquant._trtllm_bf16_row_permutation(method, *args)
            )
            for name in ("w13_weight", "w2_weight"):
                param = torch.nn.Parameter(getattr(layer, name).clone(), requires_grad=False)
                self.unquant._apply_trtllm_bf16_block_layout(method, layer, param, name)
                setattr(layer, name, param.data)
        elif scheme == "fp8_per_tensor":
            self.trtllm.align_fp8_moe_weights_for_flashinfer_trtllm(layer)
        elif scheme == "mxfp8":
            self.trtllm.align_mxfp8_moe_weights_for_flashinfer_trtllm(layer)
            scales = ("w13_weight_scale_inv", "w2_weight_scale_inv")
        else:
            self.trtllm.align_fp4_moe_weights_for_flashinfer_trtllm(layer)
        found = {"gemm1_weights": layer.w13_weight, "gemm2_weights": layer.w2_weight}
        if "s13" in w and scheme != "fp8_per_tensor":
            found |= dict(
                zip(
                    ("gemm1_weights_scale", "gemm2_weights_scale"),
                    map(layer.__getattribute__, scales),
                    strict=True,
                )
            )
        return found


class Tagged(torch.Tensor):
    """A tensor that may be given attributes, as SGLang gives its parameters."""


def _swapped(rows):
    return torch.cat(rows.view(torch.uint8).chunk(2, 1)[::-1], 1).view(rows.dtype)
