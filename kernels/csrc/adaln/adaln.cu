// adaln on the GPU. Forward a block owns one token, backward one run of tokens of the same row; a thread owns 8 channels
// (forward 16), so every access of tokens and tables is 16 bytes. Least traffic of a token at D = 3072 in bf16:
// modulate 12,288 bytes forward, 18,432 backward; gate, residual and modulate 24,576 and 36,864.
#include "../common/launch.h"
#include "core.h"

namespace mcv {
namespace MCV_ISA {

constexpr int kWidest = 4096, kMaxWarps = 16;

// Sum over the block; every thread gets it. `memory` holds one number a warp, and isn't reused before two barriers.
__device__ __forceinline__ float sum_over_block(float x, float* memory, int warps) {
  const float of_warp = sum_over_lanes<32>(x);
  if (threadIdx.x % 32 == 0) memory[threadIdx.x / 32] = of_warp;
  __syncthreads();
  float sum = 0.0f;
  for (int warp = 0; warp < warps; ++warp) sum += memory[warp];
  return sum;
}

template <int chunks>
__device__ __forceinline__ Statistics<float> statistics(
    const float (*x)[kChunk], const bool* is_live, const AdalnArgs& a, float* memory, int warps) {
  float sum[kChunk] = {}, squares[kChunk] = {};
  MCV_UNROLL for (int c = 0; c < chunks; ++c) {
    if (is_live[c]) add<kChunk>(sum, x[c]);
  }
  const float mean = sum_over_block(sum8(sum), memory, warps) / float(a.width);
  MCV_UNROLL for (int c = 0; c < chunks; ++c) {
    if (is_live[c]) add_squares<kChunk>(squares, x[c], mean);
  }
  const float variance = sum_over_block(sum8(squares), memory + kMaxWarps, warps) / float(a.width);
  return {mean, rsqrt_of(variance + float(a.eps))};
}

// Eight values of a vector of the parameters' or a table's own dtype.
__device__ __forceinline__ void load_vector(float* to, const void* from, int dtype, int64_t first) {
  if (dtype == kFloat32) {
    Raw8<float> raw;
    raw.load(static_cast<const float*>(from) + first);
    raw.unpack(to);
  } else if (dtype == kBFloat16) {
    Raw8<bf16> raw;
    raw.load(static_cast<const bf16*>(from) + first);
    raw.unpack(to);
  } else {
    Raw8<fp16> raw;
    raw.load(static_cast<const fp16*>(from) + first);
    raw.unpack(to);
  }
}

template <class S, bool has_branch, bool is_modulated>
MCV_KERNEL(256, 4) adaln_forward(MCV_ARGUMENT(AdalnArgs) a) {
  constexpr int chunks = 2;
  MCV_SHARED(float, memory, 2 * kMaxWarps);
  const int64_t token = blockIdx.x, row = a.rows[token];
  const int warps = blockDim.x / 32;
  float x[chunks][kChunk];
  bool is_live[chunks];
  MCV_UNROLL for (int c = 0; c < chunks; ++c) {
    const int channel = (c * blockDim.x + threadIdx.x) * kChunk;
    const int64_t at = token * a.width + channel;
    is_live[c] = channel < a.width;
    if (!is_live[c]) continue;
    Raw8<S> raw;
    raw.load(static_cast<const S*>(a.x) + at);
    if (!has_branch) {
      raw.unpack(x[c]);
      continue;
    }
    Raw8<S> branch;
    float b[kChunk], gate[kChunk];
    branch.load(static_cast<const S*>(a.branch) + at);
    load_vector(gate, a.gates, a.gates_dtype, row * a.gates_stride + kGate * int64_t(a.width) + channel);
    raw.unpack(x[c]), branch.unpack(b);
    add_gated<kChunk>(x[c], x[c], b, gate);
    raw.pack(x[c]);
    raw.store(static_cast<S*>(a.residual) + at);
    raw.unpack(x[c]);  // what follows sees the residual as it is stored
  }
  if (!is_modulated) return;
  const Statistics<float> s = statistics<chunks>(x, is_live, a, memory, warps);
  MCV_UNROLL for (int c = 0; c < chunks; ++c) {
    if (!is_live[c]) continue;
    const int channel = (c * blockDim.x + threadIdx.x) * kChunk;
    const int64_t in_table = row * a.table_stride + channel;
    float weight[kChunk], bias[kChunk], scale[kChunk], shift[kChunk];
    load_vector(weight, a.weight, a.parameter_dtype, channel);
    load_vector(bias, a.bias, a.parameter_dtype, channel);
    load_vector(shift, a.table, a.table_dtype, in_table + kShift * int64_t(a.width));
    load_vector(scale, a.table, a.table_dtype, in_table + kScale * int64_t(a.width));
    modulate<kChunk>(x[c], x[c], s, weight, bias, scale, shift);
    Raw8<S> out;
    out.pack(x[c]);
    out.store(static_cast<S*>(a.modulated) + token * a.width + channel);
  }
}

// What a thread reads of one token, still as stored: the next token's can be on its way while this one's is computed.
template <class S, bool has_branch, bool is_modulated>
struct Inputs {
  Raw8<S> x, dy, dr, branch;

