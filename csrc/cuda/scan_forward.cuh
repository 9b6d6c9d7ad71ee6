// SPDX-License-Identifier: Apache-2.0
//
// Selective scan, forward: the kernel. Sequential in time with the states in registers: a block walks one sequence for
// a tile of channels, kLanes lanes per channel (the fewer, the fewer instructions; the more, the more warps), two
// channels per lane, so that every B and C read from shared memory serves two. Tiles of kSteps steps go through
//   copies   global to shared memory, asynchronous, one tile ahead; only B and C are shared between warps, so that one
//            barrier per tile is enough
//   prepare  delta and delta * u of a warp's own channels, every (step, channel) once
//   advance  the recurrence; each lane's part of y goes to shared memory
//   finish   the parts' sum in fixed order, D u, the gate, the stores
// The special functions and the issue slots bind, not memory: tests/gates holds the instructions per element to the
// budget.
#pragma once
#include "cuda/async.cuh"
#include "cuda/scan_forward_call.cuh"

namespace {

constexpr int kSteps = 16;  // of a tile; divides kCheckpointSteps
constexpr int kLaneChannels = 2;

// Storage type, lanes per channel, states per lane (their product is the padded state), warps of a block.
template <class S_, int kLanes_, int kLaneStates_, int kWarps_>
struct Shape {
  using S = S_;
  static constexpr int kLanes = kLanes_, kLaneStates = kLaneStates_, kWarps = kWarps_;
  static constexpr int kThreads = 32 * kWarps, kStates = kLanes * kLaneStates;
  static constexpr int kWarpChannels = 32 / kLanes * kLaneChannels, kChannels = kWarps * kWarpChannels;
  static constexpr int kVector = 16 / sizeof(S);    // elements per copy
  static constexpr int kPairs = kWarpChannels / 2;  // prepare and finish: lane = (row, pair of channels)
  static constexpr int kRowsAtOnce = 32 / kPairs;
  static constexpr int kRowTurns = kSteps / kRowsAtOnce;
  static constexpr int kRowUnroll = kRowTurns >= 8 ? 4 : kRowTurns >= 4 ? 2 : 1;
  // Of 16 exponentials, the share for the FMA pipe. 2 of 16 bring MUFU from 10 to 9 cycles per element and scheduler,
  // issue from 7.6 to 8.6. Four states per lane issue 8.8 without, so they would gain nothing.
  static constexpr int kPolynomials = kLaneStates >= 8 ? 2 : 0;
  static_assert(kWarpChannels >= kVector && kWarpChannels <= 64 && kSteps % kRowsAtOnce == 0);

  // Shared memory of a block. u, delta, z: [warp][step][channel]; coefficients: [step][B | C][state].
  struct Stage {
    alignas(16) S rows[3][kWarps][kSteps][kWarpChannels];
    alignas(16) S coefficients[kSteps][2 * kStates];
  };
  struct Shared {
    Stage stage[2];
    alignas(16) float coefficients[2][kSteps][2 * kStates];      // widened
    alignas(16) float2 delta_u[kWarps][kSteps][kWarpChannels];   // delta and delta * u
    alignas(16) float y[kWarps][kSteps][kLanes][kWarpChannels];  // parts
  };
  // As many blocks as an SM's shared memory holds: the registers are not to be fewer for the sake of more.
  static constexpr int kBlocks = 227 * 1024 / (sizeof(Shared) + 1024);
};

// The channels of a block: [first, end) of one group.
struct Channels {
  int group, first, end;
};
template <class T>
__device__ __forceinline__ Channels channels_of(const Problem<T>& p, int tile, int width) {
  const int tiles = (p.group_dim + width - 1) / width, group = tile / tiles;
  const int end = (group + 1) * p.group_dim, first = group * p.group_dim + tile % tiles * width;
  return {group, first, first + width < end ? first + width : end};
}

// ------------------------------------------------------------------------------------------------ copies
// Copies tile after tile to shared memory. A thread always copies the same columns of u, delta and z, kRowStride rows
// apart, and the same column of B or C. Rows past the end and states past the last are zeros; channels past the last
// keep what was there, and nobody uses them.
template <class K>
class Loader {
  using S = typename K::S;
  static constexpr int kColumns = K::kChannels / K::kVector, kRowStride = K::kThreads / kColumns;
  static constexpr int kChunks = 2 * K::kStates / K::kVector, kChunkStride = K::kThreads / kChunks;
  static_assert(K::kThreads % kColumns == 0 && K::kThreads % kChunks == 0);

