// SPDX-License-Identifier: Apache-2.0
//
// Selective scan, forward, for the calls that scan_forward.cuh has no form for: float64, B or C constant over time,
// more than 128 states. Correct, not fast: every step waits for its own loads.
#pragma once
#include "cuda/scan_forward_call.cuh"

namespace {

constexpr int kPlainLanes = 16, kPlainThreads = 128, kMaxState = 256;

// Sixteen lanes per channel, states dealt to them like cards, everything read straight from global memory.
template <class S>
__global__ void __launch_bounds__(kPlainThreads, 2)
    scan_forward_plain(const __grid_constant__ Forward<Compute<S>> f, int tiles) {
  using T = Compute<S>;
  constexpr int kTurns = kMaxState / kPlainLanes, kChannels = kPlainThreads / kPlainLanes;
  const Problem<T>& p = f.problem;
  const Sequence s = sequence_of(p, blockIdx.x / tiles);
  const int channel = blockIdx.x % tiles * kChannels + threadIdx.x / kPlainLanes, lane = threadIdx.x % kPlainLanes;
  const bool inside = channel < p.dim;
  const int d = inside ? channel : p.dim - 1, group = d / p.group_dim;  // all lanes take part in the sums
  const int64_t at = static_cast<int64_t>(d) * p.state, state_at = s.index * p.dim * p.state + at;
  const int padded = (p.state + 3) / 4 * 4;
  const T bias = p.delta_bias ? p.delta_bias[d] : T(0), D = p.D ? p.D[d] : T(0);
  T A[kTurns], h[kTurns];
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int n = i * kPlainLanes + lane;
    A[i] = n < p.state ? p.A[at + n] * static_cast<T>(kLog2E) : T(0);
    h[i] = n < p.state && f.initial_state ? f.initial_state[state_at + n] : T(0);
  }
#pragma unroll 1
  for (int64_t t = 0; t < s.length; ++t) {
    T delta = read(row<const S>(p.delta, s, t)[d]) + bias;
    if (p.softplus) delta = softplus(delta);
    const T u = read(row<const S>(p.u, s, t)[d]), delta_u = delta * u;
    const S *B_t = row<S>(p.B, s, t, group), *C_t = row<S>(p.C, s, t, group);
    const T *B = static_cast<const T*>(p.B.data) + at, *C = static_cast<const T*>(p.C.data) + at;
    const bool save = inside && f.checkpoints && t % kCheckpointSteps == 0;
    T y = 0;
#pragma unroll
    for (int i = 0; i < kTurns; ++i) {
      if (i * kPlainLanes >= padded) break;
      const int n = i * kPlainLanes + lane;
      if (save && n < padded) checkpoint_quad(p, f.checkpoints, s.slot + t / kCheckpointSteps, n / 4, d)[n % 4] = h[i];
      if (n >= p.state) continue;
      h[i] = exp2_fast(delta * A[i]) * h[i] + delta_u * (p.B.by_time ? read(B_t[n]) : B[n]);
      y += h[i] * (p.C.by_time ? read(C_t[n]) : C[n]);
    }
    for (int width = kPlainLanes / 2; width > 0; width /= 2) y += __shfl_xor_sync(0xffffffffu, y, width);
    if (lane != 0 || !inside) continue;
    y += D * u;
    T gate = 0;
    if (p.z.data) each_row<const S>(p, p.z, s, t, [&](const S* r) { gate += read(r[d]); });
    if (p.z.data) y *= silu(gate);
    if (f.wide_out)
      each_row<T>(p, f.out, s, t, [&](T* r) { r[d] = y; });
    else
      each_row<S>(p, f.out, s, t, [&](S* r) { r[d] = rounded<S>(y); });
  }
#pragma unroll
  for (int i = 0; i < kTurns; ++i) {
    const int n = i * kPlainLanes + lane;
    if (inside && n < p.state) f.final_state[state_at + n] = h[i];
  }
}

template <class S>
void launch_plain(const rom_scan_forward_args& a) {
  const Forward<Compute<S>> f = forward_of<S>(a);
  constexpr int kChannels = kPlainThreads / kPlainLanes;
  const int tiles = (f.problem.dim + kChannels - 1) / kChannels;
  ROM_LAUNCH((scan_forward_plain<S>), static_cast<unsigned>(tiles * f.problem.sequences), kPlainThreads, 0,
             a.launch.stream, f, tiles);
}

}  // namespace
