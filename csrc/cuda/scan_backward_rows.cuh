// SPDX-License-Identifier: Apache-2.0
//
// The scan's backward pass, first half: what a block keeps in shared memory, who owns what, and the two phases that go
// by rows of memory: prepare() before, finish() after the recurrence of scan_backward.cuh.
#pragma once
#include "cuda/scan.cuh"

namespace {

constexpr int kTile = kCheckpointSteps;
constexpr int kTileQuads = kTile / 4;
constexpr int kSteps = 8, kParts = kTile / kSteps;  // steps in registers; such parts of a tile
constexpr int kStrip = 8, kStrips = 2;              // channels of a strip (x 4 quads = a warp); strips of a warp
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kWarpChannels = kStrips * kStrip, kChannels = kWarps * kWarpChannels;
constexpr int kStates = 16;  // a launch; more states are more launches

struct alignas(16) Quad {
  float at[4];
};

// What a launch works on besides the problem itself: states [first_state, first_state + 16) of the model.
struct Backward {
  Problem<float> problem;
  float* checkpoints;  // read only
  const float* grad_final_state;
  Rows grad_out, grad_u, grad_delta, grad_z;
  float* grad_initial_state;
  int first_state, segments, group_blocks;
  int64_t tokens;       // batch * length
  float* through;       // S, E, Y of the states before first_state: [3][token][dim]; only for more than kStates
  float* coefficients;  // partials of dB and dC: [block][token][dB 16 | dC 16]; null if both are constant
  float* parameters;    // partials of dA (and dB, dC constant over time), dD, d delta_bias: see Parameters
};

// Where one segment's partials of the parameters' gradients lie, in floats; B and C: those constant over time.
struct Parameters {
  int64_t dim, A, B, C, D, delta_bias, size;
  __host__ __device__ Parameters(int64_t dim, bool general) : dim(dim), A(0) {
    B = dim * kStates, C = B + (general ? dim * kStates : 0), D = C + (general ? dim * kStates : 0);
    delta_bias = D + dim, size = (D + 2 * dim + 3) / 4 * 4;  // 16 bytes
  }
};

// ------------------------------------------------------------------------------------------------ shared memory
// Per (step, channel). kSlope: softplus'. kGate: grad_out silu'(z).
enum StepField { kDelta, kDeltaU, kGradY, kU, kSlope, kGate, kStepFields };
enum Sum { kS, kE, kY, kSums };

template <bool kGeneral>
struct Constants {};
template <>
struct Constants<true> {
  Quad B[kStrips][kThreads], C[kStrips][kThreads], grad_B[kStrips][kThreads], grad_C[kStrips][kThreads];
};

// 113 KiB: two blocks fill an SM of Hopper to the byte.
template <bool kGeneral>
struct Shared : Constants<kGeneral> {
  // Of a thread as lane of sweep(). A is times log2(e): decays are powers of two.
  Quad A[kStrips][kThreads], carry[kStrips][kThreads], grad_A[kStrips][kThreads];
  Quad state[kParts][kStrips][kThreads];  // before each part of the tile
  // [channel][field][step / 4]. A last quad makes the pitch 4 mod 32 banks; it has dD and d delta_bias of both halves.
  Quad step[kChannels][kStepFields * kTileQuads + 1];
  Quad scratch[kWarps][kSteps * 8 * kStrip];  // sums over states, then copies of dB and dC
  Quad coefficients[kTile][8];                // of a step: B as 4 quads, C as 4 quads
};
static_assert(sizeof(Shared<false>) == 113 * 1024);

// In scratch, conflict-free for the lanes of sweep() and of finish() resp. add_copies().
__device__ __forceinline__ int sum_at(Sum sum, int half, int quad, int channel) {
  return ((sum * 2 + half) * 4 + quad) * kWarpChannels + channel;
}
__device__ __forceinline__ int copy_at(int step, int quad, int channel) {
  return (step * 8 + quad) * kStrip + (channel ^ quad);
}

__device__ __forceinline__ void add(Quad& to, const Quad& x) {
#pragma unroll
  for (int i = 0; i < 4; ++i) to.at[i] += x.at[i];
}

// ------------------------------------------------------------------------------------------------ who does what
// The channels of a block: [first, first + count) of the model, all of one group, blockIdx.x / group_blocks.
struct Channels {
  int first, count;
};
__device__ __forceinline__ Channels channels_of(const Backward& a, int block) {
  const int group = block / a.group_blocks, offset = block % a.group_blocks * kChannels;
  const int left = a.problem.group_dim - offset;
  return {group * a.problem.group_dim + offset, left < kChannels ? left : kChannels};
}
// A lane of replay() and sweep(): one channel of each strip, one quad of states.
struct StateLane {
  int warp, channel, quad;
  __device__ StateLane() : warp(threadIdx.x / 32), channel(threadIdx.x % kStrip), quad(threadIdx.x % 32 / kStrip) {}
  __device__ int in_block(int strip) const { return warp * kWarpChannels + strip * kStrip + channel; }
};
// A lane of prepare() and finish(): one channel, half of the steps.
struct RowLane {
  int warp, channel, half;
  __device__ RowLane()
      : warp(threadIdx.x / 32), channel(threadIdx.x % kWarpChannels), half(threadIdx.x % 32 / kWarpChannels) {}
  __device__ int in_block() const { return warp * kWarpChannels + channel; }
};
// Steps [begin, begin + steps) of a sequence's batch entry, steps <= kTile. Three integers, for it lives through the
// loop that needs all 255 registers; what rows and sums want is derived where they want it.
struct Tile {
  int sequence, begin, steps;
};
// As much of a Sequence as rows need, `step` steps into the tile.
__device__ __forceinline__ Sequence from(const Problem<float>& p, const Tile& tile, int step) {
  return {0, p.cu_seqlens ? 0 : tile.sequence, tile.begin + step, 0, 0};
}
// The place of a step of a tile among all (batch, length).
__device__ __forceinline__ int64_t token_of(const Problem<float>& p, const Tile& tile, int step) {
  return (p.cu_seqlens ? 0 : tile.sequence) * p.length + tile.begin + step;
}

// Values of (dim, state) arrays for one lane's states, zero outside the model; and the way back.
__device__ __forceinline__ Quad load_states(const Backward& a, const float* rows, int64_t channel, int quad,
                                            bool inside) {
  Quad q = {};
  const int n = a.first_state + quad * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (rows && inside && n + i < a.problem.state) q.at[i] = rows[channel * a.problem.state + n + i];
  return q;
}
__device__ __forceinline__ void store_states(const Backward& a, float* rows, int64_t channel, int quad, const Quad& q) {
  const int n = a.first_state + quad * 4;
  for (int i = 0; i < 4; ++i)
    if (n + i < a.problem.state) rows[channel * a.problem.state + n + i] = q.at[i];
}

// ------------------------------------------------------------------------------------------------ rows
// kCount quads of rows of a channel, zero beyond the first `left`; and the way back.
template <class S, int kCount>
__device__ __forceinline__ void load_rows(const Rows& t, const Sequence& from, int channel, int left,
                                          Quad (&to)[kCount]) {
  const S* at = row<const S>(t, from, 0) + channel;
#pragma unroll
  for (int r = 0; r < 4 * kCount; ++r, at += t.step) to[r / 4].at[r % 4] = r < left ? read(*at) : 0.f;
}
template <class S>
__device__ __forceinline__ void store_rows(const Rows& t, const Sequence& from, int channel, int left, const Quad& q) {
  S* at = row<S>(t, from, 0) + channel;
#pragma unroll
  for (int r = 0; r < 4; ++r, at += t.step)
    if (r < left) *at = rounded<S>(q.at[r]);
}

// With a row_index: the sums over each step's rows to a field of the tile; and a field to each step's rows. Lanes read
// and write what they own, one row at a time: a row_index costs latency here, but no instructions where there is none.
template <class S>
__device__ __forceinline__ void gather_rows(const Problem<float>& p, const Rows& t, const Tile& tile, int begin,
                                            int end, int channel, Quad* field) {
#pragma unroll 1
  for (int i = begin; i < end; ++i) {
    float total = 0;
    if (i < tile.steps) {
      const int32_t* numbers = row_numbers(p, from(p, tile, i), 0);
#pragma unroll 1
      for (int k = 0; k < p.rows_per_step; ++k)
        total += read(row<const S>(t, static_cast<int64_t>(numbers[k]))[channel]);
    }
    field[i / 4].at[i % 4] = total;
  }
}
template <class S>
__device__ __forceinline__ void scatter_rows(const Problem<float>& p, const Rows& t, const Tile& tile, int begin,
                                             int channel, const Quad* field) {
#pragma unroll 1
  for (int i = begin; i < begin + 4 && i < tile.steps; ++i) {
    const S out = rounded<S>(field[i / 4].at[i % 4]);
    const int32_t* numbers = row_numbers(p, from(p, tile, i), 0);
#pragma unroll 1
    for (int k = 0; k < p.rows_per_step; ++k) row<S>(t, static_cast<int64_t>(numbers[k]))[channel] = out;
  }
}

// Everything that depends on (step, channel) only. Beyond the tile's end and the model's channels all fields are zero,
// which leaves states, carries and sums as they are.
template <class S, class G, bool kGeneral>
__device__ __forceinline__ void prepare(const Backward& a, const Channels& c, const Tile& tile,
                                        Shared<kGeneral>& shared) {
  const Problem<float>& p = a.problem;
  const RowLane lane;
  constexpr int kQuads = 2;  // of steps at a time: 32 loads under way
  const bool inside = lane.in_block() < c.count;
  const int channel = c.first + lane.in_block(), begin = lane.half * (kTile / 2), end = begin + kTile / 2;
  const float bias = inside && p.delta_bias ? p.delta_bias[channel] : 0.f;
  Quad* const fields = shared.step[lane.in_block()];
  if (p.row_index && inside) {
    gather_rows<G>(p, a.grad_out, tile, begin, end, channel, fields + kGradY * kTileQuads);
    if (p.z.data) gather_rows<S>(p, p.z, tile, begin, end, channel, fields + kGate * kTileQuads);
  }
#pragma unroll 1
  for (int i = begin; i < end; i += 4 * kQuads) {
    Quad* const to = fields + i / 4;
    const int left = inside ? tile.steps - i : 0;
    Quad u[kQuads], delta[kQuads], dy[kQuads], z[kQuads];
    load_rows<S>(p.u, from(p, tile, i), channel, left, u);
    load_rows<S>(p.delta, from(p, tile, i), channel, left, delta);
    if (!p.row_index) {
      load_rows<G>(a.grad_out, from(p, tile, i), channel, left, dy);
      if (p.z.data) load_rows<S>(p.z, from(p, tile, i), channel, left, z);
    } else {
#pragma unroll
      for (int k = 0; k < kQuads; ++k) dy[k] = to[kGradY * kTileQuads + k], z[k] = to[kGate * kTileQuads + k];
    }
#pragma unroll
    for (int k = 0; k < kQuads; ++k) {
      Quad delta_u, slope, gate;
      if (p.z.data) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          const float sigma = sigmoid(z[k].at[r]), silu = z[k].at[r] * sigma;
          gate.at[r] = dy[k].at[r] * fmaf(silu, 1.f - sigma, sigma);  // silu' = sigma (1 + z (1 - sigma))
          dy[k].at[r] *= silu;
        }
        to[kGate * kTileQuads + k] = gate;
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) delta[k].at[r] += bias, slope.at[r] = 1;
      if (p.softplus) {
#pragma unroll
        for (int r = 0; r < 4; ++r) slope.at[r] = sigmoid(delta[k].at[r]), delta[k].at[r] = softplus(delta[k].at[r]);
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        if (k * 4 + r >= left) dy[k].at[r] = delta[k].at[r] = slope.at[r] = 0;
        delta_u.at[r] = delta[k].at[r] * u[k].at[r];
      }
      to[kDelta * kTileQuads + k] = delta[k];
      to[kDeltaU * kTileQuads + k] = delta_u;
      to[kGradY * kTileQuads + k] = dy[k];
      to[kU * kTileQuads + k] = u[k];
      to[kSlope * kTileQuads + k] = slope;
    }
  }
}

