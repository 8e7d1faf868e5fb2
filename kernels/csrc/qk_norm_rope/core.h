// The arithmetic of qk_norm_rope, in pieces of `n` channels that one lane owns; megacogvx_kernels/qk_norm_rope/
// reference.py is its definition. C is the type everything is computed in.
//
//   forward    x^ = (x - mean) rstd,  y = x^ w + b,  (y_2i, y_2i+1) turned by the pair's angle
//   backward   g = dy turned back,  dw += g x^,  db += g,  dx = rstd (g w - mean(g w) - x^ mean(g w x^))
#pragma once

#include "../common/norm.h"
#include "args.h"

namespace mcv {
namespace MCV_ISA {

// ----------------------------------------------------------------------------------- place of a token

template <class C>
struct Position {
  C axis[3];      // t, h, w
  bool is_video;  // text and padding are not rotated
};

// Last sample whose first token isn't after `token`.
MCV_HD int sample_of(const int32_t* table, int samples, int64_t token) {
  int low = 0, high = samples;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (table[5 * middle] <= token) low = middle; else high = middle;
  }
  return low;
}

template <class C>
MCV_HD Position<C> position_of(const QkNormRopeArgs& a, int64_t token) {
  Position<C> position = {{C(0), C(0), C(0)}, false};
  if (!a.rotate) return position;
  const int sample = sample_of(a.table, a.samples, token);
  const int32_t* row = a.table + 5 * int64_t(sample);
  const float* grid = a.grid + 6 * int64_t(sample);
  const int64_t place = token - row[0] - row[1];
  if (place < 0 || place >= int64_t(row[2]) * row[3] * row[4]) return position;
  const int cell = int(place), height = row[3], width = row[4];  // starts are int32, so a sample's tokens are too
  const int along[3] = {cell / (height * width), cell / width % height, cell % width};
  MCV_UNROLL for (int axis = 0; axis < 3; ++axis) {
    position.axis[axis] = C(grid[axis]) + C(grid[3 + axis]) * C(along[axis]);
  }
  position.is_video = true;
  return position;
}

MCV_HD int axis_of_pair(const QkNormRopeArgs& a, int pair) {
  return 2 * pair < a.axis_t ? 0 : (2 * pair < a.axis_t + a.axis_h ? 1 : 2);
}

// cos and sin of `half_turns` * pi. Half turns, because sincosf(angle) needs a stack frame for large angles.
MCV_HD void turn(float half_turns, float* cosine, float* sine) {
#if defined(__CUDA_ARCH__)
  sincospif(half_turns, sine, cosine);
#else
  const float rest = half_turns - 2.0f * std::rint(0.5f * half_turns);  // exact
  *cosine = std::cos(rest * 3.14159265358979f), *sine = std::sin(rest * 3.14159265358979f);
#endif
}
MCV_HD void turn(double half_turns, double* cosine, double* sine) {
#if !defined(__CUDA_ARCH__)
  const double rest = half_turns - 2.0 * std::rint(0.5 * half_turns);
  *cosine = std::cos(rest * 3.14159265358979323846), *sine = std::sin(rest * 3.14159265358979323846);
#endif
}

// --------------------------------------------------------------------------------- n channels of a head

template <int n, class C>
MCV_HD void normalise(C* y, const C* x, C mean, C rstd, const C* weight, const C* bias) {
  Copy<n, C> out(x);
  const Copy<n, C> w(weight), b(bias);
  MCV_UNROLL for (int i = 0; i < n; ++i) out.at[i] = (out.at[i] - mean) * rstd * w.at[i] + b.at[i];
  out.store(y);
}

// (a, b) -> (a cos - b sin, b cos + a sin); sign = -1 turns back, which is the transpose.
template <int n, class C>
MCV_HD void rotate(C* y, const C* cosine, const C* sine, C sign) {
  Copy<n, C> out(y);
  MCV_UNROLL for (int i = 0; i < n / 2; ++i) {
    const C a = out.at[2 * i], b = out.at[2 * i + 1], c = cosine[i], s = sign * sine[i];
    out.at[2 * i] = a * c - b * s;
    out.at[2 * i + 1] = b * c + a * s;
  }
  out.store(y);
}

// x becomes x^, g becomes g w; the gradients of weight and bias grow, and so do the sums that dx needs.
template <int n, class C>
MCV_HD void gradient_sums(
    C* x, C* g, C mean, C rstd, const C* weight, C* weight_gradient, C* bias_gradient, C* sum_g, C* sum_gx) {
  Copy<n, C> normal(x), gradient(g), dw(weight_gradient), db(bias_gradient), all_g(sum_g), all_gx(sum_gx);
  const Copy<n, C> w(weight);
  MCV_UNROLL for (int i = 0; i < n; ++i) {
    normal.at[i] = (normal.at[i] - mean) * rstd;
    dw.at[i] += gradient.at[i] * normal.at[i];
    db.at[i] += gradient.at[i];
    gradient.at[i] *= w.at[i];
    all_g.at[i] += gradient.at[i];
    all_gx.at[i] += gradient.at[i] * normal.at[i];
  }
  normal.store(x), gradient.store(g), dw.store(weight_gradient), db.store(bias_gradient);
  all_g.store(sum_g), all_gx.store(sum_gx);
}

}  // namespace MCV_ISA
}  // namespace mcv
