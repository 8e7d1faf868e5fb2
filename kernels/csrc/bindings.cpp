// The compiled ops, registered under `megacogvx::` through torch's stable ABI: the only file that includes torch.
// Arguments are checked in Python, for every backend alike; what is checked here keeps a direct call of torch.ops from
// reading outside its tensors. The fake implementations and the gradients are registered in Python too.
#include "adaln/args.h"
#include "causal_halo/args.h"
#include "common/tensors.h"
#include "group_norm_moments/args.h"
#include "qk_norm_rope/args.h"

using namespace mcv;

// Three libraries come from this file: CPU ops; CPU and CUDA ops; and, for tests, the CUDA kernels run by the SIMT shim
// under a name of their own.
#if defined(MCV_SIMT)
#define MCV_OPS megacogvx_simt
#define MCV_DEVICE CPU
#else
#define MCV_OPS megacogvx
#define MCV_DEVICE CUDA
#endif
#if defined(MCV_SIMT) || defined(MCV_CUDA)
#define MCV_KERNELS
#endif

// -------------------------------------------------------------------------------------------- qk_norm_rope

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
        dtype != kFloat64 && args.width % 8 == 0 && args.stride_S % unit == 0 && args.stride_N % unit == 0 &&
            args.stride_3 % unit == 0,
        "qkv_SN3K: the kernel needs float32, bfloat16 or float16, K in eights and rows at multiples of 16 bytes");
    check_aligned(args.qkv, "qkv_SN3K");
  }
};

#define QK_NORM_ROPE_ARGUMENTS                                                                                        \
  const Tensor &qkv, const Tensor &q_weight, const Tensor &q_bias, const Tensor &k_weight, const Tensor &k_bias,       \
      const Tensor &table, const Tensor &grid, int64_t token_offset, double eps, int64_t axis_t, int64_t axis_h,       \
      double theta, bool rotate
#define QK_NORM_ROPE_CALL \
  qkv, q_weight, q_bias, k_weight, k_bias, table, grid, token_offset, eps, axis_t, axis_h, theta, rotate

#if !defined(MCV_SIMT)
std::tuple<Tensor, Tensor> qk_norm_rope_cpu(QK_NORM_ROPE_ARGUMENTS) {
  QkNormRopeCall call(QK_NORM_ROPE_CALL);
  Tensor q = empty(qkv, call.out_shape, qkv.scalar_type()), k = empty(qkv, call.out_shape, qkv.scalar_type());
  call.args.q = q.data_ptr(), call.args.k = k.data_ptr();
  const int64_t grain = 1 + 16384 / (1 + int64_t(call.args.heads) * call.args.width);
  torch::stable::parallel_for(0, call.args.tokens, grain, [&](int64_t begin, int64_t end) {
    MCV_BY_ISA(qk_norm_rope_forward_cpu)(call.args, call.dtype, begin, end);
  });
  return {q, k};
}
#endif

using FiveTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

struct QkNormRopeGradients {
  Tensor qkv, partials, parameter[4];
  int64_t rows;

