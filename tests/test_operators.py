"""Calls of compiled operators beside their declarations, in made and in released packages."""

from __future__ import annotations

import pytest
from packaging.version import Version
from wheels import wheels_since

from pytest_moe_routing.flashinfer.cpp import operators
from pytest_moe_routing.flashinfer.drift import examine
from pytest_moe_routing.flashinfer.operators import compare_operators
from pytest_moe_routing.flashinfer.package import Package

CORE = '''
@functools.cache
def get_module():
    return _impl(True)

def _impl(flag):
    spec = gen_module(flag)
    moe_op = spec.build_and_load()

    class Runner:
        def forward(self, inputs, tactic=-1, **kwargs):
            common = (
                kwargs["routing_bias"],
                self.top_k,
                float(kwargs.get("routed_scaling_factor", 1.0)),
            )
            moe_op.trtllm_x_moe(inputs.routing_logits, *common, list(tactic))

    @register_custom_op("flashinfer::trtllm_x_moe")
    def trtllm_x_moe_op(routing_logits, routing_bias, top_k, routed_scaling_factor=1.0):
        def run(tactic):
            return moe_op.trtllm_x_moe(
                routing_logits,
                routing_bias,
                top_k,
                routed_scaling_factor,
                [-1, -1] if tactic == -1 else tactic,
            )

        return run(-1)

    return SimpleNamespace(trtllm_x_moe=trtllm_x_moe_op, size=moe_op.trtllm_x_size, Runner=Runner)

def trtllm_x_moe(routing_logits, routing_bias, top_k, routed_scaling_factor=None):
    factor = 1.0 if routed_scaling_factor is None else routed_scaling_factor
    runtime = get_module()
    runtime.size(top_k)
    return get_module().trtllm_x_moe(routing_logits, routing_bias, top_k=top_k)
'''.replace(
    "routing_bias, top_k=top_k)",
    "routing_bias, top_k=top_k, routed_scaling_factor=routed_scaling_factor or factor)",
)  # fmt: skip

LAUNCHER = """
#include "tvm_ffi_utils.h"  // void trtllm_x_moe(int nothing) {
namespace flashinfer {
/* Array<Tensor> trtllm_x_moe(
   TensorView old) { */
template <typename T>
Array<Tensor> trtllm_x_moe(Optional<TensorView> const& routing_logits,  // [tokens, experts]
                           Optional<TensorView> routing_bias,
                           int64_t top_k, std::optional<std::pair<int, double>> routed_scaling_factor,
                           Array<int64_t> config_index) {
  log("trtllm_x_moe(", top_k);
  if (true) return trtllm_x_moe(routing_logits, top_k);
}
int64_t size_of(int64_t const top_k) { return top_k; }
}  // namespace flashinfer
TVM_FFI_DLL_EXPORT_TYPED_FUNC(trtllm_x_moe,
                              flashinfer::trtllm_x_moe<float>);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(trtllm_x_size, &flashinfer::size_of);
"""

CUTLASS = "fused_moe/cutlass_backend/flashinfer_cutlass_fused_moe_binding.cu"
DEEPGEMM = "fused_moe/cutlass_backend/deepgemm_jit_setup.cu"


def package(root, core=CORE, launcher=LAUNCHER, **more):
    contents = {
        "fused_moe/core.py": core,
        "data/csrc/trtllm_fused_moe_kernel_launcher.cu": launcher,
        f"data/csrc/{CUTLASS}": "// none\n",
        f"data/csrc/{DEEPGEMM}": "// none\n",
    }
    for name, text in {**contents, **more}.items():
        if text is not None:
            file = root / "flashinfer" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
    return Package.of(root)


def test_calls_that_fit(tmp_path):
    found = compare_operators(package(tmp_path))
    assert (found.differences, found.unread) == ((), ())
    # The runner's, the wrapper's, the public function's of the wrapper, and that of an alias.
    assert found.calls == 4


def test_an_argument_with_a_default_may_be_left_out(tmp_path):
    core = CORE.replace(", routed_scaling_factor=routed_scaling_factor or factor)", ")")
    core = core.replace(
        "routed_scaling_factor=None):\n    factor = 1.0 if routed_scaling_factor is None else routed_scaling_factor",
        "):",
    )
    found = compare_operators(package(tmp_path, core))
    assert (found.calls, found.differences, found.unread) == (4, (), ())


def test_an_argument_that_is_taken_by_name_alone_is_given_by_name(tmp_path):
    core = CORE.replace(
        "top_k, routed_scaling_factor=1.0):", "top_k, *, routed_scaling_factor=1.0):"
    )
    assert compare_operators(package(tmp_path / "a", core)).differences == ()
    by_place = core.replace("top_k=top_k, routed_scaling_factor=routed", "top_k, routed")
    found = compare_operators(package(tmp_path / "b", by_place)).differences
    assert any("4 arguments by place" in line and line.endswith("takes 3") for line in found), found


