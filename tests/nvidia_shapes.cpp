// How many of NVIDIA's kernels take a weight of M x K, by kind of kernel, on a CPU.
//
//     nvidia_shapes M K [M K ...]
//
// NVIDIA's headers come from flashinfer-cubin; only two functions of the CUDA driver are missing.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>

#include "flashinfer/trtllm/batched_gemm/trtllmGen_bmm_export/BatchedGemmInterface.h"

using namespace batchedGemm::batchedGemm;

extern "C" CUresult cuGetErrorString(CUresult, const char** text) {
  *text = "";
  return CUDA_SUCCESS;
}
extern "C" CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                           const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                           const cuuint32_t*, CUtensorMapInterleave,
                                           CUtensorMapSwizzle, CUtensorMapL2promotion,
                                           CUtensorMapFloatOOBfill) {
  std::abort();
}

int main(int count, char** sizes) {
  BatchedGemmInterface kernels;
  auto const* configs = kernels.getBatchedGemmConfigs();
  for (int i = 1; i + 1 < count; i += 2) {
    BatchedGemmData data;
    auto& problem = data.mProblemDimensions;
    problem.mNumBatches = 8;
    problem.mNumTokens = 64;
    problem.mBatchM = false;
    problem.mBatchedN = std::vector<int32_t>(8, 8);
    problem.mM = problem.mValidM = std::atoi(sizes[i]);
    problem.mN = problem.mValidN = 64;
    problem.mK = problem.mValidK = std::atoi(sizes[i + 1]);
    problem.mMaxNumCtasInTokenDim = 16;
    problem.mWorldSize = 1;
    std::map<std::string, int> valid;
    for (size_t n = 0; n < kernels.getNumBatchedGemmConfigs(); ++n) {
      auto const& config = configs[n];
      auto const& options = config.mOptions;
      if (!options.mTransposeMmaOutput) continue;
      std::string kind = config.mFunctionName;
      kind = kind.substr(0, kind.find("_Fp32")) + (options.mFusedAct ? " act" : " none") +
             (options.mUseDeepSeekFp8 ? " deepseek" : " other") + " layout" +
             std::to_string(static_cast<int>(options.mLayoutA));
      valid[kind] += kernels.isValidConfig(config, data);
    }
    for (auto const& [kind, number] : valid) {
      std::printf("%s %s %s %d\n", sizes[i], sizes[i + 1], kind.c_str(), number);
    }
  }
}
