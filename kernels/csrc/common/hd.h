// What nvcc and the host compiler share: storage types, their conversions, and accesses of 16 bytes.
//
// A kernel's arithmetic is written once, in <op>/core.h, as functions marked MCV_HD. Three programs compile it: nvcc
// (<op>.cu), the host compiler for the CPU (<op>_cpu.cpp), and the host compiler for the SIMT shim (simt.h), which runs
// the .cu file's own kernels on the CPU.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MCV_HD __host__ __device__ __forceinline__
#define MCV_UNROLL _Pragma("unroll")
#define MCV_RESTRICT __restrict__
#else
#define MCV_HD inline __attribute__((always_inline))
#define MCV_UNROLL
#define MCV_RESTRICT __restrict__
#if defined(__F16C__)
#include <immintrin.h>
#endif
#endif

// The CPU files are compiled once per instruction set; a namespace each keeps the linker from merging their inline
// functions, which would put AVX2 code where the old processor's belongs.
#ifndef MCV_ISA
#define MCV_ISA portable
#endif

namespace mcv {

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

namespace MCV_ISA {

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// ------------------------------------------------------------------------------------------- one value

template <class To, class From>
MCV_HD To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

MCV_HD float widen(float x) { return x; }
MCV_HD double widen(double x) { return x; }
MCV_HD float widen(bf16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

MCV_HD float widen(fp16 x) {
#if defined(__CUDA_ARCH__)
  return __half2float(bits_as<__half>(x.bits));
#elif defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  // 2^112 moves the exponent from fp16's bias to fp32's, subnormals included; infinity and NaN keep all ones
  const float value = bits_as<float>(magnitude << 13) * bits_as<float>(uint32_t(239) << 23);
  const uint32_t bits = magnitude >= 0x7c00u ? (0x7f800000u | (magnitude << 13)) : bits_as<uint32_t>(value);
  return bits_as<float>(sign | bits);
#endif
}

template <class To>
struct Narrow;  // round to nearest, ties to even

template <>
struct Narrow<float> {
  static MCV_HD float of(float x) { return x; }
};
template <>
struct Narrow<double> {
  static MCV_HD double of(double x) { return x; }
};
template <>
struct Narrow<bf16> {
  static MCV_HD bf16 of(float x) {
#if defined(__CUDA_ARCH__)
    return {bits_as<uint16_t>(__float2bfloat16_rn(x))};
#else
    const uint32_t bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return {uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
  }
};
template <>
struct Narrow<fp16> {
  static MCV_HD fp16 of(float x) {
#if defined(__CUDA_ARCH__)
    return {bits_as<uint16_t>(__float2half_rn(x))};
#elif defined(__F16C__)
    return {uint16_t(_cvtss_sh(x, 0))};
#else
    const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
    if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // 65520 and more round to infinity
    if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the mantissa
      return {uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u))};
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (uint32_t(112) << 23);
    return {uint16_t(sign | (rounded >> 13))};
#endif
  }
};

template <class Storage>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<double> {
  using type = double;
};

// Values of a parameter vector, of any dtype: read once per thread, so the branch costs nothing.
template <int n, class C>
MCV_HD void load_parameters(C* to, const void* values, int dtype, int64_t first) {
  if (dtype == kFloat32) {
    MCV_UNROLL for (int i = 0; i < n; ++i) to[i] = C(static_cast<const float*>(values)[first + i]);
  } else if (dtype == kBFloat16) {
    MCV_UNROLL for (int i = 0; i < n; ++i) to[i] = C(widen(static_cast<const bf16*>(values)[first + i]));
  } else if (dtype == kFloat16) {
    MCV_UNROLL for (int i = 0; i < n; ++i) to[i] = C(widen(static_cast<const fp16*>(values)[first + i]));
  } else {
    MCV_UNROLL for (int i = 0; i < n; ++i) to[i] = C(static_cast<const double*>(values)[first + i]);
  }
}

template <class C>
MCV_HD void store_parameter(void* values, int dtype, int64_t i, C x) {
  switch (dtype) {
    case kFloat32: static_cast<float*>(values)[i] = float(x); break;
    case kBFloat16: static_cast<bf16*>(values)[i] = Narrow<bf16>::of(float(x)); break;
    case kFloat16: static_cast<fp16*>(values)[i] = Narrow<fp16>::of(float(x)); break;
    default: static_cast<double*>(values)[i] = double(x);
  }
}

// -------------------------------------------------------------------------------------------- 8 values

constexpr int kChunk = 8;  // values of one lane: 16 bytes of bf16 or fp16, twice 16 bytes of fp32

struct __attribute__((may_alias, aligned(16))) Bytes16 {
  uint32_t word[4];
};

// Eight values as they are stored; loaded and kept raw, so that a load in flight holds few registers.
template <class Storage>
struct Raw8 {
  static constexpr int kParts = kChunk * int(sizeof(Storage)) / 16;
  Bytes16 part[kParts];

  MCV_HD void load(const Storage* p) {
    MCV_UNROLL for (int i = 0; i < kParts; ++i) part[i] = reinterpret_cast<const Bytes16*>(p)[i];
  }
  MCV_HD void store(Storage* p) const {
    MCV_UNROLL for (int i = 0; i < kParts; ++i) reinterpret_cast<Bytes16*>(p)[i] = part[i];
  }
  MCV_HD void clear() {
    MCV_UNROLL for (int i = 0; i < kParts; ++i) part[i] = {{0u, 0u, 0u, 0u}};
  }
  template <class C>
  MCV_HD void unpack(C* x) const {
    Storage values[kChunk];
    memcpy(values, part, sizeof(values));
    MCV_UNROLL for (int i = 0; i < kChunk; ++i) x[i] = widen(values[i]);
  }
  template <class C>
  MCV_HD void pack(const C* x) {
    Storage values[kChunk];
    MCV_UNROLL for (int i = 0; i < kChunk; ++i) values[i] = Narrow<Storage>::of(x[i]);
    memcpy(part, values, sizeof(values));
  }
};

}  // namespace MCV_ISA

template <class T>
MCV_HD T smaller(T a, T b) {
  return a < b ? a : b;
}

}  // namespace mcv