  const Forward<float>& f_;
  const Sequence& s_;
  const Channels c_;
  const S *u_, *delta_, *z_, *coefficient_;  // at the thread's first row of the next tile
  int left_;                                 // steps from there to the end of the sequence

  static __device__ __forceinline__ int column() { return threadIdx.x % kColumns * K::kVector; }
  static __device__ __forceinline__ int first_row() { return threadIdx.x / kColumns; }
  static __device__ __forceinline__ int chunk() { return threadIdx.x % kChunks * K::kVector; }
  static __device__ __forceinline__ int chunk_row() { return threadIdx.x / kChunks; }
  static __device__ __forceinline__ bool is_C() { return chunk() >= K::kStates; }
  static __device__ __forceinline__ int first_state() { return chunk() % K::kStates; }
  __device__ __forceinline__ const Coefficient& coefficient() const { return is_C() ? f_.problem.C : f_.problem.B; }
  // z comes along unless several of its rows make one step.
  __device__ __forceinline__ bool stages_z() const {
    return f_.problem.z.data && f_.problem.rows_per_step == 1 && f_.out.data;
  }

 public:
  __device__ __forceinline__ Loader(const Forward<float>& f, const Sequence& s, const Channels& c)
      : f_(f), s_(s), c_(c), left_(static_cast<int>(s.length)) {
    const int channel = c.first + column();
    u_ = row<const S>(f.problem.u, s, first_row()) + channel;
    delta_ = row<const S>(f.problem.delta, s, first_row()) + channel;
    z_ = row<const S>(f.problem.z, s, first_row()) + channel;
    coefficient_ = row<S>(coefficient(), s, chunk_row(), c.group) + first_state();
  }
  __device__ __forceinline__ void next(typename K::Stage& to) {
    if (f_.aligned)
      copy_rows(to);
    else
      load_rows(to);
    if (f_.coefficients_aligned)
      copy_coefficients(to);
    else
      load_coefficients(to);
    async_commit();
    u_ += kSteps * f_.problem.u.step;
    delta_ += kSteps * f_.problem.delta.step;
    z_ += kSteps * f_.problem.z.step;
    coefficient_ += kSteps * coefficient().step;
    left_ -= kSteps;
  }
  // The coefficients that this thread copied, widened; its own copies need no barrier.
  static __device__ __forceinline__ void widen_coefficients(const typename K::Stage& from,
                                                            float (&to)[kSteps][2 * K::kStates]) {
#pragma unroll
    for (int t = chunk_row(); t < kSteps; t += kChunkStride)
#pragma unroll
      for (int v = 0; v < K::kVector; v += 4) {
        const float2 low = load_pair(&from.coefficients[t][chunk() + v]);
        const float2 high = load_pair(&from.coefficients[t][chunk() + v + 2]);
        *reinterpret_cast<float4*>(&to[t][chunk() + v]) = make_float4(low.x, low.y, high.x, high.y);
      }
  }