def test_names_that_stand_for_each_other_stand_for_no_operator(tmp_path):
    core = """
def loop(module, inputs):
    run = again
    again = run
    again(inputs)
"""
    found = compare_operators(package(tmp_path, CORE + core))
    assert (found.calls, found.differences, found.unread) == (4, (), ())


def test_a_method_need_not_read_its_self(tmp_path):
    method = "\nclass Plan:\n    def size(self, top_k):\n        get_module().size(top_k)\n"
    found = compare_operators(package(tmp_path, CORE + method))
    assert (found.calls, found.differences, found.unread) == (5, (), ())


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        # of the runner: lost in a tuple, swapped, another key
        ('                self.top_k,\n', "", "trtllm_x_moe: 4 arguments, C++ (trtllm_fused_moe_kernel_launcher.cu:7) has 5 parameters, no argument is named after top_k"),
        ('inputs.routing_logits, *common', '*common, inputs.routing_logits', "argument 1 is routing_bias, C++ (trtllm_fused_moe_kernel_launcher.cu:7) calls it routing_logits"),
        ('kwargs["routing_bias"]', 'kwargs["routing_scale"]', "argument 2 is routing_scale, C++ (trtllm_fused_moe_kernel_launcher.cu:7) calls it routing_bias"),
        ('kwargs.get("routed_scaling_factor"', 'kwargs.get("scale"', "argument 4 is scale, C++"),
        # of the wrapper
        ("                routed_scaling_factor,\n", "", "4 arguments, C++ (trtllm_fused_moe_kernel_launcher.cu:7) has 5 parameters, no argument is named after routed_scaling_factor"),
        ("                routing_bias,\n                top_k,", "                top_k,\n                routing_bias,", "argument 2 is top_k, C++"),
        ("else tactic,", "else tactic,\n                extra,", "6 arguments, C++ (trtllm_fused_moe_kernel_launcher.cu:7) has 5 parameters"),
        ("else tactic,", "else tactic, top_k=top_k,", "given by name, which C++ does not accept: top_k"),
        ("return moe_op.trtllm_x_moe(", "return moe_op.trtllm_y_moe(", "trtllm_y_moe: no C++ source of this file exports such an operator"),
        # of the public function
        ("(routing_logits, routing_bias, top_k=top_k", "(routing_bias, routing_logits, top_k=top_k", "argument 1 is routing_bias, the function at fused_moe/core.py:20 calls it routing_logits"),
        ("top_k=top_k, routed", "routed", "trtllm_x_moe: missing, by the function at fused_moe/core.py:20: top_k"),
        ("top_k=top_k, routed", "topk=top_k, routed", "unknown, by the function at fused_moe/core.py:20: topk"),
        ("top_k=top_k, routed", "top_k=routing_bias, routed", "argument 1 is routing_bias, the function at fused_moe/core.py:20 calls it top_k"),
        ("top_k=top_k, routed", "top_k, 1.0, 2.0, routed", "5 arguments by place, the function at fused_moe/core.py:20 takes 4"),
        ("runtime.size(top_k)", "runtime.size()", "trtllm_x_size: 0 arguments, C++ (trtllm_fused_moe_kernel_launcher.cu:14) has 1 parameters"),
        # accepted and ignored, by either
        ("def trtllm_x_moe(routing_logits,", "def trtllm_x_moe(enable_pdl, routing_logits,", "trtllm_x_moe accepts enable_pdl and ignores it"),
        ("top_k, routed_scaling_factor=1.0):", "top_k, routed_scaling_factor=1.0, replay=None):\n        _ = replay", "trtllm_x_moe_op accepts replay and ignores it"),
    ],
)  # fmt: skip
def test_a_python_side_that_does_not_fit(old, new, difference, tmp_path):
    assert CORE.count(old) == 1
    found = compare_operators(package(tmp_path, CORE.replace(old, new)))
    assert any(difference in line for line in found.differences), found


@pytest.mark.parametrize(
    ("old", "new", "difference"),
    [
        ("int64_t top_k, std", "std", "5 arguments, C++ (trtllm_fused_moe_kernel_launcher.cu:7) has 4 parameters"),
        # TVM FFI does not know defaults of C++.
        ("config_index)", "config_index, bool enable_pdl)", "5 arguments, C++ (trtllm_fused_moe_kernel_launcher.cu:7) has 6 parameters, no argument is named after enable_pdl"),
        ("config_index)", "config_index, bool enable_pdl = true)", "has 6 parameters, no argument is named after enable_pdl"),
        ("TensorView> routing_bias", "TensorView> routing_scale", "argument 2 is routing_bias, C++ (trtllm_fused_moe_kernel_launcher.cu:7) calls it routing_scale"),
        ("FUNC(trtllm_x_moe", "FUNC(trtllm_y_moe", "trtllm_x_moe: no C++ source of this file exports such an operator"),
        ("const top_k)", "const top_k, int64_t = 0)", "trtllm_x_size: 1 arguments, C++ (trtllm_fused_moe_kernel_launcher.cu:14) has 2 parameters"),
    ],
)  # fmt: skip
def test_a_cpp_side_that_does_not_fit(old, new, difference, tmp_path):
    assert LAUNCHER.count(old) == 1
    found = compare_operators(package(tmp_path, launcher=LAUNCHER.replace(old, new)))
    assert any(difference in line for line in found.differences), found


