// A call of an op of adaln: its tensors, checked, as plain arguments of kernels and C++. For bindings.cpp alone.
#pragma once

#include "../common/tensors.h"
#include "args.h"

namespace mcv {
namespace {

struct AdalnCall {
  AdalnArgs args = {};
  int dtype;
  Tensor x;                      // [S, D] or [S, 1, D]
  int64_t width;
  std::vector<Tensor> partials;  // empty or one

  AdalnCall(const Tensor& tokens, const Tensor& rows)
      : dtype(dtype_of(tokens, "x_SD")), x(tokens), width(tokens.size(tokens.dim() - 1)) {
    STD_TORCH_CHECK(width > 0 && x.numel() == x.size(0) * width, "x_SD must be [S, D] or [S, 1, D]");
    STD_TORCH_CHECK(
        rows.scalar_type() == ScalarType::Long && rows.is_contiguous() && rows.numel() == x.size(0),
        "rows_S must be int64 [S]");
    check_together(x, {&rows});
    args.x = data(x, "x_SD"), args.rows = static_cast<const int64_t*>(rows.data_ptr());
    args.tokens = x.size(0), args.width = int(width);
  }

  // A tensor of the tokens' shape and dtype.
  void* data(const Tensor& tokens, const char* name) const {
    check_contiguous(tokens, name);
    check_together(x, {&tokens});
    STD_TORCH_CHECK(
        tokens.numel() == x.numel() && tokens.scalar_type() == x.scalar_type(), name, " must be like the tokens");
    return tokens.data_ptr();
  }

  void set_table(const Tensor& table, int64_t columns, const void** to, int64_t* stride, int* table_dtype) {
    check_contiguous(table, "a modulation table");
    check_together(x, {&table});
    STD_TORCH_CHECK(
        table.dim() == 3 && table.size(1) >= columns && table.size(2) == width,
        "a modulation table must be [R, 3, D]");
    STD_TORCH_CHECK(args.num_rows == 0 || args.num_rows == table.size(0), "both tables must have the same rows");
    *to = table.data_ptr(), *stride = table.size(1) * table.size(2), args.num_rows = table.size(0);
    *table_dtype = dtype_of(table, "a modulation table");
  }

  void set_branch(const Tensor& branch, const Tensor& gates) {
    args.branch = data(branch, "branch_SD");
    set_table(gates, 3, &args.gates, &args.gates_stride, &args.gates_dtype);
    args.gates_columns = int(gates.size(1));
  }

  void set_modulation(const Tensor& weight, const Tensor& bias, const Tensor& table, double eps) {
    check_together(x, {&weight, &bias});
    for (const Tensor* vector : {&weight, &bias}) {
      STD_TORCH_CHECK(
          vector->is_contiguous() && vector->numel() == width && vector->scalar_type() == weight.scalar_type(),
          "weight_D and bias_D must be [D], contiguous and of one dtype");
    }
    args.weight = weight.data_ptr(), args.bias = bias.data_ptr(), args.eps = eps;
    args.parameter_dtype = dtype_of(weight, "weight_D");
    set_table(table, 2, &args.table, &args.table_stride, &args.table_dtype);
    args.table_columns = int(table.size(1));
  }

  void set_runs(const Tensor& runs, const Tensor& run_starts) {
    check_together(x, {&runs, &run_starts});
    STD_TORCH_CHECK(
        runs.scalar_type() == ScalarType::Long && runs.is_contiguous() && runs.dim() == 2 && runs.size(1) == 3 &&
            run_starts.scalar_type() == ScalarType::Long && run_starts.is_contiguous() &&
            run_starts.numel() == args.num_rows + 1,
        "runs must be int64 [G, 3] and run_starts int64 [R + 1]");
    args.runs = static_cast<const int64_t*>(runs.data_ptr());
    args.run_starts = static_cast<const int64_t*>(run_starts.data_ptr());
    args.num_runs = runs.size(0);
    partials.push_back(empty(x, {runs.size(0), 3, width}, compute_type(x)));
    args.partials = partials[0].data_ptr();
  }

  Tensor like_tokens() const { return like(x); }
  static Tensor like(const Tensor& other) {
    return empty(other, {other.sizes().begin(), other.sizes().end()}, other.scalar_type());
  }

  void forward() const {
#if defined(MCV_SIMT)
    forward_kernel();
#else
    if (!x.is_cpu()) return forward_kernel();
    torch::stable::parallel_for(0, args.tokens, 1 + 32768 / args.width, [&](int64_t begin, int64_t end) {
      MCV_BY_ISA(adaln_forward_cpu)(args, dtype, begin, end);
    });
#endif
  }

  void backward() const {
#if defined(MCV_SIMT)
    backward_kernel();
#else
    if (!x.is_cpu()) return backward_kernel();
    torch::stable::parallel_for(0, args.num_runs, 1 + 1024 / args.width, [&](int64_t begin, int64_t end) {
      MCV_BY_ISA(adaln_backward_cpu)(args, dtype, begin, end);
    });
    torch::stable::parallel_for(0, args.width, 128, [&](int64_t begin, int64_t end) {
      MCV_BY_ISA(adaln_gradients_cpu)(args, dtype, begin, end);
    });
#endif
  }

  void check_for_kernel() const {
    STD_TORCH_CHECK(
        dtype != kFloat64 && args.parameter_dtype != kFloat64 && args.table_dtype != kFloat64 &&
            args.gates_dtype != kFloat64 && args.width % 8 == 0 && args.width <= 4096,
        "x_SD: the kernel needs float32, bfloat16 or float16, and D in eights up to 4096");
    const void* all[] = {args.x, args.branch, args.gates, args.table, args.weight, args.bias,
                         args.residual_gradient, args.modulated_gradient};
    for (const void* pointer : all) check_aligned(pointer, "x_SD, branch_SD, a table, a parameter or a gradient");
  }

  void forward_kernel() const {
#if defined(MCV_KERNELS)
    check_for_kernel();
    const OnDevice device(x);
    check_launch(mcv_adaln_forward_cuda(&args, dtype, device.stream), "adaln");
#endif
  }

  void backward_kernel() const {
#if defined(MCV_KERNELS)
    check_for_kernel();
    const OnDevice device(x);
    check_launch(mcv_adaln_backward_cuda(&args, dtype, device.stream), "adaln backward");
#endif
  }
};

}  // namespace
}  // namespace mcv
