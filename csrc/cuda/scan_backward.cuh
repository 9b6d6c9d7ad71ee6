// SPDX-License-Identifier: Apache-2.0
//
// The kernel of the selective scan's backward pass. With g_t the gradient of h_t, going back in time:
//
//   g_t = C_t dy_t + carry_t;   carry_{t-1} = a_t g_t;   w_t = carry_{t-1} h_{t-1}
//   dC_t += dy_t h_t;   dB_t += g_t delta_t u_t           sums over channels
//   S_t = g_t . B_t;   E_t = w_t . A;   Y_t = h_t . C_t    sums over states
//   du_t = delta_t S_t + D dy_t;   ddelta_t = (u_t S_t + E_t) softplus';   dz_t = (Y_t + D u_t) dout_t silu'
//   dA += w_t delta_t
//
// A block owns kChannels channels of one group and one sequence after the other, tile by tile from the last. Four roles
// alternate, all but the last within a warp, which owns kStrips strips of 8 channels:
//   prepare   lane = (channel, half of the steps): rows from memory, softplus and SiLU of a tile, once, to shared
//   memory replay    lane = (channel of a strip, quad of states): from the tile's checkpoint to the states at every 8
//   steps sweep     the same lanes: 8 steps forward and back in registers, strip by strip, while dB and dC of these 8
//   steps stay
//             in registers, so that they cost one instruction each, not an exchange between lanes
//   finish    lane = (channel, half of the 8 steps): sums over the four quads; du, ddelta, dz to memory
// and once per 8 steps the 32 (warp, channel lane) copies of dB and dC are added in a fixed order: one partial per
// block. No atomics; nothing depends on how the GPU schedules blocks.
#pragma once
#include "cuda/scan_backward_rows.cuh"

