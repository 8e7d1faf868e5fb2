// Arguments of the kernels of adaln: plain pointers and numbers, filled by bindings.cpp.
#pragma once

#include <cstdint>

namespace mcv {

// One struct for three ops. `x` alone: LayerNorm and modulation. `branch` alone: gate and residual. Both: the residual
// is written first, and the tokens are modulated as they are stored.
struct AdalnArgs {
  const void *x, *branch;                     // [S, D]; x is the residual where there is a branch
  void *residual, *modulated;                 // out, [S, D]; null: not wanted
  const void *residual_gradient, *modulated_gradient;  // backward, in, [S, D]
  void *x_gradient, *branch_gradient;         // backward, out, [S, D]; may be null
  const void *weight, *bias;                  // [D]
  int parameter_dtype;
  const void *gates, *table;                  // [R, columns, D]; of the gate its third column, of the table the first two
  int64_t gates_stride, table_stride;         // of a row, in elements
  int table_dtype, gates_dtype;
  const int64_t* rows;                        // [S]
  int64_t tokens;
  int width;
  double eps;

  // Backward: runs of tokens of one row, [G, 3]: first token, end, row; sorted by row.
  const int64_t* runs;
  const int64_t* run_starts;                  // [R + 1]: the runs of row r are run_starts[r] ... run_starts[r + 1] - 1
  int64_t num_runs, num_rows;
  void* partials;                             // [G, 3, D], compute type: sums of dy, dy x^ and dresidual branch
  void *gates_gradient, *table_gradient;      // [R, columns, D]
  int gates_columns, table_columns;
  void *weight_gradient, *bias_gradient;      // [D]
};

constexpr int kShift = 0, kScale = 1, kGate = 2;  // columns of a table

#define MCV_ADALN_CPU                                                                                  \
  void adaln_forward_cpu(const AdalnArgs& args, int dtype, int64_t begin, int64_t end);              \
  void adaln_backward_cpu(const AdalnArgs& args, int dtype, int64_t begin, int64_t end);             \
  void adaln_gradients_cpu(const AdalnArgs& args, int dtype, int64_t begin, int64_t end)
namespace portable {
MCV_ADALN_CPU;  // tokens [begin, end); runs [begin, end); channels [begin, end)
}
namespace avx2 {
MCV_ADALN_CPU;
}

}  // namespace mcv

// Each returns 0, or the code of the error (cudaError_t).
extern "C" {
int mcv_adaln_forward_cuda(const mcv::AdalnArgs* args, int dtype, void* stream);
int mcv_adaln_backward_cuda(const mcv::AdalnArgs* args, int dtype, void* stream);
}
