// A call of qk_norm_rope: its tensors, checked, as plain arguments of kernels and C++. For bindings.cpp alone.
#pragma once

#include "../common/tensors.h"
#include "args.h"

namespace mcv {
namespace {

struct QkNormRopeCall {
  QkNormRopeArgs args = {};
  int dtype;
  std::vector<int64_t> out_shape, qkv_shape;

  QkNormRopeCall(
      const Tensor& qkv, const Tensor& q_weight, const Tensor& q_bias, const Tensor& k_weight, const Tensor& k_bias,
      const Tensor& table, const Tensor& grid, int64_t token_offset, double eps, int64_t axis_t, int64_t axis_h,
      double theta, bool rotate)
      : dtype(dtype_of(qkv, "qkv_SN3K")) {
    STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(2) == 3, "qkv_SN3K must be [S, N, 3, K]");
    const int64_t width = qkv.size(3);
    STD_TORCH_CHECK(qkv.stride(3) == 1 && width % 2 == 0 && width <= 2 * kMaxPairs, "qkv_SN3K: K must be contiguous");
    for (const Tensor* vector : {&q_weight, &q_bias, &k_weight, &k_bias}) {
      STD_TORCH_CHECK(
          vector->dim() == 1 && vector->size(0) == width && vector->is_contiguous() &&
              vector->scalar_type() == q_weight.scalar_type(),
          "weights and biases must be [K], contiguous and of one dtype");
    }
    check_together(qkv, {&q_weight, &q_bias, &k_weight, &k_bias, &table, &grid});
    check_contiguous(table, "sample_table_M5");
    check_contiguous(grid, "rope_grid_M6");
    STD_TORCH_CHECK(
        table.scalar_type() == ScalarType::Int && grid.scalar_type() == ScalarType::Float && table.size(0) > 0 &&
            table.numel() == 5 * table.size(0) && grid.numel() == 6 * table.size(0),
        "sample_table_M5 must be int32 [M, 5], rope_grid_M6 fp32 [M, 6], M at least 1");
    out_shape = {qkv.size(0), qkv.size(1), width};
    qkv_shape = {qkv.size(0), qkv.size(1), 3, width};
    args.qkv = qkv.data_ptr();
    args.stride_S = qkv.stride(0), args.stride_N = qkv.stride(1), args.stride_3 = qkv.stride(2);
    args.weight[0] = q_weight.data_ptr(), args.weight[1] = k_weight.data_ptr();
    args.bias[0] = q_bias.data_ptr(), args.bias[1] = k_bias.data_ptr();
    args.parameter_dtype = dtype_of(q_weight, "q_weight_K");
    args.table = static_cast<const int32_t*>(table.data_ptr());
    args.grid = static_cast<const float*>(grid.data_ptr());
    args.samples = int(table.size(0)), args.tokens = qkv.size(0), args.token_offset = token_offset;
    args.heads = int(qkv.size(1)), args.width = int(width), args.eps = eps, args.rotate = rotate;
    if (!rotate) return;
    STD_TORCH_CHECK(
        axis_t >= 0 && axis_h >= 0 && axis_t % 2 == 0 && axis_h % 2 == 0 && axis_t + axis_h <= width,
        "axes must be even numbers that sum to K");
    args.axis_t = int(axis_t), args.axis_h = int(axis_h);
    set_frequencies(theta);
  }

  void set_frequencies(double theta) {
    const int axes[3] = {args.axis_t, args.axis_h, args.width - args.axis_t - args.axis_h};
    int pair = 0;
    for (const int channels : axes) {
      for (int i = 0; i < channels / 2; ++i) {
        args.half_turns[pair++] = std::pow(theta, -2.0 * i / channels) / 3.14159265358979323846;
      }
    }
  }

  void check_for_kernel() const {
    const int64_t unit = 16 / (dtype == kFloat32 ? 4 : 2);
    STD_TORCH_CHECK(
        dtype != kFloat64 && args.tokens > 0 && args.heads > 0 && args.width % 8 == 0 && args.stride_S % unit == 0 &&
            args.stride_N % unit == 0 && args.stride_3 % unit == 0,
        "qkv_SN3K: the kernel needs float32, bfloat16 or float16, S and N at least 1, K in eights and rows at "
        "multiples of 16 bytes");
    check_aligned(args.qkv, "qkv_SN3K");
  }
};

#define QK_NORM_ROPE_ARGUMENTS                                                                                        \
  const Tensor &qkv, const Tensor &q_weight, const Tensor &q_bias, const Tensor &k_weight, const Tensor &k_bias,       \
      const Tensor &table, const Tensor &grid, int64_t token_offset, double eps, int64_t axis_t, int64_t axis_h,       \
      double theta, bool rotate
#define QK_NORM_ROPE_CALL \
  qkv, q_weight, q_bias, k_weight, k_bias, table, grid, token_offset, eps, axis_t, axis_h, theta, rotate

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct QkNormRopeGradients {
  Tensor qkv, partials, parameter[4];
  int64_t rows;

  QkNormRopeGradients(
      QkNormRopeCall& call, const Tensor& grad_q, const Tensor& grad_k, const Tensor& qkv, const Tensor& q_weight)
      : qkv(empty(qkv, call.qkv_shape, qkv.scalar_type())),
        partials(empty(qkv, {(qkv.size(0) + kPartialTokens - 1) / kPartialTokens, 4, qkv.size(3)}, compute_type(qkv))),
        parameter{empty(q_weight, {qkv.size(3)}, q_weight.scalar_type()),
                  empty(q_weight, {qkv.size(3)}, q_weight.scalar_type()),
                  empty(q_weight, {qkv.size(3)}, q_weight.scalar_type()),
                  empty(q_weight, {qkv.size(3)}, q_weight.scalar_type())},
        rows((qkv.size(0) + kPartialTokens - 1) / kPartialTokens) {
    check_together(qkv, {&grad_q, &grad_k});
    for (const Tensor* gradient : {&grad_q, &grad_k}) {
      STD_TORCH_CHECK(
          gradient->is_contiguous() && gradient->numel() == qkv.size(0) * qkv.size(1) * qkv.size(3) &&
              gradient->scalar_type() == qkv.scalar_type(),
          "the gradients of q and k must be contiguous [S, N, K] and of qkv_SN3K's dtype");
    }
    call.args.q = grad_q.data_ptr(), call.args.k = grad_k.data_ptr();
    call.args.qkv_gradient = this->qkv.data_ptr(), call.args.partials = partials.data_ptr();
    for (int i = 0; i < 4; ++i) call.args.parameter_gradients[i] = parameter[i].data_ptr();
  }

  FiveTensors result() const { return {qkv, parameter[0], parameter[1], parameter[2], parameter[3]}; }
};

}  // namespace
}  // namespace mcv
