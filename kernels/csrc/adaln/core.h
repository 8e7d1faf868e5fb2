// The arithmetic of adaln, in pieces of `n` channels; megacogvx_kernels/adaln/reference.py is its definition.
//
//   forward    r = x + gate branch,  x^ = (r - mean) rstd,  y = (x^ w + b) (1 + scale) + shift
//   backward   g = dy (1 + scale) w,  dr += rstd (g - mean(g) - x^ mean(g x^)),  dbranch = gate dr
//              of a table's row, with sums over its tokens  A = sum dy,  B = sum dy x^,  C = sum dr branch:
//              dshift = A,  dscale = w B + b A,  dgate = C;  and over all rows  dw = sum (1 + scale) B,  db alike of A
#pragma once

#include "../common/norm.h"
#include "args.h"

namespace mcv {
namespace MCV_ISA {

template <int n, class C>
MCV_HD void add_gated(C* r, const C* x, const C* branch, const C* gate) {
  Copy<n, C> out(x);
  const Copy<n, C> b(branch), g(gate);
  MCV_UNROLL for (int i = 0; i < n; ++i) out.at[i] += g.at[i] * b.at[i];
  out.store(r);
}

template <int n, class C>
MCV_HD void modulate(
    C* y, const C* x, Statistics<C> s, const C* weight, const C* bias, const C* scale, const C* shift) {
  Copy<n, C> out(x);
  const Copy<n, C> w(weight), b(bias), a(scale), h(shift);
  MCV_UNROLL for (int i = 0; i < n; ++i) {
    out.at[i] = ((out.at[i] - s.mean) * s.rstd * w.at[i] + b.at[i]) * (C(1) + a.at[i]) + h.at[i];
  }
  out.store(y);
}

// x becomes x^, dy becomes g; the row's sums A and B grow, and so do the sums that dx needs.
template <int n, class C>
MCV_HD void modulation_gradients(
    C* x, C* dy, Statistics<C> s, const C* weight, const C* scale, C* sum_dy, C* sum_dyx, C* sum_g, C* sum_gx) {
  Copy<n, C> normal(x), g(dy), all_dy(sum_dy), all_dyx(sum_dyx), all_g(sum_g), all_gx(sum_gx);
  const Copy<n, C> w(weight), a(scale);
  MCV_UNROLL for (int i = 0; i < n; ++i) {
    normal.at[i] = (normal.at[i] - s.mean) * s.rstd;
    all_dy.at[i] += g.at[i];
    all_dyx.at[i] += g.at[i] * normal.at[i];
    g.at[i] *= (C(1) + a.at[i]) * w.at[i];
    all_g.at[i] += g.at[i];
    all_gx.at[i] += g.at[i] * normal.at[i];
  }
  normal.store(x), g.store(dy), all_dy.store(sum_dy), all_dyx.store(sum_dyx);
  all_g.store(sum_g), all_gx.store(sum_gx);
}

// dr into dbranch, and the row's sum C.
template <int n, class C>
MCV_HD void gate_gradients(C* dbranch, const C* dr, const C* branch, const C* gate, C* sum_gate) {
  Copy<n, C> out(dr), all(sum_gate);
  const Copy<n, C> b(branch), g(gate);
  MCV_UNROLL for (int i = 0; i < n; ++i) {
    all.at[i] += out.at[i] * b.at[i];
    out.at[i] *= g.at[i];
  }
  all.store(sum_gate), out.store(dbranch);
}

// One channel of one row: its three sums -> its part of the tables' gradients, and of those of weight and bias.
template <class C>
struct ChannelGradients {
  C weight = C(0), bias = C(0);

  MCV_HD void add_row(const AdalnArgs& a, int64_t row, int channel, C sum_dy, C sum_dyx, C sum_gate) {
    if (a.table_gradient) {
      C w, b, scale;
      load_parameters<1>(&w, a.weight, a.parameter_dtype, channel);
      load_parameters<1>(&b, a.bias, a.parameter_dtype, channel);
      load_parameters<1>(&scale, a.table, a.table_dtype, row * a.table_stride + kScale * int64_t(a.width) + channel);
      const C dscale = w * sum_dyx + b * sum_dy;
      store(a.table_gradient, a.table_dtype, a, row, a.table_columns, channel, kShift, sum_dy, kScale, dscale);
      weight += (C(1) + scale) * sum_dyx;
      bias += (C(1) + scale) * sum_dy;
    }
    if (a.gates_gradient) {
      store(a.gates_gradient, a.gates_dtype, a, row, a.gates_columns, channel, kGate, sum_gate, -1, C(0));
    }
  }

  // Two columns of a row; the others are zero.
  static MCV_HD void store(
      void* to, int dtype, const AdalnArgs& a, int64_t row, int columns, int channel, int first, C x, int second, C y) {
    for (int column = 0; column < columns; ++column) {
      const C value = column == first ? x : (column == second ? y : C(0));
      store_parameter(to, dtype, (row * columns + column) * a.width + channel, value);
    }
  }
};

}  // namespace MCV_ISA
}  // namespace mcv