namespace {

// ------------------------------------------------------------------------------------------------ start and end
template <bool kGeneral>
__device__ void start_block(const Backward& a, const Channels& c, Shared<kGeneral>& shared) {
  const Problem<float>& p = a.problem;
  const StateLane lane;
  for (int strip = 0; strip < kStrips; ++strip) {
    const int i = lane.in_block(strip), t = threadIdx.x;
    const bool inside = i < c.count;
    Quad A = load_states(a, p.A, c.first + i, lane.quad, inside);
    for (float& x : A.at) x *= static_cast<float>(kLog2E);
    shared.A[strip][t] = A;
    shared.grad_A[strip][t] = Quad{};
    if constexpr (kGeneral) {
      shared.B[strip][t] =
          load_states(a, p.B.by_time ? nullptr : static_cast<float*>(p.B.data), c.first + i, lane.quad, inside);
      shared.C[strip][t] =
          load_states(a, p.C.by_time ? nullptr : static_cast<float*>(p.C.data), c.first + i, lane.quad, inside);
      shared.grad_B[strip][t] = shared.grad_C[strip][t] = Quad{};
    }
  }
  if (threadIdx.x < kChannels) shared.step[threadIdx.x][kStepFields * kTileQuads] = Quad{};
}

template <bool kGeneral>
__device__ void end_block(const Backward& a, const Channels& c, const Shared<kGeneral>& shared) {
  const Parameters at(a.problem.dim, kGeneral);
  float* const out = a.parameters + blockIdx.y * at.size;
  const StateLane lane;
  for (int strip = 0; strip < kStrips; ++strip) {
    const int i = lane.in_block(strip), t = threadIdx.x;
    if (i >= c.count) continue;
    const int64_t to = (c.first + i) * kStates + lane.quad * 4;
    *reinterpret_cast<Quad*>(out + at.A + to) = shared.grad_A[strip][t];
    if constexpr (kGeneral) {
      *reinterpret_cast<Quad*>(out + at.B + to) = shared.grad_B[strip][t];
      *reinterpret_cast<Quad*>(out + at.C + to) = shared.grad_C[strip][t];
    }
  }
  if (threadIdx.x < c.count) {
    const Quad& q = shared.step[threadIdx.x][kStepFields * kTileQuads];
    out[at.D + c.first + threadIdx.x] = q.at[0] + q.at[1];
    out[at.delta_bias + c.first + threadIdx.x] = q.at[2] + q.at[3];
  }
}

// ------------------------------------------------------------------------------------------------ a tile
// B and C of the tile, widened, zero outside the model.
template <class S, bool kGeneral>
__device__ __forceinline__ void load_coefficients(const Backward& a, const Tile& tile, Shared<kGeneral>& shared) {
  const Problem<float>& p = a.problem;
  const int n = threadIdx.x % kStates, is_C = threadIdx.x / kStates % 2;
  const Coefficient& source = is_C ? p.C : p.B;
  const int first = threadIdx.x / (2 * kStates), steps = a.first_state + n < p.state && source.by_time ? tile.steps : 0;
  const S* at = row<S>(source, from(p, tile, first), 0, blockIdx.x / a.group_blocks) + a.first_state + n;
#pragma unroll
  for (int i = 0; i < kTile; i += kWarps, at += kWarps * source.step)
    shared.coefficients[first + i][is_C * 4 + n / 4].at[n % 4] = first + i < steps ? read(*at) : 0.f;
}

// A field of the 8 steps of a part.
__device__ __forceinline__ void load_field(const Quad* fields, StepField field, int part, float (&to)[kSteps]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Quad q = fields[field * kTileQuads + part * 2 + i];
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
      load_field(shared.step[lane.in_block(strip)], kDelta, part, delta[strip]);
      load_field(shared.step[lane.in_block(strip)], kDeltaU, part, delta_u[strip]);
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
__device__ __forceinline__ void store_sum(Quad* scratch, Sum sum, const StateLane& lane, int strip,
                                          const float (&v)[kSteps]) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
    scratch[sum_at(sum, half, lane.quad, strip * kStrip + lane.channel)] =
        Quad{{v[half * 4], v[half * 4 + 1], v[half * 4 + 2], v[half * 4 + 3]}};
}

// One strip. B and C are read again where they are needed: in registers they would cost 32 each, and there are 255.
template <bool kGeneral>
__device__ __forceinline__ void sweep_strip(const Backward& a, int part, int strip, Shared<kGeneral>& shared,
                                            float (&dB)[kSteps][4], float (&dC)[kSteps][4]) {
  const StateLane lane;
  const int thread = threadIdx.x;
  Quad* const scratch = shared.scratch[lane.warp];
  const Quad A = shared.A[strip][thread];
  const Quad* fields = shared.step[lane.in_block(strip)];
  float delta[kSteps], delta_u[kSteps], dy[kSteps], decay[kSteps][4], h[kSteps + 1][4];
  load_field(fields, kDelta, part, delta);
  load_field(fields, kDeltaU, part, delta_u);
  load_field(fields, kGradY, part, dy);
  {
    const Quad first = shared.state[part][strip][thread];
#pragma unroll
    for (int j = 0; j < 4; ++j) h[0][j] = first.at[j];
  }
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    const Quad B = B_at(a, shared, part * kSteps + t, lane.quad, strip);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      decay[t][j] = exp2_fast(delta[t] * A.at[j]);
      h[t + 1][j] = fmaf(decay[t][j], h[t][j], delta_u[t] * B.at[j]);
    }
  }
  if (a.problem.z.data) {
    float Y[kSteps];
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
      const Quad C = C_at(a, shared, part * kSteps + t, lane.quad, strip);
      Y[t] = 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) Y[t] = fmaf(h[t + 1][j], C.at[j], Y[t]);
    }
    store_sum(scratch, kY, lane, strip, Y);
  }

  Quad carry = shared.carry[strip][thread], dA = shared.grad_A[strip][thread];
  float S[kSteps], E[kSteps];
#pragma unroll
  for (int t = kSteps - 1; t >= 0; --t) {
    const Quad C = C_at(a, shared, part * kSteps + t, lane.quad, strip);
    const Quad B = B_at(a, shared, part * kSteps + t, lane.quad, strip);
    S[t] = E[t] = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float g = fmaf(dy[t], C.at[j], carry.at[j]);
      dC[t][j] = fmaf(dy[t], h[t + 1][j], dC[t][j]);
      dB[t][j] = fmaf(g, delta_u[t], dB[t][j]);
      S[t] = fmaf(g, B.at[j], S[t]);
      carry.at[j] = decay[t][j] * g;
      const float w = carry.at[j] * h[t][j];
      E[t] = fmaf(w, A.at[j], E[t]);
      dA.at[j] = fmaf(w, delta[t], dA.at[j]);
    }
  }
  shared.carry[strip][thread] = carry;
  shared.grad_A[strip][thread] = dA;
  store_sum(scratch, kS, lane, strip, S);
  store_sum(scratch, kE, lane, strip, E);
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