 private:
  __device__ __forceinline__ void copy_rows(typename K::Stage& to) {
    const Problem<float>& p = f_.problem;
    if (c_.first + column() >= c_.end) return;
    const int warp = column() / K::kWarpChannels, channel = column() % K::kWarpChannels;
#pragma unroll
    for (int i = 0; i < kSteps; i += kRowStride) {
      const int t = first_row() + i;
      if (kSteps % kRowStride != 0 && t >= kSteps) break;
      const bool wanted = t < left_;
      async_copy16(&to.rows[0][warp][t][channel], u_ + i * p.u.step, wanted);
      async_copy16(&to.rows[1][warp][t][channel], delta_ + i * p.delta.step, wanted);
      if (!stages_z()) continue;
      const S* z = z_ + i * p.z.step;
      if (p.row_index && wanted) z = indexed_z(t) + c_.first + column();
      async_copy16(&to.rows[2][warp][t][channel], z, wanted);
    }
  }
  __device__ __forceinline__ const S* indexed_z(int t) const {
    return row<const S>(f_.problem.z, static_cast<int64_t>(*row_numbers(f_.problem, s_, s_.length - left_ + t)));
  }
  __device__ __forceinline__ void copy_coefficients(typename K::Stage& to) {
#pragma unroll
    for (int i = 0; i < kSteps; i += kChunkStride) {
      const int t = chunk_row() + i;
      if (kSteps % kChunkStride != 0 && t >= kSteps) break;
      async_copy16(&to.coefficients[t][chunk()], coefficient_ + i * coefficient().step,
                   t < left_ && first_state() < f_.problem.state);
    }
  }
  // The same element by element, for any alignment.
  __device__ __forceinline__ void load_rows(typename K::Stage& to) {
    const Problem<float>& p = f_.problem;
#pragma unroll 1
    for (int i = threadIdx.x; i < kSteps * K::kChannels; i += K::kThreads) {
      const int t = i / K::kChannels, warp = i % K::kChannels / K::kWarpChannels, channel = i % K::kWarpChannels;
      const int d = c_.first + i % K::kChannels;
      if (d >= c_.end) continue;
      const bool wanted = t < left_;
      const int64_t step = s_.length - left_ + t;
      to.rows[0][warp][t][channel] = wanted ? row<const S>(p.u, s_, step)[d] : S{};
      to.rows[1][warp][t][channel] = wanted ? row<const S>(p.delta, s_, step)[d] : S{};
      if (!stages_z()) continue;
      const S* z = wanted && p.row_index ? indexed_z(t) : row<const S>(p.z, s_, step);
      to.rows[2][warp][t][channel] = wanted ? z[d] : S{};
    }
  }
  __device__ __forceinline__ void load_coefficients(typename K::Stage& to) {
#pragma unroll 1
    for (int t = chunk_row(); t < kSteps; t += kChunkStride)
#pragma unroll 1
      for (int n = 0; n < K::kVector; ++n) {
        const bool wanted = t < left_ && first_state() + n < f_.problem.state;
        to.coefficients[t][chunk() + n] = wanted ? coefficient_[(t - chunk_row()) * coefficient().step + n] : S{};
      }
  }
};

// ------------------------------------------------------------------------------------------------ prepare
// kCommon: softplus, and all steps exist. Steps past the end get delta = 0: exp2(0) = 1 keeps the state.
template <class K, bool kCommon>
__device__ __forceinline__ void prepare(const Problem<float>& p, const typename K::Stage& stage, float2 bias, int steps,
                                        float2 (&to)[kSteps][K::kWarpChannels]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pair = lane % K::kPairs * 2;
#pragma unroll(K::kRowUnroll)
  for (int i = 0; i < K::kRowTurns; ++i) {
    const int t = i * K::kRowsAtOnce + lane / K::kPairs;
    const float2 u = load_pair(&stage.rows[0][warp][t][pair]), raw = load_pair(&stage.rows[1][warp][t][pair]);
    float2 delta = make_float2(raw.x + bias.x, raw.y + bias.y);
    if (kCommon || p.softplus) delta = make_float2(softplus(delta.x), softplus(delta.y));
    if (!kCommon && t >= steps) delta = make_float2(0.f, 0.f);
    *reinterpret_cast<float4*>(&to[t][pair]) = make_float4(delta.x, delta.x * u.x, delta.y, delta.y * u.y);
  }
}

// ------------------------------------------------------------------------------------------------ advance
// h = exp2(delta A) h + delta u B and the lane's part of y = C h, kUnroll steps from t on. A comes times log2(e).
// kPolynomials of 16 (step, state) pairs, spread evenly, take the polynomial, for which delta A <= 0.
template <class K, int kPolynomials, int kUnroll>
__device__ __forceinline__ void advance(typename K::Shared& shared, int buffer, int t,
                                        const float (&A)[kLaneChannels][K::kLaneStates],
                                        float (&h)[kLaneChannels][K::kLaneStates]) {
  const int warp = threadIdx.x / 32, part = threadIdx.x % 32 / (32 / K::kLanes);
  const int channel = threadIdx.x % (32 / K::kLanes) * kLaneChannels;
#pragma unroll
  for (int k = 0; k < kUnroll; ++k) {
    const float4 d = *reinterpret_cast<const float4*>(&shared.delta_u[warp][t + k][channel]);
    const float delta[kLaneChannels] = {d.x, d.z}, delta_u[kLaneChannels] = {d.y, d.w};
    const float* row = &shared.coefficients[buffer][t + k][part * K::kLaneStates];
    float y[kLaneChannels];
#pragma unroll
    for (int n = 0; n < K::kLaneStates; n += 4) {
      const float4 b4 = *reinterpret_cast<const float4*>(row + n);
      const float4 c4 = *reinterpret_cast<const float4*>(row + K::kStates + n);
      const float B[4] = {b4.x, b4.y, b4.z, b4.w}, C[4] = {c4.x, c4.y, c4.z, c4.w};
#pragma unroll
      for (int c = 0; c < kLaneChannels; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          float& state = h[c][n + e];
          const bool polynomial = (k * K::kLaneStates + n + e) * kPolynomials % 16 < kPolynomials;
          const float a = polynomial ? exp2_polynomial<true>(delta[c], A[c][n + e]) : exp2_fast(delta[c] * A[c][n + e]);
          state = fmaf(a, state, delta_u[c] * B[e]);
          y[c] = n + e == 0 ? state * C[e] : fmaf(state, C[e], y[c]);
        }
    }
    *reinterpret_cast<float2*>(&shared.y[warp][t + k][part][channel]) = make_float2(y[0], y[1]);
  }
}

// ------------------------------------------------------------------------------------------------ finish
// The sum of the lanes' parts of y for a pair of channels.
template <class K>
__device__ __forceinline__ float2 sum_of_parts(const float (&parts)[K::kLanes][K::kWarpChannels], int pair) {
  float2 sum = load_pair(&parts[0][pair]);
#pragma unroll
  for (int part = 1; part < K::kLanes; ++part) {
    const float2 more = load_pair(&parts[part][pair]);
    sum.x += more.x, sum.y += more.y;
  }
  return sum;
}

// y + D u, gated, in pairs: z is there, rows are neither chosen by an index nor unaligned, out has the type of u.
template <class K>
__device__ __forceinline__ void finish_pairs(const Forward<float>& f, const Sequence& s,
                                             const typename K::Shared& shared, const typename K::Stage& stage,
                                             int channel, bool inside, float2 D, int64_t first, int steps) {
  using S = typename K::S;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pair = lane % K::kPairs * 2, t0 = lane / K::kPairs;
  char* out = reinterpret_cast<char*>(row<S>(f.out, s, first + t0) + channel);
  const int64_t bytes = K::kRowsAtOnce * f.out.step * static_cast<int64_t>(sizeof(S));
#pragma unroll(K::kRowUnroll)
  for (int i = 0; i < K::kRowTurns; ++i, out += bytes) {
    const int t = i * K::kRowsAtOnce + t0;
    const float2 y = sum_of_parts<K>(shared.y[warp][t], pair), u = load_pair(&stage.rows[0][warp][t][pair]);
    const float2 z = load_pair(&stage.rows[2][warp][t][pair]);
    const float2 gated = make_float2(fmaf(D.x, u.x, y.x) * silu(z.x), fmaf(D.y, u.y, y.y) * silu(z.y));
    if (inside && t < steps) store_pair(reinterpret_cast<S*>(out), gated);
  }
}

// The same for every call.
template <class K>
__device__ __forceinline__ void finish_any(const Forward<float>& f, const Sequence& s, const typename K::Shared& shared,
                                           const typename K::Stage& stage, int channel, int end, float2 D,
                                           int64_t first, int steps) {
  using S = typename K::S;
  const Problem<float>& p = f.problem;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, pair = lane % K::kPairs * 2;
#pragma unroll 1
  for (int t = lane / K::kPairs; t < steps; t += K::kRowsAtOnce) {
    const float2 sum = sum_of_parts<K>(shared.y[warp][t], pair), u = load_pair(&stage.rows[0][warp][t][pair]);
    float2 z = load_pair(&stage.rows[2][warp][t][pair]);
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      if (channel + c >= end) break;
      float y = c ? fmaf(D.y, u.y, sum.y) : fmaf(D.x, u.x, sum.x), gate = c ? z.y : z.x;
      if (p.rows_per_step > 1) {
        gate = 0;
        if (p.z.data) each_row<const S>(p, p.z, s, first + t, [&](const S* r) { gate += read(r[channel + c]); });
      }
      if (p.z.data) y *= silu(gate);
      if (f.wide_out)
        each_row<float>(p, f.out, s, first + t, [&](float* r) { r[channel + c] = y; });
      else
        each_row<S>(p, f.out, s, first + t, [&](S* r) { r[channel + c] = rounded<S>(y); });
    }
  }
}

