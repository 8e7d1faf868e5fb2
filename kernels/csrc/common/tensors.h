// What the bindings share: torch's stable ABI on one side, plain pointers on the other. Only bindings.cpp and the
// <op>/call.h that it includes include this.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cmath>
#include <initializer_list>
#include <tuple>
#include <vector>

#include "hd.h"

#if defined(MCV_SIMT) || defined(MCV_CUDA)
#define MCV_KERNELS  // this library has the .cu files' kernels
#endif

// Weak: a torch without CUDA doesn't have it, and one library serves both.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace mcv {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

inline int dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return kFloat32;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    case ScalarType::Double: return kFloat64;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16, float16 or float64"); return -1;
  }
}

// Partial sums are kept in the type that is computed in.
inline ScalarType compute_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_contiguous(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous");
}

inline void check_aligned(const void* data, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(data) % 16 == 0, name, " must start at a multiple of 16 bytes");
}

inline void check_together(const Tensor& x, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    STD_TORCH_CHECK(
        other->is_cpu() == x.is_cpu() && other->get_device_index() == x.get_device_index(),
        "all tensors of a call must be on one device");
  }
}

inline Tensor empty(const Tensor& like, std::vector<int64_t> size, ScalarType dtype) {
  return torch::stable::new_empty(like, {size.data(), size.size()}, dtype);
}

#if defined(MCV_SIMT)
struct OnDevice {
  void* stream = nullptr;
  explicit OnDevice(const Tensor&) {}
};
#elif defined(MCV_CUDA)
// Makes the tensor's device current and finds its stream.
struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  void* stream = nullptr;

  explicit OnDevice(const Tensor& x) : guard(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
    const AOTITorchError error = aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream);
    STD_TORCH_CHECK(error == 0, "torch has no stream for this device");
  }
};

#endif

inline void check_launch(int error, const char* op) {
  STD_TORCH_CHECK(error != 10001, op, ": SIMT deadlock, threads wait for each other at different places");
  STD_TORCH_CHECK(error == 0, op, ": the launch failed with CUDA error ", error);
}

inline bool has_avx2() {
#if defined(MCV_HAS_AVX2)
  static const bool found =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return found;
#else
  return false;
#endif
}

#if defined(MCV_HAS_AVX2)
#define MCV_BY_ISA(function) (mcv::has_avx2() ? mcv::avx2::function : mcv::portable::function)
#else
#define MCV_BY_ISA(function) (mcv::portable::function)
#endif

// Rows of partial sums, added in order: the same bits on any number of threads.
template <class C>
void reduce_rows(const C* partials, int64_t rows, int columns, int per_output, void* const* outputs, int dtype) {
  std::vector<double> sums(columns, 0.0);
  for (int64_t row = 0; row < rows; ++row) {
    for (int column = 0; column < columns; ++column) sums[column] += double(partials[row * columns + column]);
  }
  for (int column = 0; column < columns; ++column) {
    MCV_ISA::store_parameter(outputs[column / per_output], dtype, column % per_output, sums[column]);
  }
}

}  // namespace mcv
