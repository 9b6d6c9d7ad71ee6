// SPDX-License-Identifier: Apache-2.0
//
// What the decode steps share. A thread keeps what depends on its channel in registers and walks through sequences:
// block (x, y) has the channels of column x and sequences y, y + gridDim.y, ...
#pragma once
#include "cuda/pack.cuh"

namespace {

constexpr int kThreads = 128;

// gridDim.y: sequences side by side. A thread takes a second one, up to four, only when 2048 blocks (more than 132 SMs
// hold) are there already.
inline unsigned rows_side_by_side(int64_t batch, int64_t columns) {
  constexpr int64_t kBlocks = 2048, kEach = 4, kMost = 65535;
  const int64_t filling = (kBlocks + columns - 1) / columns, least = (batch + kEach - 1) / kEach;
  const int64_t rows = filling > least ? filling : least, most = batch < kMost ? batch : kMost;
  return static_cast<unsigned>(rows < most ? rows : most);
}

// V neighbours of a parameter, which models keep in the compute type or in the activations' type X: reading both saves
// the launch of a cast per parameter and step, which takes longer than this kernel at batch 1.
template <class X, int V>
__device__ __forceinline__ void load_parameter(const rom_tensor& t, int64_t i, Compute<X> (&to)[V]) {
  if (t.dtype == kDtype<Compute<X>>)
    load_pack(static_cast<const Compute<X>*>(t.data) + i, to);
  else
    load_pack(static_cast<const X*>(t.data) + i, to);
}
// One element, or 0 where there is no such parameter.
template <class X>
__device__ __forceinline__ Compute<X> parameter(const rom_tensor& t, int64_t i) {
  Compute<X> one[1] = {};
  if (t.data) load_parameter<X>(t, i, one);
  return one[0];
}

// Element `inner` of sequence b's step, in a tensor (batch, steps, ...).
template <class S>
__device__ __forceinline__ S* element(const rom_tensor& t, int b, int64_t step, int64_t inner) {
  return static_cast<S*>(t.data) + (b * t.stride[0] + step * t.stride[1] + inner);
}

// The slot of sequence b; negative is padding. Indices are never read on the host (a CUDA graph replays with new ones),
// so one that is out of range is found here.
__device__ __forceinline__ int slot_of(const rom_tensor& indices, int b) {
  return indices.data ? static_cast<const int32_t*>(indices.data)[b] : b;
}
__device__ __forceinline__ bool is_slot(const rom_tensor& state, int slot) { return slot >= 0 && slot < state.size[0]; }

// The output of a sequence without a slot: 0 for padding, NaN for an index out of range.
template <class X>
__device__ __forceinline__ void write_without_slot(const rom_tensor& out, int b, int slot, int64_t channel) {
  const X value = rounded<X>(slot < 0 ? Compute<X>(0) : static_cast<Compute<X>>(NAN));
#pragma unroll 1
  for (int64_t step = 0; step < out.size[1]; ++step) *element<X>(out, b, step, channel) = value;
}

}  // namespace
