// adaln on the CPU: one token at a time, with core.h's arithmetic in chunks of 8 channels and a tail of single ones.
#include <algorithm>
#include <vector>

#include "core.h"

namespace mcv {
namespace MCV_ISA {
namespace {

// Vectors of one token and of one row of the tables, in the type that is computed in.
template <class C>
struct Buffers {
  const AdalnArgs& a;
  std::vector<C> memory;
  C *x, *branch, *y, *dr, *weight, *bias, *scale, *shift, *gate;
  int64_t row = -1;

  explicit Buffers(const AdalnArgs& args) : a(args), memory(9 * size_t(padded(args.width))) {
    C** const all[] = {&x, &branch, &y, &dr, &weight, &bias, &scale, &shift, &gate};
    C* next = memory.data();
    for (C** vector : all) *vector = next, next += padded(a.width);
    if (a.table) load(weight, a.weight, a.parameter_dtype, 0), load(bias, a.bias, a.parameter_dtype, 0);
  }
  static int padded(int width) { return (width + kChunk - 1) / kChunk * kChunk; }

  void load(C* to, const void* from, int dtype, int64_t first) {
    switch (dtype) {
      case kFloat32: return widen_all(to, static_cast<const float*>(from) + first, a.width);
      case kBFloat16: return widen_all(to, static_cast<const bf16*>(from) + first, a.width);
      case kFloat16: return widen_all(to, static_cast<const fp16*>(from) + first, a.width);
      default: for (int i = 0; i < a.width; ++i) to[i] = C(static_cast<const double*>(from)[first + i]);
    }
  }
  void move_to_row(int64_t wanted) {
    if (wanted == row) return;
    row = wanted;
    if (a.table) load(shift, a.table, a.table_dtype, row * a.table_stride + kShift * int64_t(a.width));
    if (a.table) load(scale, a.table, a.table_dtype, row * a.table_stride + kScale * int64_t(a.width));
    if (a.gates) load(gate, a.gates, a.gates_dtype, row * a.gates_stride + kGate * int64_t(a.width));
  }
};

template <class S, class C>
void forward(const AdalnArgs& a, int64_t begin, int64_t end) {
  Buffers<C> v(a);
  for (int64_t token = begin; token < end; ++token) {
    const int64_t at = token * a.width;
    v.move_to_row(a.rows[token]);
    widen_all(v.x, static_cast<const S*>(a.x) + at, a.width);
    if (a.branch) {
      S* const out = static_cast<S*>(a.residual) + at;
      widen_all(v.branch, static_cast<const S*>(a.branch) + at, a.width);
      in_chunks<1>(a.width, [&](auto n, int i) { add_gated<n.value>(v.x + i, v.x + i, v.branch + i, v.gate + i); });
      narrow_all(out, v.x, a.width);
      widen_all(v.x, out, a.width);  // what follows sees the residual as it is stored
    }
    if (!a.modulated) continue;
    const Statistics<C> s = statistics_of<1>(v.x, a.width, C(a.eps));
    in_chunks<1>(a.width, [&](auto n, int i) {
      modulate<n.value>(v.y + i, v.x + i, s, v.weight + i, v.bias + i, v.scale + i, v.shift + i);
    });
    narrow_all(static_cast<S*>(a.modulated) + at, v.y, a.width);
  }
}

// Which of the three sums are wanted.
int first_sum(const AdalnArgs& a) { return a.table_gradient ? 0 : 2; }
int end_sum(const AdalnArgs& a) { return a.gates_gradient ? 3 : 2; }

template <class S, class C>
void backward_of_token(const AdalnArgs& a, Buffers<C>& v, int64_t at, C* sum_dy, C* sum_dyx, C* sum_gate) {
  if (a.residual_gradient) widen_all(v.dr, static_cast<const S*>(a.residual_gradient) + at, a.width);
  if (a.modulated_gradient) {
    widen_all(v.x, static_cast<const S*>(a.x) + at, a.width);
    widen_all(v.y, static_cast<const S*>(a.modulated_gradient) + at, a.width);
    const Statistics<C> s = statistics_of<1>(v.x, a.width, C(a.eps));
    C sum_g[kChunk] = {}, sum_gx[kChunk] = {};
    in_chunks<1>(a.width, [&](auto n, int i) {
      modulation_gradients<n.value>(
          v.x + i, v.y + i, s, v.weight + i, v.scale + i, sum_dy + i, sum_dyx + i, sum_g, sum_gx);
    });
    const C mean_g = sum8(sum_g) / C(a.width), mean_gx = sum8(sum_gx) / C(a.width);
    in_chunks<1>(a.width, [&](auto n, int i) {
      input_gradient<n.value>(v.y + i, v.x + i, v.y + i, s.rstd, mean_g, mean_gx);
      if (a.residual_gradient) add<n.value>(v.y + i, v.dr + i);
    });
    std::swap(v.y, v.dr);
    narrow_all(static_cast<S*>(a.x_gradient) + at, v.dr, a.width);
  }
  if (!a.branch_gradient) return;
  widen_all(v.branch, static_cast<const S*>(a.branch) + at, a.width);
  in_chunks<1>(a.width, [&](auto n, int i) {
    gate_gradients<n.value>(v.y + i, v.dr + i, v.branch + i, v.gate + i, sum_gate + i);
  });
  narrow_all(static_cast<S*>(a.branch_gradient) + at, v.y, a.width);
}

template <class S, class C>
void backward(const AdalnArgs& a, int64_t begin, int64_t end) {
  Buffers<C> v(a);
  for (int64_t run = begin; run < end; ++run) {
    C* const sums = static_cast<C*>(a.partials) + run * 3 * a.width;
    std::fill_n(sums + first_sum(a) * a.width, (end_sum(a) - first_sum(a)) * a.width, C(0));
    v.move_to_row(a.runs[3 * run + 2]);
    for (int64_t token = a.runs[3 * run]; token < a.runs[3 * run + 1]; ++token) {
      backward_of_token<S>(a, v, token * a.width, sums, sums + a.width, sums + 2 * a.width);
    }
  }
}

// The runs' sums, added in their order: the same bits on any number of threads.
template <class C>
void gradients(const AdalnArgs& a, int64_t begin, int64_t end) {
  const int64_t channels = end - begin;
  const C* partials = static_cast<const C*>(a.partials) + begin;
  std::vector<double> sums(3 * channels);
  std::vector<ChannelGradients<double>> total(channels);
  for (int64_t row = 0; row < a.num_rows; ++row) {
    std::fill(sums.begin(), sums.end(), 0.0);
    for (int64_t run = a.run_starts[row]; run < a.run_starts[row + 1]; ++run) {
      for (int which = first_sum(a); which < end_sum(a); ++which) {
        const C* MCV_RESTRICT from = partials + (run * 3 + which) * a.width;
        double* MCV_RESTRICT to = sums.data() + which * channels;
        for (int64_t i = 0; i < channels; ++i) to[i] += double(from[i]);
      }
    }
    for (int64_t i = 0; i < channels; ++i) {
      total[i].add_row(a, row, int(begin + i), sums[i], sums[channels + i], sums[2 * channels + i]);
    }
  }
  if (!a.table_gradient) return;
  for (int64_t i = 0; i < channels; ++i) {
    store_parameter(a.weight_gradient, a.parameter_dtype, begin + i, total[i].weight);
    store_parameter(a.bias_gradient, a.parameter_dtype, begin + i, total[i].bias);
  }
}

}  // namespace

void adaln_forward_cpu(const AdalnArgs& a, int dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32: return forward<float, float>(a, begin, end);
    case kBFloat16: return forward<bf16, float>(a, begin, end);
    case kFloat16: return forward<fp16, float>(a, begin, end);
    default: return forward<double, double>(a, begin, end);
  }
}

void adaln_backward_cpu(const AdalnArgs& a, int dtype, int64_t begin, int64_t end) {
  switch (dtype) {
    case kFloat32: return backward<float, float>(a, begin, end);
    case kBFloat16: return backward<bf16, float>(a, begin, end);
    case kFloat16: return backward<fp16, float>(a, begin, end);
    default: return backward<double, double>(a, begin, end);
  }
}

void adaln_gradients_cpu(const AdalnArgs& a, int dtype, int64_t begin, int64_t end) {
  dtype == kFloat64 ? gradients<double>(a, begin, end) : gradients<float>(a, begin, end);
}

}  // namespace MCV_ISA
}  // namespace mcv