@pytest.mark.parametrize(
    ("core", "launcher", "unread"),
    [
        (("inputs.routing_logits, *common", "*inputs"), None, "trtllm_x_moe is called with *inputs, whose length is not written"),
        (("list(tactic))", "list(tactic), **kwargs)"), None, "trtllm_x_moe is called with ** of keywords"),
        (("    runtime.size(top_k)\n", ""), None, "trtllm_x_size is named, and no call of it is in this file"),
        (("return moe_op.trtllm_x_moe(", "return ops.trtllm_x_moe("), None, "ops.trtllm_x_moe is called, and who holds it cannot be told"),
        (("runtime.size(top_k)", "run = moe_op.a\n    run = moe_op.b\n    run(top_k)\n    runtime.size(top_k)"), None, "run is called, which is one of a, b"),
        (("def _impl", "DEEP = " + "1 + " * 1500 + "1\n\ndef _impl"), None, "fused_moe/core.py: its expressions are nested too deeply"),
        (None, ("int64_t size_of", "int64_t other"), "trtllm_x_size: trtllm_fused_moe_kernel_launcher.cu:18: there is no function size_of in this file"),
        (None, ("int64_t size_of", "int64_t size_of() { return 0; }\nint64_t size_of"), "there are 2 functions size_of"),
        (None, ("int64_t const top_k)", "\n#ifdef X\nint64_t top_k\n#endif\n)"), "its parameters depend on the preprocessor"),
        (None, ("int64_t const top_k)", "int64_t (*top_k)(int))"), "one of its parameters is 'int64_t (*top_k)(int)'"),
        (None, ("&flashinfer::size_of", "[](int64_t top_k) { return top_k; }"), "its export names no function"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_listed(core, launcher, unread, tmp_path):
    texts = [
        text.replace(*change) for text, change in ((CORE, core), (LAUNCHER, launcher)) if change
    ]
    assert all(text not in (CORE, LAUNCHER) for text in texts)
    (tmp_path / "x").mkdir()
    made = package(
        tmp_path / "x",
        CORE.replace(*core) if core else CORE,
        LAUNCHER.replace(*launcher) if launcher else LAUNCHER,
    )
    found = compare_operators(made)
    assert any(unread in line for line in found.unread), found
    assert found.differences == ()


@pytest.mark.parametrize(
    ("name", "calls", "difference"),
    [
        ("permute_{dtype}", 2, ""),
        ("permute_fp8", 1, ""),
        ("{kind}_{dtype}", 2, ""),
        ("permute_{dtype}_{kind}", 0, "permute_*_*: no C++ source of this file exports"),
    ],
)
def test_an_operator_that_is_looked_up_by_a_computed_name(name, calls, difference, tmp_path):
    utils = f"""
def permute(dtype, kind, size):
    name = f"{name}"
    function = gen_utils_module().build_and_load()[name]
    function(size, kind, dtype)
"""
    binding = "".join(
        f"void p{n}(int size, int kind, int dtype) {{}}\n"
        f"TVM_FFI_DLL_EXPORT_TYPED_FUNC({name}, p{n});\n"
        for n, name in enumerate(["permute_fp8", "permute_fp4", "inplace_permute_fp8"])
    )
    more = {
        "fused_moe/cute_dsl/moe_utils.py": utils,
        "data/csrc/moe_utils_binding.cu": binding,
    }
    found = compare_operators(package(tmp_path, **more))
    assert (found.calls - 4, found.unread) == (calls, ())
    assert all(difference and difference in line for line in found.differences)
    assert bool(found.differences) == bool(difference)


def test_a_source_that_is_not_there_is_listed(tmp_path):
    found = compare_operators(package(tmp_path, launcher=None))
    assert found.differences == ()
    assert any(
        line.endswith("the package has no trtllm_fused_moe_kernel_launcher.cu")
        for line in found.unread
    )


def test_a_file_with_operators_of_its_own_is_listed(tmp_path):
    more = {
        "fused_moe/new.py": "from ..jit.new import (\n    NAME,\n    gen_new_module,\n)\n",
        "fused_moe/plain.py": "from ..jit.core import JitSpec\nfrom .core import get_module\n",
    }
    found = compare_operators(package(tmp_path, **more))
    assert [line for line in found.unread if "operators.yaml" in line] == [
        "fused_moe/new.py: it loads compiled operators, and operators.yaml does not name it"
    ]


def test_both_branches_of_a_condition_are_compared(tmp_path):
    core = """
def run(module, fast, output, size):
    run_moe = module.fused_moe_runner.run_fast if fast else module.fused_moe_runner.run
    extra: list = [size] if fast else []
    run_moe(output, *extra)
"""
    methods = """
  if (name == "run") {
    return Function::FromTyped([this](TensorView output) { go(output); });
  } else if (name == "run_fast") {
    return tvm::ffi::Function::FromTyped(
        [this](TensorView output, int64_t size) -> int64_t { return size; });
  }
"""
    fits = compare_operators(package(tmp_path / "a", core, **{f"data/csrc/{CUTLASS}": methods}))
    assert (fits.calls, fits.differences, fits.unread) == (2, (), ())
    other = core.replace("[size] if fast else []", "[] if fast else [size]")
    found = compare_operators(package(tmp_path / "b", other, **{f"data/csrc/{CUTLASS}": methods}))
    assert [line.split(", C++")[0] for line in found.differences] == [
        "fused_moe/core.py:5: run_fast: 1 arguments",
        "fused_moe/core.py:5: run: 2 arguments",
    ]


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ("", ()),
        ("void", ()),
        ("TensorView x, bool", ("x", "")),
        ("std::string const& a, std::string", ("a", "")),
        ("Tuple<int, Array<int>> a = {1, 2}, int b[2], unsigned long c=f(1, \"),\")", ("a", "", "c")),
        ("int64_t /*unused*/, double\n  y // , int z\n", ("", "y")),
    ],
)  # fmt: skip
def test_names_of_parameters(parameters, names):
    text = f"static void f({parameters}) {{}}\nTVM_FFI_DLL_EXPORT_TYPED_FUNC(g, f);"
    assert operators("a.cu", text)["g"].parameters == names


def test_a_type_may_be_one_letter_behind_the_end_of_a_statement():
    text = "int n;T f(TensorView x) {}\nTVM_FFI_DLL_EXPORT_TYPED_FUNC(g, f);"
    assert operators("a.cu", text)["g"].parameters == ("x",)


def test_a_definition_outranks_its_declaration():
    text = (
        "namespace a { void f(TensorView, int64_t); }  // f(int old) {\n"
        "void a::f(TensorView x, int64_t top_k) { return g(f(x, 1)); }\n"
        "TVM_FFI_DLL_EXPORT_TYPED_FUNC(h, a::f);\n"
    )
    found = operators("a.cu", text)["h"]
    assert (found.parameters, found.where) == (("x", "top_k"), "a.cu:2")
    declared = operators(
        "a.cu", text.replace("{ return g(f(x, 1)); }", ";").replace("f(T", "k(T", 1)
    )
    assert declared["h"].parameters == ("x", "top_k")


#: What releases get wrong, confirmed in their sources. The fewer arguments of 0.6.8 are FlashInfer
#: PR 3094; the swapped ones reach the launcher only while tactics are tuned.
KNOWN = {
    "0.5.3": [
        "fused_moe/core.py:1155: trtllm_fp4_block_scale_moe: argument 28 is enable_pdl",
        "fused_moe/core.py:1155: trtllm_fp4_block_scale_moe: argument 29 is do_finalize",
    ],
    "0.6.4": [
        "fused_moe/core.py:1244: trtllm_fp4_block_scale_moe: argument 28 is enable_pdl",
        "fused_moe/core.py:1244: trtllm_fp4_block_scale_moe: argument 29 is do_finalize",
    ],
    "0.6.8": [
        "fused_moe/core.py:1184: trtllm_fp8_per_tensor_scale_moe: 24 arguments",
        "fused_moe/core.py:1569: trtllm_fp8_per_tensor_scale_moe: 24 arguments",
        "fused_moe/core.py:1469: trtllm_fp8_per_tensor_scale_moe_op accepts routing_replay_out "
        "and ignores it",
    ],
    "0.6.17": ["fused_moe/core.py:514: cutlass_fused_moe accepts profile_ids and ignores it"],
}
RELEASES = {wheel.name.split("-")[1]: wheel for wheel in wheels_since("0.5.3", "flashinfer_python")}


@pytest.mark.parametrize(
    "release", [r for r in RELEASES if r in KNOWN or Version(r) >= Version("0.6.11")]
)
def test_releases(release):
    found = examine(Package.of(RELEASES[release]))
    operators = [line for line in found.differences if line.startswith(("fused_moe/", "comm/"))]
    assert [line.split(", C++")[0] for line in operators] == KNOWN.get(release, [])
    assert found.calls > 40
