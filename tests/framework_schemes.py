"""What vLLM's and SGLang's own quantization code makes of an expert layer, out of a wheel.

`python framework_schemes.py NAME WHEEL < cases.json`: a list of pairs of a quantization config and the
prefix of a layer's routed experts. Prints a list of schemes: the one that the framework's config class
has a method for, or `raises: ...`. The methods' constructors are left out, as they choose kernels.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType, ModuleType, SimpleNamespace
from zipfile import ZipFile

import compressed_tensors.quantization  # before triton has a stand-in  # noqa: F401
import torch

from pytest_moe_routing.errors import Unsupported
from pytest_moe_routing.targets.contract import Contract
from pytest_moe_routing.targets.stubs import Stub, install, real_module


class FusedMoE:
    """A layer of routed experts, as far as a config class asks what it is."""

    moe_config = None
    use_triton_kernels = use_flashinfer_trtllm_moe = False
    ckpt_gate_proj_name, ckpt_up_proj_name, ckpt_down_proj_name = (
        "gate_proj",
        "up_proj",
        "down_proj",
    )


class RoutedExperts(FusedMoE):
    """What newer releases of vLLM call it."""


class Other:
    """Any other layer or method."""

    def __init__(self, *args, **kwargs):
        self.kwargs = kwargs


class Method(Other):
    """A method for experts, which keeps what it is made with and does nothing else."""

    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

    def __init_subclass__(cls, **kwargs):
        cls.__init__ = Method.__init__
        cls.__new__ = lambda kind, *_, **__: object.__new__(kind)


class Unquantized(Method):
    """The method for experts that are not quantized."""


def _yes(*_, **__):
    return True


PLATFORM = SimpleNamespace(
    **dict.fromkeys(("is_cuda", "is_cuda_alike", "has_device_capability"), _yes),
    **dict.fromkeys(("is_rocm", "is_cpu", "is_xpu", "is_tpu", "is_hpu"), lambda: False),
    is_fp8_fnuz=lambda: False,
    fp8_dtype=lambda: torch.float8_e4m3fn,
    get_device_capability=lambda *_: SimpleNamespace(to_int=lambda: 100, major=10, minor=0),
)


def _no(*_, **__):
    return False


class Backend:
    """The kernels to use, which are left to SGLang."""

    def __getattr__(self, name):
        return lambda: name == "is_auto"


class Blackwell:
    """SGLang's platform."""

    def __getattr__(self, name):
        return name in ("is_sm100", "is_blackwell", "is_cuda")


class Unset:
    """SGLang's environment variables, none of which is set."""

    def __getattr__(self, name):
        return SimpleNamespace(get=lambda: "")


STAND_INS = {
    "current_platform": PLATFORM,
    "FusedMoE": FusedMoE,
    "RoutedExperts": RoutedExperts,
    **dict.fromkeys(("LinearBase", "Attention", "MLAAttention", "ParallelLMHead"), Other),
    **dict.fromkeys(("RadixAttention", "VocabParallelEmbedding", "LinearMethodBase"), Other),
    "B12X_BLOCK_CODECS": (),
    "check_moe_marlin_supports_layer": _yes,
    "FusedMoEMethodBase": Method,
    "UnquantizedFusedMoEMethod": Unquantized,
    "UnquantizedLinearMethod": Other,
    # SGLang's
    **dict.fromkeys(("is_cuda", "check_marlin_supported", "is_flashinfer_available"), _yes),
    **dict.fromkeys(("is_hip", "is_npu", "is_xpu", "is_cpu", "get_bool_env_var"), _no),
    "get_moe_runner_backend": Backend,
    "get_platform": Blackwell,
    "mxfp8_block_convert_required": _no,
    "get_device_capability": lambda *_: (10, 0),
    "REQUANTIZATION_METHODS": (),
    "envs": Unset(),
}

#: Schemes by the name of a method, as far as it has but one.
METHODS = {
    "ModelOptFp8MoEMethod": "fp8_per_tensor",
    "ModelOptMxFp8FusedMoE": "mxfp8",
    "Mxfp4MoEMethod": "mxfp4",
    "GptOssMxfp4MoEMethod": "mxfp4",
    "INCMxfp4MoEMethod": "mxfp4",
    "INCMxfp8MoEMethod": "mxfp8",
    "CompressedTensorsW4A4Mxfp4MoEMethod": "mxfp4",
    "CompressedTensorsW4A8Mxfp4MoEMethod": "mxfp4",
    "CompressedTensorsW8A8Mxfp8MoEMethod": "mxfp8",
    "CompressedTensorsW8A8Int8MoEMethod": "int8",
    "CompressedTensorsW4A8Int8MoEMethod": "int4",
    "CompressedTensorsW4A8Fp8MoEMethod": "int4",
    "CompressedTensorsMxInt4MoE": "mxint4",
    "CompressedTensorsW8A8Int8MoE": "int8",
    "CompressedTensorsW4AFP8MoE": "int4",
    "CompressedTensorsW4A16Nvfp4MoE": "w4a16_nvfp4",
    "CompressedTensorsW4A4Nvfp4MoE": "nvfp4",
    "Unquantized": "bf16",
}
FP8_STRATEGIES = {"tensor": "fp8_per_tensor", "channel": "fp8_per_channel", "block": "fp8_block"}


