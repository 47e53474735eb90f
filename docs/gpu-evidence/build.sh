#!/usr/bin/env bash
# Builds for sm_90a, from the sources in flashinfer-python 0.7.2.post1 and the export headers and
# manifest in flashinfer-cubin 0.6.13, the newest of PyPI:
#   stages.so                two kernels behind a C interface (stages.cu)
#   trtllm_gen_routing.so    FlashInfer's routing operator
#   launcher.so              its fused launcher; pretend.c answers for the compute capability
#
#   build.sh FLASHINFER_DATA CUBIN_INCLUDE TVM_FFI
#
# About 20 minutes on one core, 5 on sixteen.
set -euo pipefail
data=$1 export=$2 tvm=$3
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p gen/flashinfer/trtllm/batched_gemm
ln -sfn "$export/trtllmGen_bmm_export" gen/flashinfer/trtllm/batched_gemm/trtllmGen_bmm_export
flags=(-std=c++17 -O3 -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -use_fast_math
  -Xcompiler -fPIC -DTLLM_GEN_EXPORT_INTERFACE -DTLLM_GEN_EXPORT_FLASHINFER -DTLLM_ENABLE_CUDA
  -DENABLE_BF16 -DENABLE_FP8 -DENABLE_FP4 -DFLASHINFER_ENABLE_F16 -DFLASHINFER_ENABLE_BF16
  -DFLASHINFER_ENABLE_FP8_E4M3 -DFLASHINFER_ENABLE_FP8_E5M2 '-DTLLM_GEN_GEMM_CUBIN_PATH="cubins"'
  # The headers of 0.6.13 know neither SiTuGlu nor Sm107a. With this flag nothing asks for the one;
  # the other is asked for once, and stands for an architecture that is not built.
  -DTLLM_RUBIN_FEATURES -DSm107a=Sm90a
  -Igen -I"$export" -I"$data/include" -I"$data/csrc" -I"$data/csrc/nv_internal"
  -I"$data/csrc/nv_internal/include" -I"$data/cutlass/include" -I"$data/cutlass/tools/util/include"
  -I"$data/spdlog/include" -I"$tvm/include")
moe=$data/csrc/fused_moe/trtllm_backend
compile() { [ -e "$(basename "$1").o" ] || nvcc "${flags[@]}" -x cu -c "$1" -o "$(basename "$1").o"; }
common=("$data"/csrc/nv_internal/cpp/common/{envUtils,logger,stringUtils,tllmException}.cpp
  "$moe/trtllm_fused_moe_dev_kernel.cu")
routing=("$moe"/trtllm_fused_moe_routing_{runner,deepseek,llama4,custom_block,custom_cluster}.cu
  "$moe"/trtllm_fused_moe_routing_{custom_cluster_large,custom_entry,common}.cu)
binding=$data/csrc/trtllm_fused_moe_routing_binding.cu
launcher=("$data"/csrc/trtllm_fused_moe_{kernel_launcher,runner}.cu
  "$data/csrc/trtllm_batched_gemm_runner.cu" "$data/csrc/nv_internal/cpp/kernels/quantization.cu"
  "$data/csrc/nv_internal/cpp/common/memoryUtils.cu")
for source in "$here/stages.cu" "$binding" "${common[@]}" "${routing[@]}" "${launcher[@]}"; do
  compile "$source"
done
objects() { for source in "$@"; do basename "$source" | sed 's/$/.o/'; done; }
gcc -c -fPIC "$here/pretend.c" -o pretend.o
nvcc -shared -o stages.so $(objects "$here/stages.cu" "${common[@]}")
link=(-shared -cudart shared -lcuda)
nvcc "${link[@]}" -o trtllm_gen_routing.so $(objects "$binding" "${routing[@]}")
nvcc "${link[@]}" -Xlinker --wrap=cudaDeviceGetAttribute -o launcher.so pretend.o \
  $(objects "${routing[@]}" "${launcher[@]}" "${common[@]}")
