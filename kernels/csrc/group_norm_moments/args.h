// Arguments of the kernels of group_norm_moments: plain pointers and numbers, filled by bindings.cpp.
#pragma once

#include <cstdint>

namespace mcv {

enum GroupNormKind : int { kMoments = 0, kGradientSums = 1, kApply = 2, kApplyGradient = 3 };

constexpr int kChunkPositions = 16384;    // of one channel, that one block takes; channels-last:
constexpr int kChunkPositionsLast = 512;  // of all channels
constexpr int kCoefficients = 6;          // mean, rstd, weight, bias, and two means of the gradient

struct GroupNormArgs {
  const void *x, *gradient;     // [B, C, P] or, channels-last, [B, P, C]; P = T H W
  void* out;                    // of that shape; or fp32 sums [B, chunks, C, 2]
  const float* coefficients;    // [B, C, 6]
  int64_t batch, channels, positions, chunks;
  int is_channels_last, has_silu;
};

}  // namespace mcv

// Returns 0, or the code of the error (cudaError_t).
extern "C" int mcv_group_norm_cuda(const mcv::GroupNormArgs* args, int kind, int dtype, void* stream);
