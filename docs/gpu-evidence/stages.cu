// The two kernels around FlashInfer's second GEMM that run on Hopper as they are: the sum over experts
// (`trtllm_moe_run_finalize`) and the activation of DeepSeek FP8
// (`trtllm_moe_run_deepseek_fp8_activation`), called as `trtllm_fused_moe_runner.cu:500-580` does.
#include <cuda_runtime.h>

#include "flashinfer/trtllm/fused_moe/DevKernel.h"

namespace tg = batchedGemm::trtllm::gen;

extern "C" int run_finalize(void* rows, void* weights, int weights_are_float, int* expanded,
                            int* padded, void* output, int tokens, int experts, int top_k,
                            int hidden, int stride) {
  try {
    moe::dev::finalize::Data data;
    data.mDtypeElt = tg::Dtype::Bfloat16;
    data.mDtypeExpW = weights_are_float ? tg::Dtype::Fp32 : tg::Dtype::Bfloat16;
    data.inPtr = rows;
    data.outPtr = output;
    data.expertWeightsPtr = weights;
    data.expandedIdxToPermutedIdx = expanded;
    data.numTokens = tokens;
    data.numExperts = experts;
    data.topK = top_k;
    data.hiddenDim = hidden;
    data.hiddenDimPadded = stride;
    data.totalNumPaddedTokens = padded;
    moe::dev::finalize::run(data, nullptr);
  } catch (std::exception const& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
  return static_cast<int>(cudaDeviceSynchronize());
}

extern "C" int run_activation(void* in, float* in_scales, void* out, float* out_scales,
                              int* expanded, int* padded, int* expert_of_tile, float* alpha,
                              float* beta, float* limit, int tokens, int top_k, int columns,
                              int tile) {
  try {
    moe::dev::activation::Data data;
    data.mDtypeElt = tg::Dtype::E4m3;
    data.mUseDeepSeekFp8 = true;
    data.inPtr = in;
    data.outPtr = out;
    data.inDqSfsPtr = in_scales;
    data.outDqSfsPtr = out_scales;
    data.innerDim = columns;
    data.numTokens = tokens;
    data.topK = top_k;
    data.expandedIdxToPermutedIdx = expanded;
    data.totalNumPaddedTokens = padded;
    data.gatedActAlphaPtr = alpha;
    data.gatedActBetaPtr = beta;
    data.gatedActClampLimitPtr = limit;
    data.ctaIdxXyToBatchIdx = expert_of_tile;
    data.tileTokensDim = tile;
    moe::dev::activation::run(data, nullptr);
  } catch (std::exception const& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
  return static_cast<int>(cudaDeviceSynchronize());
}
