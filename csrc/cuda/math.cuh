// SPDX-License-Identifier: Apache-2.0
//
// The functions of the scan, the convolution and their decode steps, within a few ulp of float at the price of one or
// two special-function (MUFU) operations each.
#pragma once
#include "cuda/pack.cuh"

namespace {

constexpr double kLog2E = 1.44269504088896340736;

#if defined(ROM_CUDA_ON_CPU)
inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal_fast(float x) { return 1 / x; }
#else
// One MUFU operation each: 2 ulp over the whole range, subnormal results are zero.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif
__device__ __forceinline__ double exp2_fast(double x) { return exp2(x); }
__device__ __forceinline__ double reciprocal_fast(double x) { return 1 / x; }

// exp2(delta * a) without the MUFU, for a share of the states: it then works beside the FMA pipe. Nearest reduction,
// degree 5, constant term exactly 1 (decays near 1 must not drift). Exponents are clamped to +-126; kDecay, for
// delta * a <= 0, saves the upper clamp.
template <bool kDecay = false>
__device__ __forceinline__ float exp2_polynomial(float delta, float a) {
  constexpr float kRound = 12582912.f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  float integer = fmaf(delta, a, kRound);
  const float fraction = fmaf(delta, a, -(integer - kRound));
  integer = fmaxf(integer, kRound - 126.f);
  if (!kDecay) integer = fminf(integer, kRound + 126.f);
  float power = 0.00132646524f;
  power = fmaf(power, fraction, 0.00967151132f);
  power = fmaf(power, fraction, 0.0555073396f);
  power = fmaf(power, fraction, 0.240222421f);
  power = fmaf(power, fraction, 0.693146978f);
  power = fmaf(power, fraction, 1.f);
  return float_from_bits(float_bits(power) + (float_bits(integer) << 23));
}

// max(x, 0) + log1p(v) with v = exp(-|x|) in (0, 1]; log1p(v) = v P(v) with P(0) exactly 1, so that small steps keep
// their relative precision (lg2.approx(1 + v) loses 2e-4 at 1e-3), for one MUFU operation.
__device__ __forceinline__ float softplus(float x) {
  const float v = exp2_fast(fabsf(x) * -static_cast<float>(kLog2E));
  float p = 0.00536482269f;
  p = fmaf(p, v, -0.0300657861f);
  p = fmaf(p, v, 0.0792045221f);
  p = fmaf(p, v, -0.137538016f);
  p = fmaf(p, v, 0.191536546f);
  p = fmaf(p, v, -0.248571634f);
  p = fmaf(p, v, 0.33321324f);
  p = fmaf(p, v, -0.499996483f);
  p = fmaf(p, v, 1.f);
  return fmaf(p, v, fmaxf(x, 0.f));
}
__device__ __forceinline__ double softplus(double x) { return fmax(x, 0.0) + log1p(exp(-fabs(x))); }

template <class T>
__device__ __forceinline__ T sigmoid(T x) {
  return reciprocal_fast(T(1) + exp2_fast(x * -static_cast<T>(kLog2E)));
}
// z * sigmoid(z), also where exp(-z) overflows: 0 for z to -infinity, as z / (1 + exp(-z)) would be.
template <class T>
__device__ __forceinline__ T silu(T z) {
  return z * sigmoid(z);
}

}  // namespace
