// group_norm_moments on the GPU: sums per channel, and what is done to every value once the moments are known. Moments
// are merged over channels, and over ranks, between the two, in a few numbers per channel
// (megacogvx_kernels/group_norm_moments/compiled.py). Every access of a clip is 16 bytes. Least traffic of a value in
// bf16: forward 2 x 2 + 2 bytes (x is read twice), backward 2 x (2 + 2) + 2.
//
//   x^ = (x - mean) rstd,  p = x^ w + b,  y = p sigmoid(p);   g = dy y'(p),  dx = rstd (g w - m0 - x^ m1)
#include "../common/launch.h"
#include "../common/norm.h"
#include "args.h"

namespace mcv {
namespace MCV_ISA {

constexpr int kGroupNormThreads = 256;

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// One value of one channel, whose coefficients are k. Kinds with sums return two of them.
template <int kind>
__device__ __forceinline__ void of_value(float x, float dy, const float* k, bool has_silu, float* first, float* second) {
  if (kind == kMoments) {
    *first = x - k[0];
    *second = *first * *first;
    return;
  }
  const float normal = (x - k[0]) * k[1], plain = normal * k[2] + k[3];
  const float s = has_silu ? sigmoid(plain) : 1.0f;
  if (kind == kApply) {
    *first = plain * s;
    return;
  }
  const float g = has_silu ? dy * s * (1.0f + plain * (1.0f - s)) : dy;
  *first = kind == kGradientSums ? g : k[1] * (g * k[2] - k[4] - normal * k[5]);
  *second = g * normal;
}

// Where a thread finds its values: `stride` apart, from `begin` to `end`; and the first of its channels.
struct Walk {
  int64_t begin, end, stride, channel;
};

template <bool is_channels_last>
__device__ __forceinline__ Walk walk_of(const GroupNormArgs& a, int64_t chunk, int64_t outer) {
  if (!is_channels_last) {  // outer is sample and channel
    const int64_t first = outer * a.positions + chunk * kChunkPositions;
    const int64_t last = outer * a.positions + smaller<int64_t>((chunk + 1) * kChunkPositions, a.positions);
    return {first + int64_t(threadIdx.x) * kChunk, last, kGroupNormThreads * kChunk, outer};
  }
  const int lanes = int(a.channels / kChunk), rows = kGroupNormThreads / lanes, row = threadIdx.x / lanes;
  const int64_t channel = threadIdx.x % lanes * kChunk, base = outer * a.positions;
  const int64_t last = base + smaller<int64_t>((chunk + 1) * kChunkPositionsLast, a.positions);
  const int64_t first = row < rows ? base + chunk * kChunkPositionsLast + row : last;
  return {first * a.channels + channel, last * a.channels, rows * a.channels, outer * a.channels + channel};
}

template <bool is_channels_last>
__device__ __forceinline__ void store_sums(const GroupNormArgs& a, const float (*sums)[kChunk], int64_t chunk, int64_t outer) {
  if constexpr (!is_channels_last) {
    MCV_SHARED(float, of_warps, 2 * kGroupNormThreads / 32);
    MCV_UNROLL for (int which = 0; which < 2; ++which) {
      const float sum = sum_over_lanes<32>(sum8(sums[which]));
      if (threadIdx.x % 32 == 0) of_warps[which * kGroupNormThreads / 32 + threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x >= 2) return;
    float sum = 0.0f;
    for (int i = 0; i < kGroupNormThreads / 32; ++i) sum += of_warps[threadIdx.x * kGroupNormThreads / 32 + i];
    const int64_t sample = outer / a.channels, channel = outer % a.channels;
    static_cast<float*>(a.out)[((sample * a.chunks + chunk) * a.channels + channel) * 2 + threadIdx.x] = sum;
  } else {
    MCV_SHARED(float, of_rows, 2 * kGroupNormThreads * kChunk);  // [rows, C, 2]
    const int lanes = int(a.channels / kChunk), rows = kGroupNormThreads / lanes, row = threadIdx.x / lanes;
    MCV_UNROLL for (int i = 0; i < kChunk; ++i) {
      const int64_t at = row * a.channels + threadIdx.x % lanes * kChunk + i;
      if (row < rows) of_rows[2 * at] = sums[0][i], of_rows[2 * at + 1] = sums[1][i];
    }
    __syncthreads();
    for (int at = threadIdx.x; at < 2 * a.channels; at += kGroupNormThreads) {
      float sum = 0.0f;
      for (int other = 0; other < rows; ++other) sum += of_rows[other * 2 * a.channels + at];
      static_cast<float*>(a.out)[(outer * a.chunks + chunk) * a.channels * 2 + at] = sum;
    }
  }
}

template <class S, int kind, bool is_channels_last>
MCV_KERNEL(kGroupNormThreads, 2) group_norm(MCV_ARGUMENT(GroupNormArgs) a) {
  constexpr bool has_sums = kind == kMoments || kind == kGradientSums;
  constexpr bool has_gradient = kind == kGradientSums || kind == kApplyGradient;
  constexpr int vectors = is_channels_last ? kChunk : 1;  // of coefficients: a thread's channels don't change
  const int64_t chunk = blockIdx.x % a.chunks, outer = blockIdx.x / a.chunks;
  const Walk walk = walk_of<is_channels_last>(a, chunk, outer);
  float k[vectors][kCoefficients], sums[2][kChunk] = {};
  MCV_UNROLL for (int i = 0; i < vectors; ++i) {
    MCV_UNROLL for (int j = 0; j < kCoefficients; ++j) {
      k[i][j] = a.coefficients[(walk.channel + i) * kCoefficients + j];
    }
  }
  for (int64_t at = walk.begin; at < walk.end; at += walk.stride) {
    Raw8<S> raw;
    float x[kChunk], dy[kChunk] = {}, first[kChunk], second[kChunk];
    raw.load(static_cast<const S*>(a.x) + at);
    raw.unpack(x);
    if (has_gradient) {
      Raw8<S> gradient;
      gradient.load(static_cast<const S*>(a.gradient) + at);
      gradient.unpack(dy);
    }
    MCV_UNROLL for (int i = 0; i < kChunk; ++i) {
      of_value<kind>(x[i], dy[i], k[vectors == 1 ? 0 : i], a.has_silu, &first[i], &second[i]);
    }
    if (has_sums) {
      MCV_UNROLL for (int i = 0; i < kChunk; ++i) sums[0][i] += first[i], sums[1][i] += second[i];
      continue;
    }
    Raw8<S> out;
    out.pack(first);
    out.store(static_cast<S*>(a.out) + at);
  }
  if (has_sums) store_sums<is_channels_last>(a, sums, chunk, outer);
}

template <class S, int kind>
int launch_group_norm(const GroupNormArgs& a, void* stream) {
  if (a.is_channels_last) {
    return MCV_LAUNCH((group_norm<S, kind, true>), unsigned(a.batch * a.chunks), kGroupNormThreads, stream, a);
  }
  const unsigned blocks = unsigned(a.batch * a.channels * a.chunks);
  return MCV_LAUNCH((group_norm<S, kind, false>), blocks, kGroupNormThreads, stream, a);
}

template <class S>
int launch_group_norm_kind(const GroupNormArgs& a, int kind, void* stream) {
  switch (kind) {
    case kMoments: return launch_group_norm<S, kMoments>(a, stream);
    case kGradientSums: return launch_group_norm<S, kGradientSums>(a, stream);
    case kApply: return launch_group_norm<S, kApply>(a, stream);
    default: return launch_group_norm<S, kApplyGradient>(a, stream);
  }
}

}  // namespace MCV_ISA
}  // namespace mcv

extern "C" int mcv_group_norm_cuda(const mcv::GroupNormArgs* args, int kind, int dtype, void* stream) {
  using namespace mcv::MCV_ISA;
  if (dtype == mcv::kFloat32) return launch_group_norm_kind<float>(*args, kind, stream);
  if (dtype == mcv::kBFloat16) return launch_group_norm_kind<bf16>(*args, kind, stream);
  return launch_group_norm_kind<fp16>(*args, kind, stream);
}