  __device__ __forceinline__ void load(const AdalnArgs& a, int64_t at, bool is_live) {
    if (!is_live) return;
    if (is_modulated) x.load(static_cast<const S*>(a.x) + at), dy.load(static_cast<const S*>(a.modulated_gradient) + at);
    if (has_branch) dr.load(static_cast<const S*>(a.residual_gradient) + at);
    if (has_branch) branch.load(static_cast<const S*>(a.branch) + at);
  }
};

template <class S, bool has_branch, bool is_modulated>
MCV_KERNEL(512, 1) adaln_backward(MCV_ARGUMENT(AdalnArgs) a) {
  MCV_SHARED(float, memory, 4 * kMaxWarps);
  const int64_t first = a.runs[3 * int64_t(blockIdx.x)], end = a.runs[3 * int64_t(blockIdx.x) + 1];
  const int64_t row = a.runs[3 * int64_t(blockIdx.x) + 2];
  const int warps = blockDim.x / 32, channel = threadIdx.x * kChunk;
  const bool is_live = channel < a.width;
  float weight[kChunk] = {}, scale[kChunk] = {}, gate[kChunk] = {};
  if (is_live && is_modulated) {
    load_vector(weight, a.weight, a.parameter_dtype, channel);
    load_vector(scale, a.table, a.table_dtype, row * a.table_stride + kScale * int64_t(a.width) + channel);
  }
  if (is_live && has_branch) {
    load_vector(gate, a.gates, a.gates_dtype, row * a.gates_stride + kGate * int64_t(a.width) + channel);
  }
  float sums[3][kChunk] = {};
  constexpr bool has_next = sizeof(S) == 2;  // of fp32, two tokens don't fit into the registers
  Inputs<S, has_branch, is_modulated> now = {}, next = {};
  if (has_next) next.load(a, first * a.width + channel, is_live);
  for (int64_t token = first; token < end; ++token) {
    const int64_t at = token * a.width + channel;
    if (has_next) now = next, next.load(a, at + a.width, is_live && token + 1 < end);
    else now.load(a, at, is_live);
    float dr[1][kChunk] = {};
    if (is_modulated) {
      float x[1][kChunk], dy[kChunk], sum_g[kChunk] = {}, sum_gx[kChunk] = {};
      now.x.unpack(x[0]), now.dy.unpack(dy);
      const Statistics<float> s = statistics<1>(x, &is_live, a, memory, warps);
      if (is_live) modulation_gradients<kChunk>(x[0], dy, s, weight, scale, sums[0], sums[1], sum_g, sum_gx);
      const float of_warp_gx = sum_over_lanes<32>(sum8(sum_gx));
      if (threadIdx.x % 32 == 0) memory[3 * kMaxWarps + threadIdx.x / 32] = of_warp_gx;
      const float mean_g = sum_over_block(sum8(sum_g), memory + 2 * kMaxWarps, warps) / float(a.width);
      float sum_all_gx = 0.0f;
      for (int warp = 0; warp < warps; ++warp) sum_all_gx += memory[3 * kMaxWarps + warp];
      input_gradient<kChunk>(dr[0], x[0], dy, s.rstd, mean_g, sum_all_gx / float(a.width));
    }
    if (!is_live) continue;
    Raw8<S> out;
    if (has_branch) {
      float residual[kChunk], branch[kChunk], dbranch[kChunk];
      now.dr.unpack(residual), now.branch.unpack(branch);
      add<kChunk>(dr[0], residual);
      gate_gradients<kChunk>(dbranch, dr[0], branch, gate, sums[2]);
      out.pack(dbranch);
      out.store(static_cast<S*>(a.branch_gradient) + at);
    }
    if (!is_modulated) continue;
    out.pack(dr[0]);
    out.store(static_cast<S*>(a.x_gradient) + at);
  }
  if (!is_live) return;
  MCV_UNROLL for (int which = 0; which < 3; ++which) {
    Raw8<float> out;
    out.pack(sums[which]);
    out.store(static_cast<float*>(a.partials) + (int64_t(blockIdx.x) * 3 + which) * a.width + channel);
  }
}

constexpr int kColumns = 32, kLanes = 16;

// Sums of the runs of each row, in their order, 16 at a time; then the gradients of tables, weight and bias.
MCV_KERNEL(kColumns* kLanes, 1) adaln_gradients(MCV_ARGUMENT(AdalnArgs) a) {
  MCV_SHARED(float, parts, 2 * 3 * kLanes * kColumns);  // two rows' worth: one is read while the next is written
  const int lane = threadIdx.x / kColumns, at = threadIdx.x % kColumns;
  const int channel = blockIdx.x * kColumns + at;
  const bool is_live = channel < a.width;
  ChannelGradients<float> total;
  for (int64_t row = 0; row < a.num_rows; ++row) {
    float* const mine = parts + (row % 2) * 3 * kLanes * kColumns;
    float sums[3] = {};
    for (int64_t run = a.run_starts[row] + lane; is_live && run < a.run_starts[row + 1]; run += kLanes) {
      const float* from = static_cast<const float*>(a.partials) + run * 3 * a.width + channel;
      MCV_UNROLL for (int which = 0; which < 3; ++which) sums[which] += from[which * int64_t(a.width)];
    }
    MCV_UNROLL for (int which = 0; which < 3; ++which) mine[(which * kLanes + lane) * kColumns + at] = sums[which];
    __syncthreads();
    if (lane != 0 || !is_live) continue;
    MCV_UNROLL for (int which = 0; which < 3; ++which) {
      for (int other = 1; other < kLanes; ++other) sums[which] += mine[(which * kLanes + other) * kColumns + at];
    }
    total.add_row(a, row, channel, sums[0], sums[1], sums[2]);
  }
  if (lane != 0 || !is_live || !a.table_gradient) return;
  store_parameter(a.weight_gradient, a.parameter_dtype, channel, total.weight);
  store_parameter(a.bias_gradient, a.parameter_dtype, channel, total.bias);
}

inline unsigned threads_for(int width, int chunks) {
  return unsigned((width + 32 * kChunk * chunks - 1) / (32 * kChunk * chunks) * 32);
}

template <class S>
int launch_forward(const AdalnArgs& a, void* stream) {
  const unsigned blocks = unsigned(a.tokens), threads = threads_for(a.width, 2);
  if (!a.branch) return MCV_LAUNCH((adaln_forward<S, false, true>), blocks, threads, stream, a);
  if (!a.modulated) return MCV_LAUNCH((adaln_forward<S, true, false>), blocks, threads, stream, a);
  return MCV_LAUNCH((adaln_forward<S, true, true>), blocks, threads, stream, a);
}

template <class S>
int launch_runs(const AdalnArgs& a, void* stream) {
  const unsigned blocks = unsigned(a.num_runs), threads = threads_for(a.width, 1);
  if (!a.branch) return MCV_LAUNCH((adaln_backward<S, false, true>), blocks, threads, stream, a);
  if (!a.modulated_gradient) return MCV_LAUNCH((adaln_backward<S, true, false>), blocks, threads, stream, a);
  return MCV_LAUNCH((adaln_backward<S, true, true>), blocks, threads, stream, a);
}

template <class S>
int launch_backward(const AdalnArgs& a, void* stream) {
  const int error = a.num_runs ? launch_runs<S>(a, stream) : 0;
  if (error) return error;
  const unsigned blocks = unsigned((a.width + kColumns - 1) / kColumns);
  return MCV_LAUNCH((adaln_gradients), blocks, kColumns * kLanes, stream, a);
}

}  // namespace MCV_ISA
}  // namespace mcv

extern "C" int mcv_adaln_forward_cuda(const mcv::AdalnArgs* args, int dtype, void* stream) {
  using namespace mcv::MCV_ISA;
  if (args->tokens == 0) return 0;
  if (dtype == mcv::kFloat32) return launch_forward<float>(*args, stream);
  if (dtype == mcv::kBFloat16) return launch_forward<bf16>(*args, stream);
  return launch_forward<fp16>(*args, stream);
}

extern "C" int mcv_adaln_backward_cuda(const mcv::AdalnArgs* args, int dtype, void* stream) {
  using namespace mcv::MCV_ISA;
  if (dtype == mcv::kFloat32) return launch_backward<float>(*args, stream);
  if (dtype == mcv::kBFloat16) return launch_backward<bf16>(*args, stream);
  return launch_backward<fp16>(*args, stream);
}
