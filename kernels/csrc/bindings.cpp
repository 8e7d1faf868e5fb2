// The compiled ops, registered under `megacogvx::` through torch's stable ABI: the only file that is compiled with
// torch's headers (common/tensors.h brings them). Arguments are checked in Python, for every backend alike; what is
// checked here keeps a direct call of torch.ops from reading outside its tensors, as long as the rows and runs they
// hold are in range. The fake implementations and the gradients are registered in Python too.
#include "adaln/call.h"
#include "causal_halo/args.h"
#include "common/tensors.h"
#include "group_norm_moments/args.h"
#include "qk_norm_rope/call.h"

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

// -------------------------------------------------------------------------------------------- qk_norm_rope

namespace {

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

FiveTensors qk_norm_rope_backward_cpu(const Tensor& grad_q, const Tensor& grad_k, QK_NORM_ROPE_ARGUMENTS) {
  QkNormRopeCall call(QK_NORM_ROPE_CALL);
  QkNormRopeGradients out(call, grad_q, grad_k, qkv, q_weight);
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
  QkNormRopeGradients out(call, grad_q, grad_k, qkv, q_weight);
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
  check_together(x, {&gradient, &coefficients});
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
  check_together(clip, {&message});
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
