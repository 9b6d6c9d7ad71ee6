// SPDX-License-Identifier: Apache-2.0
//
// The scan's backward pass, the recurrence: from checkpoints to states, 8 steps forth and back, and the sums of dB and
// dC over a block's channels.
#pragma once
#include "cuda/scan_backward_call.cuh"

namespace {

// A field of the 8 steps of a part.
__device__ __forceinline__ void load_field(const Quad* fields, StepField field, float (&to)[kSteps]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Quad q = fields[field * kTileQuads + i];
#pragma unroll
    for (int r = 0; r < 4; ++r) to[i * 4 + r] = q.at[r];
  }
}

// B or C for a lane's states: of a step of the tile, or constant over time.
template <bool kGeneral>
__device__ __forceinline__ Quad B_at(const Backward& a, const Shared<kGeneral>& shared, int step, int quad, int strip) {
  if constexpr (kGeneral)
    if (!a.problem.B.by_time) return shared.B[strip][threadIdx.x];
  return shared.coefficients[step][quad];
}
template <bool kGeneral>
__device__ __forceinline__ Quad C_at(const Backward& a, const Shared<kGeneral>& shared, int step, int quad, int strip) {
  if constexpr (kGeneral)
    if (!a.problem.C.by_time) return shared.C[strip][threadIdx.x];
  return shared.coefficients[step][4 + quad];
}

// From the checkpoint to the states before each part.
template <bool kGeneral>
__device__ __forceinline__ void replay(const Backward& a, const Channels& c, int64_t slot, int parts,
                                       Shared<kGeneral>& shared) {
  const Problem<float>& p = a.problem;
  const StateLane lane;
  const int quad = a.first_state / 4 + lane.quad;
#pragma unroll 1
  for (int strip = 0; strip < kStrips; ++strip) {
    const int i = lane.in_block(strip);
    const bool inside = i < c.count && quad * 4 < p.state;
    shared.state[0][strip][threadIdx.x] =
        inside ? *reinterpret_cast<const Quad*>(checkpoint_quad(p, a.checkpoints, slot, quad, c.first + i)) : Quad{};
  }
#pragma unroll 1
  for (int part = 0; part < parts - 1; ++part) {
    Quad A[kStrips], h[kStrips];
    float delta[kStrips][kSteps], delta_u[kStrips][kSteps];
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      A[strip] = shared.A[strip][threadIdx.x], h[strip] = shared.state[part][strip][threadIdx.x];
      load_field(shared.step[lane.in_block(strip)] + part * 2, kDelta, delta[strip]);
      load_field(shared.step[lane.in_block(strip)] + part * 2, kDeltaU, delta_u[strip]);
    }
#pragma unroll
    for (int t = 0; t < kSteps; ++t)
#pragma unroll
      for (int strip = 0; strip < kStrips; ++strip) {
        const Quad B = B_at(a, shared, part * kSteps + t, lane.quad, strip);
#pragma unroll
        for (int j = 0; j < 4; ++j)
          h[strip].at[j] =
              fmaf(exp2_fast(delta[strip][t] * A[strip].at[j]), h[strip].at[j], delta_u[strip][t] * B.at[j]);
      }
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) shared.state[part + 1][strip][threadIdx.x] = h[strip];
  }
}

// ------------------------------------------------------------------------------------------------ 8 steps
// A sum over a lane's states at 8 steps.
template <bool kGeneral>
__device__ __forceinline__ void store_sum(Shared<kGeneral>& shared, int strip, Sum sum, const StateLane& lane,
                                          const float (&v)[kSteps]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    shared.scratch[sum_row(strip, sum, half)][sum_column(lane.warp, lane.channel, lane.quad)] =
        Quad{{v[half * 4], v[half * 4 + 1], v[half * 4 + 2], v[half * 4 + 3]}};
}

// One strip. B is in registers from strip to strip, C is read again: it would cost 32 more, and there are 255.
// The first strip sets dB and dC: zeros to add to would cost half an instruction per element.
template <bool kGeneral>
__device__ __forceinline__ void sweep_strip(const Backward& a, int part, int strip, Shared<kGeneral>& shared,
                                            const Quad (&B)[kSteps], float (&dB)[kSteps][4], float (&dC)[kSteps][4]) {
  const StateLane lane;
  const int thread = threadIdx.x;
  const bool first = strip == 0;
  const Quad A = shared.A[strip][thread];
  const Quad* fields = shared.step[lane.in_block(strip)] + part * 2;
  float delta[kSteps], delta_u[kSteps], dy[kSteps], decay[kSteps][4], h[kSteps + 1][4];
  load_field(fields, kDelta, delta);
  load_field(fields, kDeltaU, delta_u);
  load_field(fields, kGradY, dy);
  {
    const Quad state = shared.state[part][strip][thread];
#pragma unroll
    for (int j = 0; j < 4; ++j) h[0][j] = state.at[j];
  }
#pragma unroll
  for (int t = 0; t < kSteps; ++t)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      decay[t][j] = exp2_fast(delta[t] * A.at[j]);
      h[t + 1][j] = fmaf(decay[t][j], h[t][j], delta_u[t] * B[t].at[j]);
    }

  Quad carry = shared.carry[strip][thread], dA = shared.grad_A[strip][thread];
  float S[kSteps], E[kSteps], Y[kSteps];