// ------------------------------------------------------------------------------------------------ the kernel
// The states [first, first + kCount) of one channel, those past the last as zeros; `states` may be null.
template <int kCount>
__device__ __forceinline__ void load_states(const float* states, int first, int count, bool aligned, float factor,
                                            float (&to)[kCount]) {
#pragma unroll
  for (int n = 0; n < kCount; n += 4) {
    float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
    if (states && aligned && first + n < count) v = *reinterpret_cast<const float4*>(states + first + n);
    to[n] = v.x * factor, to[n + 1] = v.y * factor, to[n + 2] = v.z * factor, to[n + 3] = v.w * factor;
#pragma unroll
    for (int e = n; e < n + 4; ++e)
      if (states && !aligned && first + e < count) to[e] = states[first + e] * factor;
  }
}

// The part of a sequence that is one block's work, as a sequence of its own.
template <class T>
__device__ __forceinline__ Sequence chunk_of(const Forward<T>& f, int64_t i) {
  if (f.chunks == 1) return sequence_of(f.problem, i);
  Sequence s = sequence_of(f.problem, i / f.chunks);
  const int64_t first = i % f.chunks * f.chunk_steps, left = s.length - first;
  return {i, s.batch, s.begin + first, left < f.chunk_steps ? left : f.chunk_steps, s.slot + first / kCheckpointSteps};
}

