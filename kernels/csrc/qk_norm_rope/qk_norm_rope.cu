// qk_norm_rope on the GPU. A block owns 32 tokens; a group of `lanes` neighbouring lanes owns one head, 8 channels a
// lane, so every access of q, k and their gradients is 16 bytes. Least traffic at 48 heads of 64 in bf16: forward
// 24,576 bytes a token (q and k read, q and k written), backward 36,864 plus the zeros of v's gradient.
#include "../common/launch.h"
#include "core.h"

namespace mcv {
namespace MCV_ISA {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// cos and sin of the block's tokens, [32, pairs]; 1 and 0 where nothing is rotated.
template <int pairs>
__device__ __forceinline__ void fill_turns(const QkNormRopeArgs& a, int64_t first, int count, float* cosine, float* sine) {
  for (int i = threadIdx.x; i < count * pairs; i += kThreads) {
    const int pair = i % pairs;
    const Position<float> position = position_of<float>(a, a.token_offset + first + i / pairs);
    float c = 1.0f, s = 0.0f;
    if (position.is_video && 2 * pair < a.width) {
      const int axis = axis_of_pair(a, pair);
      const float along = axis == 0 ? position.axis[0] : (axis == 1 ? position.axis[1] : position.axis[2]);
      turn(along * float(a.half_turns[pair]), &c, &s);
    }
    cosine[i] = c, sine[i] = s;
  }
}

// One lane's 8 channels of the weights of q and k (or of their biases); lanes beyond the width hold zeros.
__device__ __forceinline__ void load_lane(
    float (*to)[kChunk], const void* const* from, const QkNormRopeArgs& a, int channel) {
  MCV_UNROLL for (int part = 0; part < 2; ++part) {
    MCV_UNROLL for (int i = 0; i < kChunk; ++i) to[part][i] = 0.0f;
    if (channel < a.width) load_parameters<kChunk>(to[part], from[part], a.parameter_dtype, channel);
  }
}

template <int lanes>
__device__ __forceinline__ Statistics<float> statistics(const float* x, const QkNormRopeArgs& a, bool is_active) {
  const float mean = sum_over_lanes<lanes>(sum8(x)) / float(a.width);
  float squares[kChunk] = {};
  if (is_active) add_squares<kChunk>(squares, x, mean);
  return {mean, rsqrt_of(sum_over_lanes<lanes>(sum8(squares)) / float(a.width) + float(a.eps))};
}

// The q and k of one head of one token, still as stored.
template <class S>
struct Head {
  Raw8<S> part[2];