  QkNormRopeGradients(QkNormRopeCall& call, const Tensor& grad_q, const Tensor& grad_k, QK_NORM_ROPE_ARGUMENTS)
      : qkv(empty(qkv, call.qkv_shape, qkv.scalar_type())),
        partials(empty(qkv, {(qkv.size(0) + kPartialTokens - 1) / kPartialTokens, 4, qkv.size(3)}, compute_type(qkv))),
        parameter{empty(q_weight, {qkv.size(3)}, q_weight.scalar_type()),
                  empty(q_weight, {qkv.size(3)}, q_weight.scalar_type()),
                  empty(q_weight, {qkv.size(3)}, q_weight.scalar_type()),
                  empty(q_weight, {qkv.size(3)}, q_weight.scalar_type())},
        rows((qkv.size(0) + kPartialTokens - 1) / kPartialTokens) {
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

#if !defined(MCV_SIMT)
FiveTensors qk_norm_rope_backward_cpu(const Tensor& grad_q, const Tensor& grad_k, QK_NORM_ROPE_ARGUMENTS) {
  QkNormRopeCall call(QK_NORM_ROPE_CALL);
  QkNormRopeGradients out(call, grad_q, grad_k, QK_NORM_ROPE_CALL);
  const int64_t grain = 1 + 512 / (1 + int64_t(call.args.heads) * call.args.width);
  torch::stable::parallel_for(0, out.rows, grain, [&](int64_t begin, int64_t end) {
    MCV_BY_ISA(qk_norm_rope_backward_cpu)(call.args, call.dtype, begin, end);
  });
  const auto reduce = [&](auto kind) {
    using C = decltype(kind);
    reduce_rows(
        static_cast<const C*>(call.args.partials), out.rows, 4 * call.args.width, call.args.width,
        call.args.parameter_gradients, call.args.parameter_dtype);
  };
  call.dtype == kFloat64 ? reduce(double()) : reduce(float());
  return out.result();
}
#endif

#if defined(MCV_KERNELS)
std::tuple<Tensor, Tensor> qk_norm_rope_kernel(QK_NORM_ROPE_ARGUMENTS) {
  QkNormRopeCall call(QK_NORM_ROPE_CALL);
  call.check_for_kernel();
  const OnDevice device(qkv);
  Tensor q = empty(qkv, call.out_shape, qkv.scalar_type()), k = empty(qkv, call.out_shape, qkv.scalar_type());
  call.args.q = q.data_ptr(), call.args.k = k.data_ptr();
  check_launch(mcv_qk_norm_rope_forward_cuda(&call.args, call.dtype, device.stream), "qk_norm_rope");
  return {q, k};
}

FiveTensors qk_norm_rope_backward_kernel(const Tensor& grad_q, const Tensor& grad_k, QK_NORM_ROPE_ARGUMENTS) {
  QkNormRopeCall call(QK_NORM_ROPE_CALL);
  call.check_for_kernel();
  const OnDevice device(qkv);
  QkNormRopeGradients out(call, grad_q, grad_k, QK_NORM_ROPE_CALL);
  check_aligned(call.args.q, "the gradient of q"), check_aligned(call.args.k, "the gradient of k");
  check_launch(mcv_qk_norm_rope_backward_cuda(&call.args, call.dtype, device.stream), "qk_norm_rope_backward");
  return out.result();
}
#endif

}  // namespace

// --------------------------------------------------------------------------------------------------- adaln

namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

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
    args.x = data(x, "x_SD"), args.rows = static_cast<const int64_t*>(rows.data_ptr());
    args.tokens = x.size(0), args.width = int(width);
  }

  // A tensor of the tokens' shape and dtype.
  void* data(const Tensor& tokens, const char* name) const {
    check_contiguous(tokens, name);
    STD_TORCH_CHECK(
        tokens.numel() == x.numel() && tokens.scalar_type() == x.scalar_type(), name, " must be like the tokens");
    return tokens.data_ptr();
  }

  void set_table(const Tensor& table, int64_t columns, const void** to, int64_t* stride, int* table_dtype) {
    check_contiguous(table, "a modulation table");
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

Tensor adaln_modulate(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& table, const Tensor& rows,
    const Tensor& runs, const Tensor& run_starts, double eps) {
  AdalnCall call(x, rows);
  call.set_modulation(weight, bias, table, eps);
  Tensor modulated = call.like_tokens();
  call.args.modulated = modulated.data_ptr();
  call.forward();
  return modulated;
}

FourTensors adaln_modulate_backward(
    const Tensor& gradient, const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& table,
    const Tensor& rows, const Tensor& runs, const Tensor& run_starts, double eps) {
  AdalnCall call(x, rows);
  call.set_modulation(weight, bias, table, eps);
  call.set_runs(runs, run_starts);
  Tensor dx = call.like_tokens(), dweight = call.like(weight), dbias = call.like(bias), dtable = call.like(table);
  call.args.modulated_gradient = call.data(gradient, "the gradient");
  call.args.x_gradient = dx.data_ptr(), call.args.table_gradient = dtable.data_ptr();
  call.args.weight_gradient = dweight.data_ptr(), call.args.bias_gradient = dbias.data_ptr();
  call.backward();
  return {dx, dweight, dbias, dtable};
}

Tensor gated_residual(
    const Tensor& x, const Tensor& branch, const Tensor& gates, const Tensor& rows, const Tensor& runs,
    const Tensor& run_starts) {
  AdalnCall call(x, rows);
  call.set_branch(branch, gates);
  Tensor residual = call.like_tokens();
  call.args.residual = residual.data_ptr();
  call.forward();
  return residual;
}

TwoTensors gated_residual_backward(
    const Tensor& gradient, const Tensor& branch, const Tensor& gates, const Tensor& rows, const Tensor& runs,
    const Tensor& run_starts) {
  AdalnCall call(gradient, rows);
  call.set_branch(branch, gates);
  call.set_runs(runs, run_starts);
  Tensor dbranch = call.like_tokens(), dgates = call.like(gates);
  call.args.residual_gradient = call.args.x;
  call.args.branch_gradient = dbranch.data_ptr(), call.args.gates_gradient = dgates.data_ptr();
  call.backward();
  return {dbranch, dgates};
}

TwoTensors gated_residual_adaln(
    const Tensor& x, const Tensor& branch, const Tensor& gates, const Tensor& weight, const Tensor& bias,
    const Tensor& table, const Tensor& rows, const Tensor& runs, const Tensor& run_starts, double eps) {
  AdalnCall call(x, rows);
  call.set_branch(branch, gates);
  call.set_modulation(weight, bias, table, eps);
  Tensor residual = call.like_tokens(), modulated = call.like_tokens();
  call.args.residual = residual.data_ptr(), call.args.modulated = modulated.data_ptr();
  call.forward();
  return {residual, modulated};
}

SixTensors gated_residual_adaln_backward(
    const Tensor& residual_gradient, const Tensor& modulated_gradient, const Tensor& residual, const Tensor& branch,
    const Tensor& gates, const Tensor& weight, const Tensor& bias, const Tensor& table, const Tensor& rows,
    const Tensor& runs, const Tensor& run_starts, double eps) {
  AdalnCall call(residual, rows);
  call.set_branch(branch, gates);
  call.set_modulation(weight, bias, table, eps);
  call.set_runs(runs, run_starts);
  Tensor dx = call.like_tokens(), dbranch = call.like_tokens(), dgates = call.like(gates);
  Tensor dweight = call.like(weight), dbias = call.like(bias), dtable = call.like(table);
  call.args.residual_gradient = call.data(residual_gradient, "the residual's gradient");
  call.args.modulated_gradient = call.data(modulated_gradient, "the modulated tokens' gradient");
  call.args.x_gradient = dx.data_ptr(), call.args.branch_gradient = dbranch.data_ptr();
  call.args.gates_gradient = dgates.data_ptr(), call.args.table_gradient = dtable.data_ptr();
  call.args.weight_gradient = dweight.data_ptr(), call.args.bias_gradient = dbias.data_ptr();
  call.backward();
  return {dx, dbranch, dgates, dweight, dbias, dtable};
}

}  // namespace