template <class K>
__global__ void __launch_bounds__(K::kThreads, K::kBlocks)
    scan_forward(const __grid_constant__ Forward<float> f, int tiles) {
  ROM_DYNAMIC_SHARED(typename K::Shared, shared);
  const Problem<float>& p = f.problem;
  const Sequence s = chunk_of(f, blockIdx.x / tiles);
  const Channels c = channels_of(p, blockIdx.x % tiles, K::kChannels);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warp_first = c.first + warp * K::kWarpChannels;
  Loader<K> loader(f, s, c);
  if (s.length > 0) loader.next(shared->stage[0]);

  const int first_state = lane / (32 / K::kLanes) * K::kLaneStates;
  const int channel = warp_first + lane % (32 / K::kLanes) * kLaneChannels;  // of advance
  const float* initial = f.initial_state ? f.initial_state + s.index * p.dim * p.state : nullptr;
  float A[kLaneChannels][K::kLaneStates], h[kLaneChannels][K::kLaneStates];
  bool decays = p.softplus;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    const bool inside = channel + i < c.end;
    const int64_t at = static_cast<int64_t>(channel + i) * p.state;
    load_states(inside ? p.A + at : nullptr, first_state, p.state, f.states_aligned, static_cast<float>(kLog2E), A[i]);
    load_states(inside && initial ? initial + at : nullptr, first_state, p.state, f.states_aligned, 1.f, h[i]);
#pragma unroll
    for (int n = 0; n < K::kLaneStates; ++n) decays = decays && A[i][n] <= 0.f;
  }
  decays = __all_sync(0xffffffffu, decays);

  const int pair = warp_first + lane % K::kPairs * 2;  // of prepare and finish
  const bool in[2] = {pair < c.end, pair + 1 < c.end};
  const float2 bias = make_float2(p.delta_bias && in[0] ? p.delta_bias[pair] : 0.f,
                                  p.delta_bias && in[1] ? p.delta_bias[pair + 1] : 0.f);
  const float2 D = make_float2(p.D && in[0] ? p.D[pair] : 0.f, p.D && in[1] ? p.D[pair + 1] : 0.f);
  const bool in_pairs = f.aligned && p.z.data && !p.row_index && !f.wide_out;

  int buffer = 0;