def scheme_of(config, method):
    """The scheme that a method is for, by its class and what it was made with."""
    if method is None:
        return "bf16"
    name = type(method).__name__
    if name in METHODS:
        return METHODS[name]
    if name == "Fp8MoEMethod":
        sub = next((a for a in method.args if hasattr(a, "weight_block_size")), config)
        if getattr(sub, "use_mxfp8", False):
            return "mxfp8"
        return "fp8_block" if sub.weight_block_size else "fp8_per_tensor"
    if name in ("ModelOptNvFp4FusedMoE", "ModelOptNvFp4FusedMoEMethod"):
        sub = method.kwargs.get("quant_config", method.args[0] if method.args else config)
        is_a16 = (
            getattr(sub, "quant_method", "") == "W4A16_NVFP4"
            or getattr(sub, "is_w4a16", False)
            or sub is getattr(config, "nvfp4a16_config", None)
        )
        return "w4a16_nvfp4" if is_a16 else "nvfp4"
    if name == "CompressedTensorsW4A4Nvfp4MoEMethod":
        return "w4a16_nvfp4" if method.kwargs.get("use_a16") else "nvfp4"
    weights = method.kwargs.get("weight_quant", method.args[0] if method.args else None)
    if name in ("CompressedTensorsW8A8Fp8MoEMethod", "CompressedTensorsW8A8Fp8MoE"):
        return FP8_STRATEGIES[str(getattr(weights.strategy, "value", weights.strategy))]
    if name.startswith("CompressedTensorsWNA16"):
        plain = weights.symmetric and weights.num_bits == 4 and weights.group_size == 32
        return "mxint4" if plain else f"int{weights.num_bits}"
    bits = getattr(config, "weight_bits", None)
    return f"int{bits}" if bits in (4, 8) else f"unknown method {name}"


class Vllm:
    """vLLM, which asks its config classes in turn whether a checkpoint is theirs."""

    package = "vllm.model_executor.layers.quantization"
    real = (
        *("base_config", "auto_gptq", "auto_awq", "gptq", "awq", "gptq_marlin", "awq_marlin"),
        *("inc", "modelopt", "mxfp4", "fp8", "compressed_tensors", "utils.quant_utils", "schema"),
        *("moe_wna16", "mxfp8", "utils.config_utils"),
    )
    others = ("vllm.scalar_type",)
    #: Classes in the order in which they may take a checkpoint over (config/model.py).
    overriding = (
        *(("auto_gptq", "AutoGPTQConfig"), ("auto_awq", "AutoAWQConfig"), ("inc", "INCConfig")),
        *(("modelopt", "ModelOptFp8Config"), ("modelopt", "ModelOptNvFp4Config")),
        *(("modelopt", "ModelOptMxFp8Config"), ("modelopt", "ModelOptMixedPrecisionConfig")),
        *(("mxfp4", "Mxfp4Config"), ("mxfp4", "GptOssMxfp4Config")),
    )
    methods = MappingProxyType(
        {
            "fp8": ("fp8", "Fp8Config"),
            "modelopt": ("modelopt", "ModelOptFp8Config"),
            "modelopt_fp4": ("modelopt", "ModelOptNvFp4Config"),
            "modelopt_mxfp8": ("modelopt", "ModelOptMxFp8Config"),
            "modelopt_mixed": ("modelopt", "ModelOptMixedPrecisionConfig"),
            "auto_gptq": ("auto_gptq", "AutoGPTQConfig"),
            "gptq": ("auto_gptq", "AutoGPTQConfig"),
            "auto_awq": ("auto_awq", "AutoAWQConfig"),
            "awq": ("auto_awq", "AutoAWQConfig"),
            "compressed-tensors": (
                "compressed_tensors.compressed_tensors",
                "CompressedTensorsConfig",
            ),
            "inc": ("inc", "INCConfig"),
            "auto-round": ("inc", "INCConfig"),
            "mxfp4": ("mxfp4", "Mxfp4Config"),
            "gpt_oss_mxfp4": ("mxfp4", "GptOssMxfp4Config"),
            "mxfp8": ("modelopt", "ModelOptMxFp8Config"),
        }
    )

    def __init__(self, wheel):
        pass

    def load(self, module, name):
        return getattr(real_module(f"{self.package}.{module}"), name)

    def config(self, stated):
        """The config object of a checkpoint."""
        method = str(stated.get("quant_method", "")).lower()
        for place in self.overriding:
            cls = self.load(*place)
            taken = cls.override_quantization_method(stated, None, hf_config=SimpleNamespace())
            if taken is not None:
                method = taken
                break
        return self.load(*self.methods[method]).from_config(stated)

    def method(self, config, prefix):
        return config.get_quant_method(RoutedExperts(), prefix)