// ------------------------------------------------------------------------------------------------ results
// The sum over the four quads of states.
__device__ __forceinline__ Quad add_quads(const Quad* scratch, Sum sum, const RowLane& lane) {
  Quad total = scratch[sum_at(sum, lane.half, 0, lane.channel)];
#pragma unroll
  for (int quad = 1; quad < 4; ++quad) add(total, scratch[sum_at(sum, lane.half, quad, lane.channel)]);
  return total;
}
// More than 16 states: adds what earlier launches found for a sum over states, and keeps the result for the next.
__device__ __forceinline__ void add_earlier(const Backward& a, Sum sum, int64_t token, int channel, int left,
                                            Quad& total) {
  float* at = a.through + (sum * a.tokens + token) * a.problem.dim + channel;
#pragma unroll
  for (int r = 0; r < 4; ++r, at += a.problem.dim) {
    if (r >= left) break;
    if (a.first_state > 0) total.at[r] += *at;
    *at = total.at[r];
  }
}

template <class S, bool kGeneral>
__device__ __forceinline__ void finish(const Backward& a, const Channels& c, const Tile& tile, int part,
                                       Shared<kGeneral>& shared) {
  const Problem<float>& p = a.problem;
  const RowLane lane;
  if (lane.in_block() >= c.count) return;
  const int channel = c.first + lane.in_block(), begin = part * kSteps + lane.half * 4, left = tile.steps - begin;
  const Quad* scratch = shared.scratch[lane.warp];
  Quad S_t = add_quads(scratch, kS, lane), E = add_quads(scratch, kE, lane), Y = {};
  if (p.z.data) Y = add_quads(scratch, kY, lane);
  if constexpr (kGeneral) {
    if (a.through) {
      const int64_t token = token_of(p, tile, begin);
      add_earlier(a, kS, token, channel, left, S_t);
      add_earlier(a, kE, token, channel, left, E);
      add_earlier(a, kY, token, channel, left, Y);
    }
    if (a.first_state + kStates < p.state) return;
  }
  Quad* const fields = shared.step[lane.in_block()];
  const auto field = [&](StepField f) { return fields[f * kTileQuads + begin / 4]; };
  const Quad dy = field(kGradY), u = field(kU);
  const float D = p.D ? p.D[channel] : 0.f;
  if (p.z.data) {
    Quad dz = field(kGate);
#pragma unroll
    for (int r = 0; r < 4; ++r) dz.at[r] *= fmaf(D, u.at[r], Y.at[r]);
    if (p.row_index) {
      fields[kGate * kTileQuads + begin / 4] = dz;
      scatter_rows<S>(p, a.grad_z, tile, begin, channel, fields + kGate * kTileQuads);
    } else {
      store_rows<S>(a.grad_z, from(p, tile, begin), channel, left, dz);
    }
  }
  const Quad delta = field(kDelta), slope = field(kSlope);
  Quad du, ddelta;
  float dD = 0, dbias = 0;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    du.at[r] = fmaf(D, dy.at[r], delta.at[r] * S_t.at[r]);
    ddelta.at[r] = fmaf(u.at[r], S_t.at[r], E.at[r] * 0.693147180559945309f) * slope.at[r];  // ln 2: A has log2(e)
    dD = fmaf(dy.at[r], u.at[r], dD);
    dbias += ddelta.at[r];
  }
  store_rows<S>(a.grad_u, from(p, tile, begin), channel, left, du);
  store_rows<S>(a.grad_delta, from(p, tile, begin), channel, left, ddelta);
  Quad& gathered = fields[kStepFields * kTileQuads];
  gathered.at[lane.half] += dD;
  gathered.at[2 + lane.half] += dbias;
}

}  // namespace
