// SPDX-License-Identifier: Apache-2.0
//
// What the scan's forward and backward share on the GPU: the problem as kernels see it, where rows and checkpoints
// lie. Channel-last memory: (batch, length, dim) with unit stride along dim.
#pragma once
#include "cuda/math.cuh"
#include "cuda/pack.cuh"
#include "rom/scan.h"

namespace {

constexpr int kCheckpointSteps = ROM_SCAN_TILE;

// ------------------------------------------------------------------------------------------------ the problem
// A tensor of rows, by strides in elements: (batch, length, dim), or (rows, dim) where row_index chooses (batch = 0).
struct Rows {
  void* data;
  int64_t batch, step;
};
// B or C: (batch, length, groups, state); constant over time, (dim, state), if !by_time (then the strides are 0).
struct Coefficient {
  void* data;
  int64_t batch, step, group;
  bool by_time;
};

// T: compute type. Passed to kernels by value.
template <class T>
struct Problem {
  Rows u, delta, z;  // z.data may be null
  Coefficient B, C;
  const T *A, *D, *delta_bias;            // the last two may be null
  const int32_t *cu_seqlens, *row_index;  // may be null
  int64_t length, sequences;
  int dim, state, groups, group_dim, rows_per_step;  // a group's channels: group_dim; rows_per_step: K of row_index
  bool softplus;
};

inline Rows rows_of(const rom_tensor& t) {
  return t.ndim == 3 ? Rows{t.data, t.stride[0], t.stride[1]} : Rows{t.data, 0, t.stride[0]};
}
inline Coefficient coefficient_of(const rom_tensor& t) {
  if (t.ndim == 2) return {t.data, 0, 0, 0, false};
  return {t.data, t.stride[0], t.stride[1], t.size[2] > 1 ? t.stride[2] : 0, true};  // one group serves all channels
}

// Args: rom_scan_forward_args or rom_scan_backward_args.
template <class T, class Args>
Problem<T> problem_of(const Args& a) {
  Problem<T> p{};
  p.u = rows_of(a.u), p.delta = rows_of(a.delta), p.z = rows_of(a.z);
  p.B = coefficient_of(a.B), p.C = coefficient_of(a.C);
  p.A = static_cast<const T*>(a.A.data), p.D = static_cast<const T*>(a.D.data);
  p.delta_bias = static_cast<const T*>(a.delta_bias.data);
  p.cu_seqlens = static_cast<const int32_t*>(a.cu_seqlens.data);
  p.row_index = static_cast<const int32_t*>(a.row_index.data);
  p.length = a.u.size[1], p.sequences = p.cu_seqlens ? a.cu_seqlens.size[0] - 1 : a.u.size[0];
  p.dim = static_cast<int>(a.u.size[2]), p.state = static_cast<int>(a.A.size[1]);
  p.groups = 1;
  for (const rom_tensor* t : {&a.B, &a.C})
    if (t->ndim == 4 && t->size[2] > p.groups) p.groups = static_cast<int>(t->size[2]);
  p.group_dim = p.dim / p.groups;
  p.rows_per_step = p.row_index ? static_cast<int>(a.row_index.size[1]) : 1;
  p.softplus = a.delta_softplus != 0;
  return p;
}

// ------------------------------------------------------------------------------------------------ sequences and rows
// Steps [begin, begin + length) of one batch entry. Its checkpoints start at `slot`: with packed sequences a bound that
// needs no running sum over them, so up to one slot per sequence stays unused. The same slots as on the CPU.
struct Sequence {
  int64_t index, batch, begin, length, slot;
};
template <class T>
__device__ __forceinline__ Sequence sequence_of(const Problem<T>& p, int64_t i) {
  if (!p.cu_seqlens) return {i, i, 0, p.length, i * ((p.length + kCheckpointSteps - 1) / kCheckpointSteps)};
  const int begin = p.cu_seqlens[i], end = p.cu_seqlens[i + 1];
  return {i, 0, begin, end - begin, begin / kCheckpointSteps + i};
}

// The row of a step of a sequence, and the row of that number in a table.
template <class S>
__device__ __forceinline__ S* row(const Rows& t, const Sequence& s, int64_t step) {
  return static_cast<S*>(t.data) + s.batch * t.batch + (s.begin + step) * t.step;
}
template <class S>
__device__ __forceinline__ S* row(const Rows& t, int64_t number) {
  return static_cast<S*>(t.data) + number * t.step;
}
// The rows_per_step row numbers of a step; only with a row_index.
template <class T>
__device__ __forceinline__ const int32_t* row_numbers(const Problem<T>& p, const Sequence& s, int64_t step) {
  return p.row_index + (s.batch * p.length + s.begin + step) * p.rows_per_step;
}
// f(row) for the row of z, out (or grad_out, grad_z) that a step reads or writes, or for each of its rows in order.
template <class S, class T, class F>
__device__ __forceinline__ void each_row(const Problem<T>& p, const Rows& t, const Sequence& s, int64_t step, F f) {
  if (!p.row_index) return f(row<S>(t, s, step));
  const int32_t* numbers = row_numbers(p, s, step);
#pragma unroll 1
  for (int k = 0; k < p.rows_per_step; ++k) f(row<S>(t, static_cast<int64_t>(numbers[k])));
}
// The states of B or C for a step and a group of channels; only if by_time.
template <class S>
__device__ __forceinline__ const S* row(const Coefficient& t, const Sequence& s, int64_t step, int group) {
  return static_cast<const S*>(t.data) + s.batch * t.batch + (s.begin + step) * t.step + group * t.group;
}

// ------------------------------------------------------------------------------------------------ checkpoints
// The state before step m * kCheckpointSteps of a sequence is at slot s.slot + m, as [quad][channel][4 states]: lanes
// that are neighbouring channels, or (channel, quad) pairs, move 16 bytes each and a warp whole lines. The last quad is
// padded (its padding is written as zeros). It fits rom/ops/scan.py's _checkpoint_shape, which pads at least as much.
template <class T>
__device__ __forceinline__ T* checkpoint_quad(const Problem<T>& p, T* checkpoints, int64_t slot, int quad,
                                              int channel) {
  const int quads = (p.state + 3) / 4;
  return checkpoints + ((slot * quads + quad) * p.dim + channel) * 4;
}

}  // namespace
