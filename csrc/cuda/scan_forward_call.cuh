// SPDX-License-Identifier: Apache-2.0
//
// What the two forward kernels of the scan are given.
#pragma once
#include "cuda/scan.cuh"

namespace {

template <class T>
struct Forward {
  Problem<T> problem;
  const T* initial_state;        // may be null
  T *final_state, *checkpoints;  // checkpoints may be null
  Rows out;                      // out.data is null where only the states are wanted
  int chunks, chunk_steps;       // a sequence is this many blocks' work, each of chunk_steps (the last of fewer)
  bool wide_out;                 // out in the compute type although u is not
  bool aligned, coefficients_aligned, states_aligned;  // see launch_tiled
};

template <class S>
Forward<Compute<S>> forward_of(const rom_scan_forward_args& a) {
  using T = Compute<S>;
  Forward<T> f{};
  f.problem = problem_of<T>(a);
  f.initial_state = static_cast<const T*>(a.initial_state.data);
  f.final_state = static_cast<T*>(a.final_state.data);
  f.checkpoints = static_cast<T*>(a.checkpoints.data);
  f.out = rows_of(a.out);
  f.chunks = 1;
  f.wide_out = a.out.dtype != a.u.dtype;
  return f;
}

}  // namespace