// dB and dC of this lane's channels, to be added up by the whole block.
__device__ __forceinline__ void store_copies(Quad* scratch, const StateLane& lane, const float (&dB)[kSteps][4],
                                             const float (&dC)[kSteps][4]) {
#pragma unroll
  for (int t = 0; t < kSteps; ++t) {
    scratch[copy_at(t, lane.quad, lane.channel)] = Quad{{dB[t][0], dB[t][1], dB[t][2], dB[t][3]}};
    scratch[copy_at(t, 4 + lane.quad, lane.channel)] = Quad{{dC[t][0], dC[t][1], dC[t][2], dC[t][3]}};
  }
}
template <bool kGeneral>
__device__ __forceinline__ void add_copies(const Backward& a, const Tile& tile, int part,
                                           const Shared<kGeneral>& shared) {
  static_assert(kThreads == kSteps * 16);  // two of a step's 32 values each
  const int t = threadIdx.x / 16, quad = threadIdx.x % 16 / 2, pair = threadIdx.x % 2 * 2;
  float total[2] = {};
#pragma unroll
  for (int channel = 0; channel < kStrip; ++channel)
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) {
      float more[2];
      load_pack(shared.scratch[warp][copy_at(t, quad, channel)].at + pair, more);
      total[0] += more[0], total[1] += more[1];
    }
  if (part * kSteps + t >= tile.steps) return;
  const int64_t token = token_of(a.problem, tile, part * kSteps + t);
  store_pack(a.coefficients + (blockIdx.x * a.tokens + token) * (2 * kStates) + quad * 4 + pair, total);
}

template <class S, bool kGeneral>
__device__ __forceinline__ void backward_part(const Backward& a, const Channels& c, const Tile& tile, int part,
                                              Shared<kGeneral>& shared) {
  const StateLane lane;
  float dB[kSteps][4] = {}, dC[kSteps][4] = {};
#pragma unroll 1
  for (int strip = 0; strip < kStrips; ++strip) {
    sweep_strip(a, part, strip, shared, dB, dC);
    if constexpr (kGeneral) {
      if (!a.problem.B.by_time) gather_constant(shared.grad_B[strip][threadIdx.x], dB);
      if (!a.problem.C.by_time) gather_constant(shared.grad_C[strip][threadIdx.x], dC);
    }
  }
  __syncwarp();
  finish<S>(a, c, tile, part, shared);
  if constexpr (kGeneral)
    if (!a.coefficients) return __syncthreads();  // nothing varies with time
  __syncwarp();
  store_copies(shared.scratch[lane.warp], lane, dB, dC);
  __syncthreads();
  add_copies(a, tile, part, shared);
  __syncthreads();
}

// S: storage of u, delta, z, B, C; G: of grad_out. kGeneral: B or C constant over time, or more than 16 states.
// Grid: (blocks of channels, segments of sequences).
template <class S, class G, bool kGeneral>
__global__ void __launch_bounds__(kThreads, kGeneral ? 1 : 2) scan_backward(const Backward a) {
  ROM_DYNAMIC_SHARED(Shared<kGeneral>, memory);
  Shared<kGeneral>& shared = *memory;
  const Problem<float>& p = a.problem;
  const Channels c = channels_of(a, static_cast<int>(blockIdx.x));
  const StateLane lane;
  start_block(a, c, shared);
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.y); i < p.sequences; i += a.segments) {
#pragma unroll 1
    for (int strip = 0; strip < kStrips; ++strip) {
      const int channel = lane.in_block(strip);
      shared.carry[strip][threadIdx.x] = load_states(
          a, a.grad_final_state, static_cast<int64_t>(i) * p.dim + c.first + channel, lane.quad, channel < c.count);
    }
    const Sequence whole = sequence_of(p, i);
    const int last = static_cast<int>((whole.length + kTile - 1) / kTile * kTile) - kTile;
    Tile tile{i, static_cast<int>(whole.begin) + last, static_cast<int>(whole.length) - last};
#pragma unroll 1
    for (; true; tile.begin -= kTile, tile.steps = kTile) {
      const Sequence s = sequence_of(p, tile.sequence);
      if (tile.begin < s.begin) break;
      load_coefficients<S>(a, tile, shared);
      prepare<S, G>(a, c, tile, shared);
      __syncthreads();
      int part = (tile.steps + kSteps - 1) / kSteps;
      replay(a, c, s.slot + (tile.begin - s.begin) / kTile, part, shared);
#pragma unroll 1
      while (part-- > 0) backward_part<S>(a, c, tile, part, shared);
    }
    i = tile.sequence;
#pragma unroll 1
    for (int strip = 0; strip < kStrips && a.grad_initial_state; ++strip) {
      const int channel = lane.in_block(strip);
      if (channel < c.count)
        store_states(a, a.grad_initial_state, static_cast<int64_t>(i) * p.dim + c.first + channel, lane.quad,
                     shared.carry[strip][threadIdx.x]);
    }
  }
  // Other threads wrote the dD and d delta_bias that end_block() reads, before the last barrier of their last tile.
  end_block(a, c, shared);
}

}  // namespace
