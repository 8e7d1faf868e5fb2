// Arguments of the kernels of qk_norm_rope: plain pointers and numbers, filled by bindings.cpp.
#pragma once

#include <cstdint>

namespace mcv {

constexpr int kMaxPairs = 64;     // head widths up to 128
constexpr int kPartialTokens = 32;  // tokens whose parameter gradients form one partial sum, on every device

struct QkNormRopeArgs {
  const void* qkv;                          // [S, N, 3, K], K contiguous
  int64_t stride_S, stride_N, stride_3;     // of qkv, in elements
  void *q, *k;                              // forward: out [S, N, K]; backward: gradients of them, in
  void* qkv_gradient;                       // backward: [S, N, 3, K], contiguous; the part of v is zeroed
  void* partials;                           // backward: compute type [ceil(S / 32), 4, K]: d of weights and biases
  void* parameter_gradients[4];             // backward: [K], of q weight, q bias, k weight, k bias
  const void *weight[2], *bias[2];          // [K], of q and of k
  int parameter_dtype;
  const int32_t* table;                     // [M, 5]: first token, text tokens, t, h, w
  const float* grid;                        // [M, 6]: origin t, h, w, step t, h, w
  int samples;
  int64_t tokens, token_offset;
  int heads, width, axis_t, axis_h;         // channels; the rest of the width is w
  double eps;
  int rotate;
  double half_turns[kMaxPairs];             // theta^(-2 i / n) / pi of each pair of channels
};

}  // namespace mcv

// Each returns 0, or the code of the error (cudaError_t).
extern "C" {
int mcv_qk_norm_rope_forward_cuda(const mcv::QkNormRopeArgs* args, int dtype, void* stream);
int mcv_qk_norm_rope_backward_cuda(const mcv::QkNormRopeArgs* args, int dtype, void* stream);
}

// On the CPU, for each instruction set: tokens [begin, end) forward, partial sums [begin, end) backward.
namespace mcv {
using QkNormRopeRange = void (*)(const QkNormRopeArgs& args, int dtype, int64_t begin, int64_t end);
namespace portable {
void qk_norm_rope_forward_cpu(const QkNormRopeArgs& args, int dtype, int64_t begin, int64_t end);
void qk_norm_rope_backward_cpu(const QkNormRopeArgs& args, int dtype, int64_t begin, int64_t end);
}  // namespace portable
namespace avx2 {
void qk_norm_rope_forward_cpu(const QkNormRopeArgs& args, int dtype, int64_t begin, int64_t end);
void qk_norm_rope_backward_cpu(const QkNormRopeArgs& args, int dtype, int64_t begin, int64_t end);
}  // namespace avx2
}  // namespace mcv
