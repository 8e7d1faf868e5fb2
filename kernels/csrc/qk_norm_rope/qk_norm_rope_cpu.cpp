// qk_norm_rope on the CPU: one head at a time, with core.h's arithmetic in chunks of 8 channels and a tail of pairs.
#include <algorithm>
#include <type_traits>

#include "core.h"

namespace mcv {
namespace MCV_ISA {
namespace {

constexpr int kMaxWidth = 2 * kMaxPairs;

// cos and sin of the token at hand; an axis whose position stays is not computed again.
template <class C>
struct Turns {
  const QkNormRopeArgs& a;
  C cosine[kMaxPairs], sine[kMaxPairs];
  C known[3];
  bool is_video = false, is_fresh = true;

  explicit Turns(const QkNormRopeArgs& args) : a(args) {}

  void move_to(int64_t token) {
    const Position<C> position = position_of<C>(a, token);
    is_video = position.is_video;
    if (!is_video) return;
    for (int pair = 0; pair < a.width / 2; ++pair) {
      const int axis = axis_of_pair(a, pair);
      if (is_fresh || position.axis[axis] != known[axis]) {
        turn(position.axis[axis] * C(a.half_turns[pair]), &cosine[pair], &sine[pair]);
      }
    }
    std::copy(position.axis, position.axis + 3, known);
    is_fresh = false;
  }
};

template <class C>
struct Parameters {
  alignas(64) C weight[2][kMaxWidth], bias[2][kMaxWidth];

  explicit Parameters(const QkNormRopeArgs& a) {
    for (int part = 0; part < 2; ++part) {
      for (int i = 0; i < a.width; ++i) {
        load_parameters<1>(&weight[part][i], a.weight[part], a.parameter_dtype, i);
        load_parameters<1>(&bias[part][i], a.bias[part], a.parameter_dtype, i);
      }
    }
  }
};

template <class S, class C>
void forward(const QkNormRopeArgs& a, int64_t begin, int64_t end) {
  const Parameters<C> parameters(a);
  Turns<C> turns(a);
  alignas(64) C x[kMaxWidth], y[kMaxWidth];
  S* out[2] = {static_cast<S*>(a.q), static_cast<S*>(a.k)};
  for (int64_t token = begin; token < end; ++token) {
    turns.move_to(a.token_offset + token);
    for (int head = 0; head < a.heads; ++head) {
      const S* from = static_cast<const S*>(a.qkv) + token * a.stride_S + head * a.stride_N;
      for (int part = 0; part < 2; ++part) {
        widen_all(x, from + part * a.stride_3, a.width);
        const Statistics<C> s = statistics_of<2>(x, a.width, C(a.eps));
        const C *weight = parameters.weight[part], *bias = parameters.bias[part];
        in_chunks<2>(a.width, [&](auto n, int i) {
          normalise<n.value>(y + i, x + i, s.mean, s.rstd, weight + i, bias + i);
          if (turns.is_video) rotate<n.value>(y + i, turns.cosine + i / 2, turns.sine + i / 2, C(1));
        });
        narrow_all(out[part] + (token * a.heads + head) * a.width, y, a.width);
      }
    }
  }
}

// Sums of one token in C, of all tokens of a partial in double: few roundings, the same on any number of threads.
template <class C>
struct ParameterGradients {
  alignas(64) C token[4][kMaxWidth];
  alignas(64) double total[4][kMaxWidth];

  void begin_partial() { std::fill_n(&total[0][0], 4 * kMaxWidth, 0.0); }
  void begin_token() { std::fill_n(&token[0][0], 4 * kMaxWidth, C(0)); }
  void end_token(int width) {
    for (int which = 0; which < 4; ++which) {
      for (int i = 0; i < width; ++i) total[which][i] += double(token[which][i]);
    }
  }
  void end_partial(C* to, int width) const {
    for (int which = 0; which < 4; ++which) {
      for (int i = 0; i < width; ++i) to[which * width + i] = C(total[which][i]);
    }
  }
};

template <class S, class C>
void backward(const QkNormRopeArgs& a, int64_t begin, int64_t end) {
  const Parameters<C> parameters(a);
  Turns<C> turns(a);
  ParameterGradients<C> gradients;
  alignas(64) C x[kMaxWidth], g[kMaxWidth];
  const S* from_next[2] = {static_cast<const S*>(a.q), static_cast<const S*>(a.k)};
  for (int64_t partial = begin; partial < end; ++partial) {
    gradients.begin_partial();
    const int64_t last = std::min<int64_t>((partial + 1) * kPartialTokens, a.tokens);
    for (int64_t token = partial * kPartialTokens; token < last; ++token) {
      turns.move_to(a.token_offset + token);
      gradients.begin_token();
      for (int head = 0; head < a.heads; ++head) {
        const S* from = static_cast<const S*>(a.qkv) + token * a.stride_S + head * a.stride_N;
        S* to = static_cast<S*>(a.qkv_gradient) + (token * a.heads + head) * 3 * a.width;
        for (int part = 0; part < 2; ++part) {
          widen_all(x, from + part * a.stride_3, a.width);
          widen_all(g, from_next[part] + (token * a.heads + head) * a.width, a.width);
          const Statistics<C> s = statistics_of<2>(x, a.width, C(a.eps));
          C sum_g[kChunk] = {}, sum_gx[kChunk] = {};
          C *weight_gradient = gradients.token[2 * part], *bias_gradient = gradients.token[2 * part + 1];
          in_chunks<2>(a.width, [&](auto n, int i) {
            if (turns.is_video) rotate<n.value>(g + i, turns.cosine + i / 2, turns.sine + i / 2, C(-1));
            gradient_sums<n.value>(
                x + i, g + i, s.mean, s.rstd, parameters.weight[part] + i, weight_gradient + i, bias_gradient + i,
                sum_g, sum_gx);
          });
          const C mean_g = sum8(sum_g) / C(a.width), mean_gx = sum8(sum_gx) / C(a.width);
          in_chunks<2>(a.width, [&](auto n, int i) {
            input_gradient<n.value>(g + i, x + i, g + i, s.rstd, mean_g, mean_gx);
          });
          narrow_all(to + part * a.width, g, a.width);
        }
        std::fill_n(reinterpret_cast<char*>(to + 2 * a.width), a.width * sizeof(S), char(0));
      }
      gradients.end_token(a.width);
    }
    gradients.end_partial(static_cast<C*>(a.partials) + partial * 4 * a.width, a.width);
  }
}

}  // namespace

void qk_norm_rope_forward_cpu(const QkNormRopeArgs& a, int dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32: return forward<float, float>(a, begin, end);
    case kBFloat16: return forward<bf16, float>(a, begin, end);
    case kFloat16: return forward<fp16, float>(a, begin, end);
    default: return forward<double, double>(a, begin, end);
  }
}

void qk_norm_rope_backward_cpu(const QkNormRopeArgs& a, int dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32: return backward<float, float>(a, begin, end);
    case kBFloat16: return backward<bf16, float>(a, begin, end);
    case kFloat16: return backward<fp16, float>(a, begin, end);
    default: return backward<double, double>(a, begin, end);
  }
}

}  // namespace MCV_ISA
}  // namespace mcv