  __device__ __forceinline__ void load(const S* from, int64_t stride, bool is_live) {
    MCV_UNROLL for (int i = 0; i < 2; ++i) {
      if (is_live) part[i].load(from + i * stride); else part[i].clear();
    }
  }
};

template <class S, int lanes>
MCV_KERNEL(kThreads, 2) qk_norm_rope_forward(MCV_ARGUMENT(QkNormRopeArgs) a) {
  constexpr int pairs = lanes * kChunk / 2, groups = kThreads / lanes;
  MCV_SHARED(float, cosine, kPartialTokens * pairs);
  MCV_SHARED(float, sine, kPartialTokens * pairs);
  const int64_t first = int64_t(blockIdx.x) * kPartialTokens;
  const int count = int(smaller<int64_t>(kPartialTokens, a.tokens - first));
  fill_turns<pairs>(a, first, count, cosine, sine);

  const int lane = threadIdx.x % lanes, channel = lane * kChunk;
  const bool is_active = channel < a.width;
  float weight[2][kChunk], bias[2][kChunk];
  load_lane(weight, a.weight, a, channel);
  load_lane(bias, a.bias, a, channel);
  __syncthreads();

  const int heads = count * a.heads;  // of all tokens of the block
  const auto source = [&](int head) {
    return static_cast<const S*>(a.qkv) + (first + head / a.heads) * a.stride_S + head % a.heads * a.stride_N + channel;
  };
  int head = threadIdx.x / lanes;
  Head<S> next;
  next.load(source(head), a.stride_3, is_active && head < heads);
  for (int base = 0; base < heads; base += groups, head += groups) {  // uniform over the warp: all lanes shuffle
    const Head<S> now = next;
    next.load(source(head + groups), a.stride_3, is_active && head + groups < heads);
    const bool is_live = is_active && head < heads;
    float c[kChunk / 2], s[kChunk / 2];
    const int turns = smaller(head, heads - 1) / a.heads * pairs + channel / 2;
    load4(c, cosine + turns), load4(s, sine + turns);
    MCV_UNROLL for (int part = 0; part < 2; ++part) {
      float x[kChunk], y[kChunk];
      now.part[part].unpack(x);
      const Statistics<float> stats = statistics<lanes>(x, a, is_active);
      normalise<kChunk>(y, x, stats.mean, stats.rstd, weight[part], bias[part]);
      rotate<kChunk>(y, c, s, 1.0f);
      Raw8<S> out;
      out.pack(y);
      S* to = static_cast<S*>(part == 0 ? a.q : a.k) + (first * a.heads + head) * a.width + channel;
      if (is_live) out.store(to);
    }
  }
}

// Sums over the block's groups of every lane's [4][8] gradients -> one row of partials, [4, width].
template <int lanes>
__device__ __forceinline__ void store_partials(const float (*mine)[kChunk], float* sums, const QkNormRopeArgs& a) {
  constexpr int width = lanes * kChunk;
  const int warp = threadIdx.x / 32, channel = threadIdx.x % lanes * kChunk;
  MCV_UNROLL for (int which = 0; which < 4; ++which) {
    MCV_UNROLL for (int i = 0; i < kChunk; ++i) {
      const float sum = sum_over_lanes<32 / lanes, lanes>(mine[which][i]);
      if (threadIdx.x % 32 < lanes) sums[(warp * 4 + which) * width + channel + i] = sum;
    }
  }
  __syncthreads();
  float* to = static_cast<float*>(a.partials) + int64_t(blockIdx.x) * 4 * a.width;
  for (int i = threadIdx.x; i < 4 * a.width; i += kThreads) {
    const int at = i / a.width * width + i % a.width;
    float sum = 0.0f;
    for (int other = 0; other < kWarps; ++other) sum += sums[other * 4 * width + at];
    to[i] = sum;
  }
}

template <class S, int lanes>
MCV_KERNEL(kThreads, 2) qk_norm_rope_backward(MCV_ARGUMENT(QkNormRopeArgs) a) {
  constexpr int pairs = lanes * kChunk / 2, groups = kThreads / lanes;
  MCV_SHARED(float, cosine, kPartialTokens * pairs);
  MCV_SHARED(float, sine, kPartialTokens * pairs);
  MCV_SHARED(float, sums, kWarps * 4 * lanes * kChunk);
  const int64_t first = int64_t(blockIdx.x) * kPartialTokens;
  const int count = int(smaller<int64_t>(kPartialTokens, a.tokens - first));
  fill_turns<pairs>(a, first, count, cosine, sine);

  const int lane = threadIdx.x % lanes, channel = lane * kChunk;
  const bool is_active = channel < a.width;
  float weight[2][kChunk], gradients[4][kChunk] = {};
  load_lane(weight, a.weight, a, channel);
  __syncthreads();

  const int heads = count * a.heads;
  int head = threadIdx.x / lanes;
  for (int base = 0; base < heads; base += groups, head += groups) {
    const bool is_live = is_active && head < heads;
    const int64_t token = first + head / a.heads, out = (first * a.heads + head) * a.width + channel;
    const S* from = static_cast<const S*>(a.qkv) + token * a.stride_S + head % a.heads * a.stride_N + channel;
    S* to = static_cast<S*>(a.qkv_gradient) + (first * a.heads + head) * 3 * a.width + channel;
    Head<S> inputs, from_next;
    inputs.load(from, a.stride_3, is_live);
    from_next.part[0].clear(), from_next.part[1].clear();
    if (is_live) from_next.part[0].load(static_cast<const S*>(a.q) + out);
    if (is_live) from_next.part[1].load(static_cast<const S*>(a.k) + out);
    float c[kChunk / 2], s[kChunk / 2];
    const int turns = smaller(head, heads - 1) / a.heads * pairs + channel / 2;
    load4(c, cosine + turns), load4(s, sine + turns);
    MCV_UNROLL for (int part = 0; part < 2; ++part) {
      float x[kChunk], g[kChunk], sum_g[kChunk] = {}, sum_gx[kChunk] = {};
      inputs.part[part].unpack(x);
      from_next.part[part].unpack(g);
      const Statistics<float> stats = statistics<lanes>(x, a, is_active);
      rotate<kChunk>(g, c, s, -1.0f);
      gradient_sums<kChunk>(
          x, g, stats.mean, stats.rstd, weight[part], gradients[2 * part], gradients[2 * part + 1], sum_g, sum_gx);
      const float mean_g = sum_over_lanes<lanes>(sum8(sum_g)) / float(a.width);
      const float mean_gx = sum_over_lanes<lanes>(sum8(sum_gx)) / float(a.width);
      input_gradient<kChunk>(g, x, g, stats.rstd, mean_g, mean_gx);
      Raw8<S> result;
      result.pack(g);
      if (is_live) result.store(to + part * a.width);
    }
    Raw8<S> zeros;
    zeros.clear();
    if (is_live) zeros.store(to + 2 * a.width);
  }
  store_partials<lanes>(gradients, sums, a);
}

template <class S, int lanes>
int launch(const QkNormRopeArgs& a, bool is_backward, void* stream) {
  const unsigned blocks = unsigned((a.tokens + kPartialTokens - 1) / kPartialTokens);
  if (!is_backward) return MCV_LAUNCH((qk_norm_rope_forward<S, lanes>), blocks, kThreads, stream, a);
  const int error = MCV_LAUNCH((qk_norm_rope_backward<S, lanes>), blocks, kThreads, stream, a);
  if (error) return error;
  PartialSums sums = {static_cast<const float*>(a.partials), blocks, 4 * a.width, a.width, {}, a.parameter_dtype};
  for (int i = 0; i < 4; ++i) sums.output[i] = a.parameter_gradients[i];
  return launch_reduce_partials(sums, stream);
}

template <class S>
int launch_by_width(const QkNormRopeArgs& a, bool is_backward, void* stream) {
  if (a.width <= 8 * kChunk) return launch<S, 8>(a, is_backward, stream);
  return launch<S, 16>(a, is_backward, stream);
}

inline int launch_by_dtype(const QkNormRopeArgs& a, int dtype, bool is_backward, void* stream) {
  switch (dtype) {
    case kFloat32: return launch_by_width<float>(a, is_backward, stream);
    case kBFloat16: return launch_by_width<bf16>(a, is_backward, stream);
    default: return launch_by_width<fp16>(a, is_backward, stream);
  }
}

}  // namespace MCV_ISA
}  // namespace mcv

extern "C" int mcv_qk_norm_rope_forward_cuda(const mcv::QkNormRopeArgs* args, int dtype, void* stream) {
  return mcv::MCV_ISA::launch_by_dtype(*args, dtype, false, stream);
}

extern "C" int mcv_qk_norm_rope_backward_cuda(const mcv::QkNormRopeArgs* args, int dtype, void* stream) {
  return mcv::MCV_ISA::launch_by_dtype(*args, dtype, true, stream);
}
