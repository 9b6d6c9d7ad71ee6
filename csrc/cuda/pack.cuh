// SPDX-License-Identifier: Apache-2.0
//
// Storage types on the device and packs of them: V neighbours moved by loads and stores of up to 16 bytes.
#pragma once
#include "cuda/launch.cuh"
#include "rom/abi.h"

namespace {
#include "core/scalar.hpp"

template <class S>
using Compute = decltype(widen(S{}));  // float; double for double

template <class S>
__device__ __forceinline__ Compute<S> read(S x) {
  return widen(x);
}
template <class S>
__device__ __forceinline__ S rounded(Compute<S> x) {
  return narrow<S>(x);
}
#if defined(__CUDACC__)  // one conversion instruction instead of integer arithmetic
template <>
__device__ __forceinline__ float read(float16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
template <>
__device__ __forceinline__ float16 rounded(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
__device__ __forceinline__ bfloat16 rounded(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
#endif

// Aligned to the largest power of two that divides its size, 16 at most.
constexpr size_t pack_alignment(size_t bytes) { return (bytes & -bytes) < 16 ? bytes & -bytes : 16; }
template <class S, int V>
struct alignas(pack_alignment(sizeof(S) * V)) Pack {
  S lane[V];
};

// The values of p[0 … V-1] in the compute type; p is aligned to the pack.
template <int V, class S>
__device__ __forceinline__ void load_pack(const S* p, Compute<S> (&to)[V]) {
  const Pack<S, V> pack = *reinterpret_cast<const Pack<S, V>*>(p);
  for (int v = 0; v < V; ++v) to[v] = read(pack.lane[v]);
}
template <int V, class S>
__device__ __forceinline__ void store_pack(S* p, const Compute<S> (&from)[V]) {
  Pack<S, V> pack;
  for (int v = 0; v < V; ++v) pack.lane[v] = rounded<S>(from[v]);
  *reinterpret_cast<Pack<S, V>*>(p) = pack;
}

// Two neighbours, p aligned to both: one conversion instruction where the hardware has it for pairs.
template <class S>
__device__ __forceinline__ float2 load_pair(const S* p) {
  float pair[2];
  load_pack(p, pair);
  return make_float2(pair[0], pair[1]);
}
template <class S>
__device__ __forceinline__ void store_pair(S* p, float2 pair) {
  const float values[2] = {pair.x, pair.y};
  store_pack(p, values);
}
#if defined(__CUDACC__)
template <>
__device__ __forceinline__ float2 load_pair(const bfloat16* p) {
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(p);
  return make_float2(float_from_bits(bits << 16), float_from_bits(bits & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 load_pair(const float16* p) {
  return __half22float2(*reinterpret_cast<const __half2*>(p));
}
template <>
__device__ __forceinline__ void store_pair(bfloat16* p, float2 pair) {
  *reinterpret_cast<__nv_bfloat162*>(p) = __float22bfloat162_rn(pair);
}
template <>
__device__ __forceinline__ void store_pair(float16* p, float2 pair) {
  *reinterpret_cast<__half2*>(p) = __float22half2_rn(pair);
}
#endif

// Four neighbours, p aligned to all: pairs by those instructions, but one access to memory.
template <class S>
__device__ __forceinline__ void load_four(const S* p, Compute<S> (&to)[4]) {
  const Pack<S, 4> pack = *reinterpret_cast<const Pack<S, 4>*>(p);
  if constexpr (sizeof(S) == 2) {
    const float2 low = load_pair(pack.lane), high = load_pair(pack.lane + 2);
    to[0] = low.x, to[1] = low.y, to[2] = high.x, to[3] = high.y;
  } else {
    for (int v = 0; v < 4; ++v) to[v] = read(pack.lane[v]);
  }
}

// Whether every row of t (along its last dimension) starts where a pack of `lanes` may start. An absent tensor has no
// say.
inline bool rows_aligned(const rom_tensor& t, int64_t lanes) {
  const int64_t element = t.dtype == ROM_FLOAT64 ? 8 : t.dtype == ROM_FLOAT32 ? 4 : 2;
  const int64_t bytes = lanes * element < 16 ? lanes * element : 16;
  if (!t.data) return true;
  for (int i = 0; i + 1 < t.ndim; ++i)
    if (t.size[i] > 1 && t.stride[i] % lanes != 0) return false;
  return reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(bytes) == 0;
}

// The rom_dtype of a storage type.
template <class S>
constexpr int kDtype = ROM_FLOAT32;
template <>
constexpr int kDtype<bfloat16> = ROM_BFLOAT16;
template <>
constexpr int kDtype<float16> = ROM_FLOAT16;
template <>
constexpr int kDtype<double> = ROM_FLOAT64;

template <class S>
struct Type {};
// f(Type<S>) for the storage type of that rom_dtype; false if there is none.
template <class F>
bool with_storage_type(int dtype, F f) {
  switch (dtype) {
    case ROM_FLOAT32: f(Type<float>{}); return true;
    case ROM_BFLOAT16: f(Type<bfloat16>{}); return true;
    case ROM_FLOAT16: f(Type<float16>{}); return true;
    case ROM_FLOAT64: f(Type<double>{}); return true;
    default: return false;
  }
}
}  // namespace
