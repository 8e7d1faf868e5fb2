// How a .cu file launches and what its kernels call, under nvcc and under the SIMT shim alike.
#pragma once

#include "hd.h"

#if defined(MCV_SIMT)
#include "simt.h"
#else
#include <cuda_runtime.h>

// 0, or the error of the launch.
#define MCV_LAUNCH(kernel, blocks, threads, stream, ...)                          \
  (kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))
#define MCV_KERNEL(threads, blocks_per_multiprocessor) \
  static __global__ void __launch_bounds__(threads, blocks_per_multiprocessor)
#define MCV_ARGUMENT(type) const __grid_constant__ type
#define MCV_SHARED(type, name, count) __shared__ __align__(16) type name[count]
#endif

namespace mcv {
namespace MCV_ISA {

constexpr unsigned kWholeWarp = 0xffffffffu;

// Sum over groups of `lanes` neighbouring lanes, `stride` apart; every lane of the group gets it.
template <int lanes, int stride = 1>
__device__ __forceinline__ float sum_over_lanes(float x) {
  MCV_UNROLL for (int step = stride; step < lanes * stride; step *= 2) x += __shfl_xor_sync(kWholeWarp, x, step);
  return x;
}

__device__ __forceinline__ void load4(float* to, const float* from) {
  const Bytes16 bytes = *reinterpret_cast<const Bytes16*>(from);
  MCV_UNROLL for (int i = 0; i < 4; ++i) to[i] = bits_as<float>(bytes.word[i]);
}

// Columns of fp32 partial sums, added in the order of the rows: the same bits on every run.
struct PartialSums {
  const float* partials;  // [rows, columns]
  int64_t rows;
  int columns, columns_per_output;
  void* output[4];
  int dtype;
};

constexpr int kReduceColumns = 32, kReduceLanes = 16;

MCV_KERNEL(kReduceColumns* kReduceLanes, 1) reduce_partials(MCV_ARGUMENT(PartialSums) a) {
  MCV_SHARED(float, sums, kReduceLanes * kReduceColumns);
  const int lane = threadIdx.x / kReduceColumns, at = threadIdx.x % kReduceColumns;
  const int column = blockIdx.x * kReduceColumns + at;
  float sum = 0.0f;
  if (column < a.columns) {
    for (int64_t row = lane; row < a.rows; row += kReduceLanes) sum += a.partials[row * a.columns + column];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (lane != 0 || column >= a.columns) return;
  for (int i = 1; i < kReduceLanes; ++i) sum += sums[i * kReduceColumns + at];
  store_parameter(a.output[column / a.columns_per_output], a.dtype, column % a.columns_per_output, sum);
}

inline int launch_reduce_partials(const PartialSums& a, void* stream) {
  const unsigned blocks = unsigned((a.columns + kReduceColumns - 1) / kReduceColumns);
  return MCV_LAUNCH((reduce_partials), blocks, kReduceColumns * kReduceLanes, stream, a);
}

}  // namespace MCV_ISA
}  // namespace mcv
