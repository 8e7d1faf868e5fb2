// LayerNorm in pieces of `n` channels that one lane owns, forward and backward. C is the type that is computed in.
#pragma once

#include <cmath>
#include <type_traits>

#include "hd.h"

namespace mcv {
namespace MCV_ISA {

// Every function reads its chunk before it writes any of it, through copies of n values: in place or not, the host
// compiler turns each into vector instructions, and a GPU keeps them in registers anyway.
template <int n, class C>
struct Copy {
  C at[n];

  MCV_HD explicit Copy(const C* from) {
    MCV_UNROLL for (int i = 0; i < n; ++i) at[i] = from[i];
  }
  MCV_HD void store(C* to) const {
    MCV_UNROLL for (int i = 0; i < n; ++i) to[i] = at[i];
  }
};

template <int n, class C>
MCV_HD void add(C* sum, const C* x) {
  MCV_UNROLL for (int i = 0; i < n; ++i) sum[i] += x[i];
}

template <int n, class C>
MCV_HD void add_squares(C* sum, const C* x, C mean) {
  MCV_UNROLL for (int i = 0; i < n; ++i) {
    const C deviation = x[i] - mean;
    sum[i] += deviation * deviation;
  }
}

template <class C>
MCV_HD C sum8(const C* x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

MCV_HD float rsqrt_of(float x) { return 1.0f / sqrtf(x); }
MCV_HD double rsqrt_of(double x) { return 1.0 / sqrt(x); }

template <class C>
struct Statistics {
  C mean, rstd;
};

// dx = rstd (g - mean(g) - x^ mean(g x^)), g the gradient of x^.
template <int n, class C>
MCV_HD void input_gradient(C* dx, const C* x, const C* g, C rstd, C mean_g, C mean_gx) {
  Copy<n, C> out(g);
  const Copy<n, C> normal(x);
  MCV_UNROLL for (int i = 0; i < n; ++i) out.at[i] = rstd * (out.at[i] - mean_g - normal.at[i] * mean_gx);
  out.store(dx);
}

#if !defined(__CUDACC__) && !defined(MCV_SIMT)
// On the CPU: calls f<8>(i) for every chunk of 8 channels, then f<tail>(i) for what is left.
template <int tail, class F>
MCV_HD void in_chunks(int width, F&& f) {
  int i = 0;
  for (; i + kChunk <= width; i += kChunk) f(std::integral_constant<int, kChunk>(), i);
  for (; i < width; i += tail) f(std::integral_constant<int, tail>(), i);
}

template <int tail, class C>
MCV_HD Statistics<C> statistics_of(const C* x, int width, C eps) {
  C sum[kChunk] = {}, squares[kChunk] = {};
  in_chunks<tail>(width, [&](auto n, int i) { add<n.value>(sum, x + i); });
  const C mean = sum8(sum) / C(width);
  in_chunks<tail>(width, [&](auto n, int i) { add_squares<n.value>(squares, x + i, mean); });
  return {mean, rsqrt_of(sum8(squares) / C(width) + eps)};
}

template <class S, class C>
MCV_HD void widen_all(C* MCV_RESTRICT to, const S* MCV_RESTRICT from, int width) {
  for (int i = 0; i < width; ++i) to[i] = widen(from[i]);
}
template <class S, class C>
MCV_HD void narrow_all(S* MCV_RESTRICT to, const C* MCV_RESTRICT from, int width) {
  for (int i = 0; i < width; ++i) to[i] = Narrow<S>::of(from[i]);
}
#endif

}  // namespace MCV_ISA
}  // namespace mcv