// -------------------------------------------------------------------------------------- group_norm_moments

#if defined(MCV_KERNELS)
namespace {

// Sums [B, chunks, C, 2] of kinds 0 and 1; the values themselves of kinds 2 and 3. `gradient` is x where none is read.
Tensor group_norm(
    const Tensor& x, const Tensor& gradient, const Tensor& coefficients, int64_t kind, bool is_channels_last,
    bool has_silu) {
  STD_TORCH_CHECK(x.dim() == 3 && x.numel() > 0, "x must be [B, C, P] or, channels-last, [B, P, C]");
  check_contiguous(x, "x"), check_contiguous(gradient, "gradient"), check_contiguous(coefficients, "coefficients");
  GroupNormArgs args = {};
  args.batch = x.size(0), args.channels = x.size(is_channels_last ? 2 : 1);
  args.positions = x.size(is_channels_last ? 1 : 2);
  args.is_channels_last = is_channels_last, args.has_silu = has_silu;
  const int64_t in_chunk = is_channels_last ? kChunkPositionsLast : kChunkPositions;
  args.chunks = (args.positions + in_chunk - 1) / in_chunk;
  const int dtype = dtype_of(x, "x");
  STD_TORCH_CHECK(
      dtype != kFloat64 && gradient.numel() == x.numel() && gradient.scalar_type() == x.scalar_type() &&
          coefficients.scalar_type() == ScalarType::Float &&
          coefficients.numel() == args.batch * args.channels * kCoefficients &&
          (is_channels_last ? args.channels % 8 == 0 && args.channels <= 2048 : args.positions % 8 == 0),
      "group_norm: what is contiguous comes in eights, coefficients are fp32 [B, C, 6]");
  args.x = x.data_ptr(), args.gradient = gradient.data_ptr();
  args.coefficients = static_cast<const float*>(coefficients.data_ptr());
  check_aligned(args.x, "x"), check_aligned(args.gradient, "gradient");
  const OnDevice device(x);
  Tensor out = kind == kMoments || kind == kGradientSums
                   ? empty(x, {args.batch, args.chunks, args.channels, 2}, ScalarType::Float)
                   : empty(x, {x.sizes().begin(), x.sizes().end()}, x.scalar_type());
  args.out = out.data_ptr();
  check_launch(mcv_group_norm_cuda(&args, int(kind), dtype, device.stream), "group_norm");
  return out;
}

// ---------------------------------------------------------------------------------------------- causal_halo

FramesArgs frames_args(const Tensor& clip, int64_t first, int64_t count) {
  STD_TORCH_CHECK(clip.dim() == 5 && clip.numel() > 0, "x_BCTHW must be [B, C, T, H, W]");
  check_contiguous(clip, "x_BCTHW");
  STD_TORCH_CHECK(first >= 0 && count > 0 && first + count <= clip.size(2), "the frames must be some of the clip's");
  const int64_t frame = clip.size(3) * clip.size(4), size = dtype_of(clip, "x_BCTHW") == kFloat32 ? 4 : 2;
  STD_TORCH_CHECK(dtype_of(clip, "x_BCTHW") != kFloat64, "the kernel takes float32, bfloat16 and float16");
  FramesArgs args = {};
  args.clip = static_cast<char*>(clip.data_ptr()) + first * frame * size;
  args.rows = clip.size(0) * clip.size(1), args.length = count * frame, args.stride = clip.size(2) * frame;
  args.is_wide = frame % 8 == 0 && reinterpret_cast<uintptr_t>(args.clip) % 16 == 0;
  return args;
}

Tensor halo_pack(const Tensor& clip, int64_t first, int64_t count) {
  FramesArgs args = frames_args(clip, first, count);
  const OnDevice device(clip);
  Tensor message =
      empty(clip, {clip.size(0), clip.size(1), count, clip.size(3), clip.size(4)}, clip.scalar_type());
  args.message = message.data_ptr();
  check_launch(mcv_halo_frames_cuda(&args, dtype_of(clip, "x_BCTHW"), device.stream), "halo_pack");
  return message;
}

void halo_unpack_add(Tensor clip, const Tensor& message, int64_t first) {
  check_contiguous(message, "the message");
  STD_TORCH_CHECK(
      message.dim() == 5 && message.scalar_type() == clip.scalar_type() &&
          message.numel() == clip.size(0) * clip.size(1) * message.size(2) * clip.size(3) * clip.size(4),
      "the message must be frames of the clip");
  FramesArgs args = frames_args(clip, first, message.size(2));
  const OnDevice device(clip);
  args.message = message.data_ptr(), args.is_unpack = 1;
  args.is_wide = args.is_wide && reinterpret_cast<uintptr_t>(args.message) % 16 == 0;
  check_launch(mcv_halo_frames_cuda(&args, dtype_of(clip, "x_BCTHW"), device.stream), "halo_unpack_add");
}

}  // namespace
#endif