def scheme_class(name):
    """A class in the place of one that chooses a kernel."""
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (Method,), {"get_min_capability": staticmethod(lambda: 80)})


class Sglang:
    """SGLang, which finds a class by the method's name, and ModelOpt's by its algorithm."""

    package = "sglang.srt.layers.quantization"
    real = (
        *("base_config", "modelopt_quant", "fp8", "compressed_tensors.compressed_tensors"),
        *(
            "compressed_tensors.utils",
            "auto_round",
            "gptq",
            "gptq.gptq",
            "awq",
            "awq.awq",
            "mxfp4",
            "utils",
        ),
        "quark.utils",
    )
    others = ()
    methods = MappingProxyType(
        {
            "fp8": ("fp8", "Fp8Config"),
            "mxfp8": ("fp8", "Fp8Config"),
            "modelopt_fp8": ("modelopt_quant", "ModelOptFp8Config"),
            "modelopt_fp4": ("modelopt_quant", "ModelOptFp4Config"),
            "modelopt_mixed": ("modelopt_quant", "ModelOptMixedPrecisionConfig"),
            "compressed-tensors": (
                "compressed_tensors.compressed_tensors",
                "CompressedTensorsConfig",
            ),
            "auto-round": ("auto_round", "AutoRoundConfig"),
            "mxfp4": ("mxfp4", "Mxfp4Config"),
            "gptq_marlin": ("gptq.gptq", "GPTQMarlinConfig"),
            "awq_marlin": ("awq.awq", "AWQMarlinConfig"),
        }
    )
    #: Classes that may take a checkpoint over (configs/model_config.py).
    overriding = ("gptq_marlin", "awq_marlin")

    def __init__(self, wheel):
        # The schemes of compressed-tensors choose kernels as soon as they are made.
        schemes = ModuleType(f"{self.package}.compressed_tensors.schemes")
        schemes.__getattr__ = scheme_class
        sys.modules[schemes.__name__] = schemes
        # The module that reads a checkpoint's config imports the server; two of its functions do.
        tree = ast.parse(ZipFile(wheel).read("sglang/srt/configs/model_config.py"))
        names = ("unwrap_modelopt_quantization_config", "_parse_modelopt_quant_config")
        body = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name in names]
        for node in body:
            node.returns, node.args.args[-1].annotation = None, None
        self.reading = {}
        exec(compile(ast.Module(body, []), "model_config.py", "exec"), self.reading)

    def load(self, module, name):
        return getattr(real_module(f"{self.package}.{module}"), name)

    def config(self, stated):
        """The config object of a checkpoint."""
        if stated["quant_method"] == "modelopt":
            parse = self.reading["_parse_modelopt_quant_config"]
            read = parse(None, {"quantization": stated}) or {}
            method = read.get("quant_method", stated["quant_method"])
            if "quantization" not in stated or method == "mxfp8":
                stated = {**stated, **read}
            elif method in self.methods:  # what is in a file of its own is read as it is there
                return self.load(*self.methods[method]).from_config(
                    {key: value for key, value in stated.items() if key != "quant_method"}
                )
        method = stated["quant_method"].lower()
        for name in self.overriding:
            taken = self.load(*self.methods[name]).override_quantization_method(stated, None)
            method = taken or method
        return self.load(*self.methods[method]).from_config(stated)

    def method(self, config, prefix):
        layer = FusedMoE()
        made = config.get_quant_method(layer, prefix)
        scheme = getattr(layer, "scheme", None)
        return scheme if isinstance(scheme, Method) else made


def main(name, wheel):
    framework = {"vllm": Vllm, "sglang": Sglang}[name](wheel)
    contract = Contract.of(name)
    install(
        replace(
            contract,
            run=(*(f"{framework.package}.{m}" for m in framework.real), *framework.others),
            third_party=tuple(t for t in contract.third_party if t != "compressed_tensors"),
        ),
        wheel,
        STAND_INS,
    )
    base = real_module(f"{framework.package}.base_config")
    base.FusedMoEMethodBase = Method
    import_module(framework.package).QuantizationConfig = base.QuantizationConfig
    torch.cuda.get_device_capability = lambda *_: (10, 0)
    sys.modules["regex"] = re  # a package of which vLLM uses no more than this has
    answers = []
    for stated, prefix in json.load(sys.stdin):
        Stub.asked.clear()
        try:
            config = framework.config(stated)
            answer = scheme_of(config, framework.method(config, prefix))
            answers.append(f"asked {sorted(set(Stub.asked))}" if Stub.asked else answer)
        except Unsupported as error:
            answers.append(f"unsupported: {error}")
        except Exception as error:
            answers.append(f"raises: {type(error).__name__}: {str(error)[:200]}")
    print(json.dumps(answers))


if __name__ == "__main__":
    main(*sys.argv[1:])