#pragma unroll 1
  for (int64_t first = 0; first < s.length; first += kSteps, buffer ^= 1) {
    typename K::Stage& stage = shared->stage[buffer];
    async_wait<0>();
    Loader<K>::widen_coefficients(stage, shared->coefficients[buffer]);
    __syncthreads();  // this tile has arrived for everyone, and everyone is done with the last one
    if (first + kSteps < s.length) loader.next(shared->stage[buffer ^ 1]);
    const int steps = s.length - first < kSteps ? static_cast<int>(s.length - first) : kSteps;
    if (p.softplus && steps == kSteps)
      prepare<K, true>(p, stage, bias, steps, shared->delta_u[warp]);
    else
      prepare<K, false>(p, stage, bias, steps, shared->delta_u[warp]);
    if (f.checkpoints && first % kCheckpointSteps == 0) {
#pragma unroll
      for (int n = 0; n < K::kLaneStates; n += 4)
#pragma unroll
        for (int i = 0; i < kLaneChannels; ++i)
          if (channel + i < c.end && first_state + n < p.state)
            *reinterpret_cast<float4*>(checkpoint_quad(p, f.checkpoints, s.slot + first / kCheckpointSteps,
                                                       (first_state + n) / 4, channel + i)) =
                make_float4(h[i][n], h[i][n + 1], h[i][n + 2], h[i][n + 3]);
    }
    __syncwarp();
    if (K::kPolynomials > 0 && decays) {
#pragma unroll 1
      for (int t = 0; t < steps; t += 8) advance<K, K::kPolynomials, 8>(*shared, buffer, t, A, h);
    } else {
      constexpr int kUnroll = K::kPolynomials > 0 ? 4 : 8;  // 8 where it is the only loop
#pragma unroll 1
      for (int t = 0; t < steps; t += kUnroll) advance<K, 0, kUnroll>(*shared, buffer, t, A, h);
    }
    __syncwarp();
    if (!f.out.data) continue;
    if (in_pairs)
      finish_pairs<K>(f, s, *shared, stage, pair, in[0], D, first, steps);
    else
      finish_any<K>(f, s, *shared, stage, pair, c.end, D, first, steps);
  }

  if (!f.final_state) return;
  float* final_state = f.final_state + s.index * p.dim * p.state;
#pragma unroll
  for (int i = 0; i < kLaneChannels; ++i) {
    if (channel + i >= c.end) break;
    float* states = final_state + static_cast<int64_t>(channel + i) * p.state + first_state;
#pragma unroll
    for (int n = 0; n < K::kLaneStates; n += 4) {
      if (f.states_aligned && first_state + n < p.state) {
        *reinterpret_cast<float4*>(states + n) = make_float4(h[i][n], h[i][n + 1], h[i][n + 2], h[i][n + 3]);
        continue;
      }
#pragma unroll
      for (int e = n; e < n + 4; ++e)
        if (first_state + e < p.state) states[e] = h[i][e];
    }
  }
}

// Where memory allows it, u, delta and z are copied 16 bytes at a time and out is stored in pairs of channels
// (`aligned`: every row and group starts at such a boundary), and so are B and C, and A and the states.
template <class K>
Forward<float> tiled_forward_of(const rom_scan_forward_args& a) {
  Forward<float> f = forward_of<typename K::S>(a);
  f.aligned = f.problem.group_dim % K::kVector == 0 && rows_aligned(a.u, K::kVector) &&
              rows_aligned(a.delta, K::kVector) && rows_aligned(a.z, K::kVector) && rows_aligned(a.out, 2);
  f.coefficients_aligned =
      f.problem.state % K::kVector == 0 && rows_aligned(a.B, K::kVector) && rows_aligned(a.C, K::kVector);
  f.states_aligned = f.problem.state % 4 == 0 && rows_aligned(a.A, 4) && rows_aligned(a.initial_state, 4) &&
                     rows_aligned(a.final_state, 4);
  return f;
}

template <class K>
void launch(const Forward<float>& f, void* stream) {
  const int tiles = f.problem.groups * ((f.problem.group_dim + K::kChannels - 1) / K::kChannels);
  allow_shared(scan_forward<K>, sizeof(typename K::Shared));
  ROM_LAUNCH((scan_forward<K>), static_cast<unsigned>(tiles * f.problem.sequences * f.chunks), K::kThreads,
             sizeof(typename K::Shared), stream, f, tiles);
}

template <class K>
void launch_tiled(const rom_scan_forward_args& a) {
  launch<K>(tiled_forward_of<K>(a), a.launch.stream);
}

}  // namespace