// ---------------------------------------------------------------------------------------------- registration

#define ADALN_GATE "Tensor branch, Tensor gates, "
#define ADALN_MODULATION "Tensor weight, Tensor bias, Tensor table, "
#define ADALN_ROWS "Tensor rows, Tensor runs, Tensor run_starts"
#define FOR_EACH_ADALN_OP(implement)                                            \
  implement(adaln_modulate) implement(adaln_modulate_backward)                  \
  implement(gated_residual) implement(gated_residual_backward)                  \
  implement(gated_residual_adaln) implement(gated_residual_adaln_backward)
#define IMPLEMENT(op) library.impl(#op, TORCH_BOX(&op));

#define QK_NORM_ROPE_SCHEMA                                                                                       \
  "Tensor qkv, Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias, Tensor sample_table, "             \
  "Tensor rope_grid, int token_offset, float eps, int axis_t, int axis_h, float theta, bool rotate"

STABLE_TORCH_LIBRARY(MCV_OPS, library) {
  library.def("qk_norm_rope(" QK_NORM_ROPE_SCHEMA ") -> (Tensor, Tensor)");
  library.def(
      "qk_norm_rope_backward(Tensor grad_q, Tensor grad_k, " QK_NORM_ROPE_SCHEMA
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "group_norm(Tensor x, Tensor gradient, Tensor coefficients, int kind, bool is_channels_last, bool has_silu) "
      "-> Tensor");
  library.def("halo_pack(Tensor clip, int first, int count) -> Tensor");
  library.def("halo_unpack_add(Tensor(a!) clip, Tensor message, int first) -> ()");
  library.def("adaln_modulate(Tensor x, " ADALN_MODULATION ADALN_ROWS ", float eps) -> Tensor");
  library.def(
      "adaln_modulate_backward(Tensor gradient, Tensor x, " ADALN_MODULATION ADALN_ROWS
      ", float eps) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("gated_residual(Tensor x, " ADALN_GATE ADALN_ROWS ") -> Tensor");
  library.def("gated_residual_backward(Tensor gradient, " ADALN_GATE ADALN_ROWS ") -> (Tensor, Tensor)");
  library.def(
      "gated_residual_adaln(Tensor x, " ADALN_GATE ADALN_MODULATION ADALN_ROWS ", float eps) -> (Tensor, Tensor)");
  library.def(
      "gated_residual_adaln_backward(Tensor residual_gradient, Tensor modulated_gradient, Tensor residual, " ADALN_GATE
          ADALN_MODULATION ADALN_ROWS ", float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

#if !defined(MCV_SIMT)
STABLE_TORCH_LIBRARY_IMPL(MCV_OPS, CPU, library) {
  library.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope_cpu));
  library.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward_cpu));
  FOR_EACH_ADALN_OP(IMPLEMENT)
}
#endif

#if defined(MCV_KERNELS)
STABLE_TORCH_LIBRARY_IMPL(MCV_OPS, MCV_DEVICE, library) {
  library.impl("qk_norm_rope", TORCH_BOX(&qk_norm_rope_kernel));
  library.impl("qk_norm_rope_backward", TORCH_BOX(&qk_norm_rope_backward_kernel));
  library.impl("group_norm", TORCH_BOX(&group_norm));
  library.impl("halo_pack", TORCH_BOX(&halo_pack));
  library.impl("halo_unpack_add", TORCH_BOX(&halo_unpack_add));
  FOR_EACH_ADALN_OP(IMPLEMENT)
}
#endif
