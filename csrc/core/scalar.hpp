// SPDX-License-Identifier: Apache-2.0
//
// Scalar mathematics that CPU kernels, CUDA kernels and the C++ tests share. Include it inside an anonymous namespace
// in files that are compiled once per instruction set (see cpu/kernel.hpp for the reason).
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define ROM_HD __host__ __device__ __forceinline__
#else
#define ROM_HD inline
#endif

// 16-bit storage types. Arithmetic is always done after widening to float.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

ROM_HD uint32_t float_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}
ROM_HD float float_from_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

ROM_HD float widen(float x) { return x; }
ROM_HD double widen(double x) { return x; }
ROM_HD float widen(bfloat16 x) { return float_from_bits((uint32_t)x.bits << 16); }
ROM_HD float widen(float16 x) {
  const uint32_t sign = (uint32_t)(x.bits & 0x8000u) << 16, rest = (uint32_t)(x.bits & 0x7fffu) << 13;
  if (rest >= 0x0f800000u) return float_from_bits(sign | rest | 0x7f800000u);  // inf, NaN
  if (rest >= 0x00800000u) return float_from_bits(sign | (rest + 0x38000000u));
  // Subnormal in 16 bits, normal in 32: made from an integer, for the kernels flush subnormal floats to zero.
  return float_from_bits(sign | float_bits((float)(x.bits & 0x03ffu) * 5.9604644775390625e-8f));  // 2^-24
}

// Round to nearest even, as torch does.
template <class T>
ROM_HD T narrow(float x);
template <>
ROM_HD float narrow<float>(float x) {
  return x;
}
template <>
ROM_HD bfloat16 narrow<bfloat16>(float x) {
  const uint32_t bits = float_bits(x);
  if (x != x) return {(uint16_t)((bits >> 16) | 0x0040u)};
  return {(uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}
template <>
ROM_HD float16 narrow<float16>(float x) {
  const uint32_t bits = float_bits(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return {(uint16_t)(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {(uint16_t)(sign | 0x7c00u)};  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 aligns the last kept bit with float's own rounding
    const uint32_t shifted = float_bits(float_from_bits(magnitude) + 0.5f);
    return {(uint16_t)(sign | (shifted - 0x3f000000u))};
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return {(uint16_t)(sign | ((rounded - 0x38000000u) >> 13))};
}
template <class T>
ROM_HD T narrow(double x) {
  return (T)x;
}