#pragma unroll
  for (int t = kSteps - 1; t >= 0; --t) {
    const Quad C = C_at(a, shared, part * kSteps + t, lane.quad, strip);
    S[t] = E[t] = Y[t] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float g = fmaf(dy[t], C.at[j], carry.at[j]);
      Y[t] = fmaf(h[t + 1][j], C.at[j], Y[t]);
      dC[t][j] = first ? dy[t] * h[t + 1][j] : fmaf(dy[t], h[t + 1][j], dC[t][j]);
      dB[t][j] = first ? g * delta_u[t] : fmaf(g, delta_u[t], dB[t][j]);
      S[t] = fmaf(g, B[t].at[j], S[t]);
      carry.at[j] = decay[t][j] * g;
      const float w = carry.at[j] * h[t][j];
      E[t] = fmaf(w, A.at[j], E[t]);
      dA.at[j] = fmaf(w, delta[t], dA.at[j]);
    }
  }
  shared.carry[strip][thread] = carry;
  shared.grad_A[strip][thread] = dA;
  store_sum(shared, strip, kS, lane, S);
  store_sum(shared, strip, kE, lane, E);
  store_sum(shared, strip, kY, lane, Y);
}

// What is constant over time gathers over time and not over channels.
__device__ __forceinline__ void gather_constant(Quad& to, float (&steps)[kSteps][4]) {
  Quad total = to;
#pragma unroll
  for (int t = 0; t < kSteps; ++t)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      total.at[j] += steps[t][j];
      steps[t][j] = 0;
    }
  to = total;
}

// All strips of a part: sums over states to scratch, dB and dC over this lane's channels.
template <bool kGeneral>
__device__ __forceinline__ void sweep(const Backward& a, int part, Shared<kGeneral>& shared, float (&dB)[kSteps][4],
                                      float (&dC)[kSteps][4]) {
  const StateLane lane;
  Quad B[kSteps];
#pragma unroll
  for (int t = 0; t < kSteps; ++t) B[t] = shared.coefficients[part * kSteps + t][lane.quad];
#pragma unroll
  for (int strip = 0; strip < kStrips; ++strip) {
    if constexpr (kGeneral)
      if (!a.problem.B.by_time)
        for (Quad& B_t : B) B_t = shared.B[strip][threadIdx.x];
    sweep_strip(a, part, strip, shared, B, dB, dC);
    if constexpr (kGeneral) {
      if (!a.problem.B.by_time) gather_constant(shared.grad_B[strip][threadIdx.x], dB);
      if (!a.problem.C.by_time) gather_constant(shared.grad_C[strip][threadIdx.x], dC);
    }
  }
}

// ------------------------------------------------------------------------------------------------ dB and dC
// dB and dC of this lane's channels, to be added up by the whole block.
template <bool kGeneral>
__device__ __forceinline__ void store_copies(Shared<kGeneral>& shared, const float (&dB)[kSteps][4],
                                             const float (&dC)[kSteps][4]) {
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    shared.scratch[dB_row(t)][threadIdx.x] = Quad{{dB[t][0], dB[t][1], dB[t][2], dB[t][3]}};
    shared.scratch[dC_row(t)][threadIdx.x] = Quad{{dC[t][0], dC[t][1], dC[t][2], dC[t][3]}};
  }
}
// A lane adds up a quad of dB or dC of a step over every other channel lane, then the two halves meet.
template <bool kGeneral>
__device__ __forceinline__ void add_copies(const Backward& a, const Tile& tile, int part,
                                           const Shared<kGeneral>& shared) {
  static_assert(kThreads == kSteps * 2 * 2 * 4);
  const unsigned thread = hidden(threadIdx.x);
  const int row = thread / 8, t = row % kSteps, half = thread / 4 % 2, quad = thread % 4;
  Quad total;
#pragma unroll
  for (int channel = 0; channel < kStrip; channel += 2)
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      const Quad& copy = shared.scratch[dB_row(0) + row][warp * 32 + (channel + half) * 4 + quad];
      if (channel + warp == 0)
        total = copy;
      else
        add(total, copy);
    }
#pragma unroll
  for (float& x : total.at) x += __shfl_xor_sync(0xffffffffu, x, 4);
  if (half == 1 || part * kSteps + t >= tile.steps) return;
  // token_of() in 32 bits, enough where a token takes 128 bytes.
  const unsigned first = batch_of(a.problem, tile) * static_cast<unsigned>(a.problem.length) + tile.begin;
  const unsigned token = first + part * kSteps + t;
  reinterpret_cast<Quad*>(a.coefficients)[(blockIdx.x * a.tokens + token) * 8 + row / kSteps * 4 + quad] = total;
}

}  // namespace
