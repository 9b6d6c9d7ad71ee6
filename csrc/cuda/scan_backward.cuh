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
// A block owns kChannels channels of one group and one sequence after the other, tile by tile from the last. Five roles
// alternate, all within a warp, which owns kStrips strips of 8 channels:
//   prepare     lane = (4 channels, 4 steps): rows from memory, softplus and SiLU of a tile, once, to shared memory
//   replay      lane = (channel of a strip, quad of states): from the tile's checkpoint to the states at every 8 steps
//   sweep       the same lanes: 8 steps forth and back in registers, strip by strip, while dB and dC of these 8 steps
//               stay in registers, so that they cost one instruction each, not an exchange between lanes
//   finish      lane = (channel, half of the 8 steps): sums over the four quads; du, ddelta, dz to shared memory
//   write_rows  lane = (4 channels, 4 steps): these gradients to memory
// and once per 8 steps the 32 (warp, channel lane) copies of dB and dC are added in a fixed order: one partial per
// block. No atomics; nothing depends on how the GPU schedules blocks.
//
// Issue slots bind, then shared memory; tests/gates holds both the 8 steps and all of it to a budget per element.
#pragma once
#include "cuda/scan_backward_rows.cuh"
#include "cuda/scan_backward_sweep.cuh"

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
  if (threadIdx.x < kChannels) {
    const bool inside = threadIdx.x < c.count;
    Quad of_channel = {};
    if (inside && p.D) of_channel.at[kD] = p.D[c.first + threadIdx.x];
    if (inside && p.delta_bias) of_channel.at[kBias] = p.delta_bias[c.first + threadIdx.x];
    shared.step[threadIdx.x][kStepFields * kTileQuads] = of_channel;
  }
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
    const Quad& of_channel = shared.step[threadIdx.x][kStepFields * kTileQuads];
    out[at.D + c.first + threadIdx.x] = of_channel.at[kGradD];
    out[at.delta_bias + c.first + threadIdx.x] = of_channel.at[kGradBias];
  }
}

// ------------------------------------------------------------------------------------------------ a tile
// B and C of the tile, widened, zero outside the model: kCount values a thread and turn.
template <class S, int kCount, bool kGeneral>
__device__ __forceinline__ void load_coefficients(const Backward& a, const Tile& tile, Shared<kGeneral>& shared) {
  const Problem<float>& p = a.problem;
  constexpr int kColumns = 2 * kStates / kCount, kRows = kThreads / kColumns;
  const unsigned thread = hidden(threadIdx.x);
  const int column = thread % kColumns * kCount, n = a.first_state + column % kStates, first = thread / kColumns;
  const int group = p.groups > 1 ? blockIdx.x / a.group_blocks : 0;
  const Coefficient& source = column < kStates ? p.B : p.C;
  const int steps = source.by_time && n < p.state ? tile.steps : 0;
  const RowPointers<const S> rows(static_cast<S*>(source.data) + group * source.group, source.batch, source.step,
                                  batch_of(p, tile), tile.begin + first, n);
#pragma unroll
  for (int i = 0; i < kTile; i += kRows) {
    float values[kCount] = {};
    if (first + i < steps)
      load_pack(kCount > 1 ? rows[i] : row<S>(source, from(p, tile, first + i), 0, group) + n, values);
    store_pack(shared.coefficients[first + i][0].at + column, values);
  }
}

template <bool kGeneral>
__device__ __forceinline__ void backward_part(const Backward& a, const Channels& c, const Tile& tile, int part,
                                              Shared<kGeneral>& shared) {
  float dB[kSteps][4], dC[kSteps][4];
  sweep(a, part, shared, dB, dC);
  __syncwarp();
  finish(a, c, tile, part, shared);
  if constexpr (kGeneral)
    if (!a.coefficients) return __syncthreads();  // nothing varies with time
  __syncwarp();
  store_copies(shared, dB, dC);
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
  start_block(a, c, shared);
  __syncthreads();  // prepare() reads parameters that other threads fetched
#pragma unroll 1
  for (int i = static_cast<int>(blockIdx.y); i < p.sequences; i += a.segments) {
#pragma unroll 1
    for (int strip = 0; strip < kStrips; ++strip) {
      const StateLane lane(hidden(threadIdx.x));
      const int channel = lane.in_block(strip);
      shared.carry[strip][threadIdx.x] = load_states(
          a, a.grad_final_state, static_cast<int64_t>(i) * p.dim + c.first + channel, lane.quad, channel < c.count);
    }
    const Sequence whole = sequence_of(p, i);
    const int last = static_cast<int>((whole.length + kTile - 1) / kTile * kTile) - kTile;
    Tile tile{i, static_cast<int>(whole.begin) + last, static_cast<int>(whole.length) - last};
#pragma unroll 1
    for (; true; tile.begin -= kTile, tile.steps = kTile) {
      const int slot = slot_of(p, tile);
      if (slot < 0) break;
      if (a.coefficients_aligned)
        load_coefficients<S, 16 / sizeof(S)>(a, tile, shared);
      else
        load_coefficients<S, 1>(a, tile, shared);
      prepare<S, G>(a, c, tile, shared);
      __syncthreads();
      int part = (tile.steps + kSteps - 1) / kSteps;
      replay(a, c, slot, part, shared);
#pragma unroll 1
      while (part-- > 0) backward_part(a, c, tile, part, shared);
      if (!kGeneral || a.first_state + kStates >= p.state) write_rows<S>(a, c, tile, shared);
    }
#pragma unroll 1
    for (int strip = 0; strip < kStrips && a.grad_initial_state; ++strip) {
      const StateLane lane(hidden(threadIdx.x));
      const int channel = lane.in_block(strip);
      if (channel < c.count)
        store_states(a, a.grad_initial_state,
                     static_cast<int64_t>(i) * static_cast<int>(hidden(p.dim)) + c.first + channel, lane.quad,
                     shared.carry[strip][threadIdx.x]);
    }
  }
  // Other threads wrote the dD and d delta_bias that end_block() reads, before the last barrier of their last tile.
  end_block(a, c, shared);
}

}  // namespace
