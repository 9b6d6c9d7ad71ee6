// SPDX-License-Identifier: Apache-2.0
//
// The scan's backward pass: what a launch is given, what a block keeps in shared memory, and who does what.
#pragma once
#include <type_traits>

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
  Rows gate;  // z, or anything that can be read in its place
  float* grad_initial_state;
  int first_state, segments, group_blocks;
  bool aligned, coefficients_aligned;  // four channels of every row, and 16 bytes of B and C, move at once
  int64_t tokens;                      // batch * length
  float* through;                      // S, E, Y of the states before first_state: [3][token][dim]; only for > kStates
  float* coefficients;  // partials of dB and dC: [block][token][dB 16 | dC 16]; null if both are constant
  float* parameters;    // partials of dA (and of constant dB, dC), dD, d delta_bias: see Parameters
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
// Per (step, channel). kSlope: softplus'. kGate: grad_out silu'(z). Once a part of the tile is done its gradients take
// the place of what they were made of.
enum StepField {
  kDelta,
  kDeltaU,
  kGradY,
  kU,
  kSlope,
  kGate,
  kStepFields,
  kGradU = kDeltaU,
  kGradDelta = kSlope,
  kGradZ = kGate
};
enum Sum { kS, kE, kY, kSums };
// Per channel: parameters, and the sums of their gradients over the segment so far.
enum ChannelField { kD, kBias, kGradD, kGradBias };

template <bool kGeneral>
struct Constants {};
template <>
struct Constants<true> {
  Quad B[kStrips][kThreads], C[kStrips][kThreads], grad_B[kStrips][kThreads], grad_C[kStrips][kThreads];
};

// Of a channel in shared memory, in quads: [field][step / 4], and last its ChannelFields, which makes it 4 mod 32
// banks.
constexpr int kPitch = kStepFields * kTileQuads + 1;

// 113 KiB: two blocks fill an SM of Hopper to the byte.
template <bool kGeneral>
struct Shared : Constants<kGeneral> {
  // Of a thread as lane of sweep(). A is times log2(e): decays are powers of two.
  Quad A[kStrips][kThreads], carry[kStrips][kThreads], grad_A[kStrips][kThreads];
  Quad state[kParts][kStrips][kThreads];  // before each part of the tile
  Quad step[kChannels][kPitch];
  Quad scratch[2 * kSteps][kThreads];  // sums over states, then copies of dB and dC
  Quad coefficients[kTile][8];         // of a step: B as 4 quads, C as 4 quads
};
static_assert(sizeof(Shared<false>) == 113 * 1024);

// The rows of scratch, one quad of every thread, and in a row of sums the place that is conflict-free for the lanes of
// sweep() and of finish() alike. A warp has its columns to itself.
__device__ __forceinline__ int sum_row(int strip, Sum sum, int half) { return (strip * kSums + sum) * 2 + half; }
__device__ __forceinline__ int sum_column(int warp, int channel, int quad) {
  return warp * 32 + quad * kStrip + (channel ^ (2 * quad));
}
__device__ __forceinline__ int dB_row(int step) { return step; }
__device__ __forceinline__ int dC_row(int step) { return kSteps + step; }

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
// x, and the compiler does not know it: for what happens once per tile or less. What follows from x would else be
// computed once and kept through the loop that needs all registers.
__device__ __forceinline__ unsigned hidden(unsigned x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}
// A lane of replay() and sweep(): one channel of each strip, one quad of states.
struct StateLane {
  int warp, channel, quad;
  __device__ StateLane(unsigned thread = threadIdx.x) : warp(thread / 32), channel(thread % 32 / 4), quad(thread % 4) {}
  __device__ int in_block(int strip) const { return warp * kWarpChannels + strip * kStrip + channel; }
};
// A lane of finish(): one channel, half of the 8 steps.
struct SumLane {
  int warp, channel, half;
  __device__ __forceinline__ SumLane() {
    const unsigned thread = hidden(threadIdx.x);
    warp = thread / 32, channel = thread % kWarpChannels, half = thread % 32 / kWarpChannels;
  }
  __device__ int in_block() const { return warp * kWarpChannels + channel; }
};
// Steps [begin, begin + steps) of a sequence's batch entry, steps <= kTile. Three integers, for it lives through the
// loop that needs all 255 registers; what else tiles have is derived where it is wanted.
struct Tile {
  int sequence, begin, steps;
};
__device__ __forceinline__ int batch_of(const Problem<float>& p, const Tile& tile) {
  return p.cu_seqlens ? 0 : tile.sequence;
}
// As much of a Sequence as rows need, `step` steps into the tile.
__device__ __forceinline__ Sequence from(const Problem<float>& p, const Tile& tile, int step) {
  return {0, batch_of(p, tile), tile.begin + step, 0, 0};
}
// The slot of its checkpoint, or -1 before the sequence's first tile: sequence_of() in 32 bits.
__device__ __forceinline__ int slot_of(const Problem<float>& p, const Tile& tile) {
  if (!p.cu_seqlens)
    return tile.begin < 0 ? -1
                          : tile.sequence * ((static_cast<int>(p.length) + kTile - 1) / kTile) + tile.begin / kTile;
  const int first = p.cu_seqlens[tile.sequence];
  return tile.begin < first ? -1 : first / kTile + tile.sequence + (tile.begin - first) / kTile;
}

// A lane of prepare() and write_rows(): channels channel ... channel + 3 of the block, steps step ... step + 3 of the
// tile. The lanes of one row move 32 neighbouring bytes of it in 16-bit storage, those of one channel whole fields.
struct PatchLane {
  int channel, step;
  __device__ __forceinline__ PatchLane() {
    const unsigned thread = hidden(threadIdx.x);
    channel = static_cast<int>(thread / kTileQuads * 4), step = static_cast<int>(thread % kTileQuads * 4);
  }
};
static_assert(kWarpChannels / 4 * kTileQuads == 32);  // a warp's lanes have its channels

// Rows `first` and on of a batch entry. Offsets are products of 32-bit factors (launches see to it): one instruction
// per row, where 64-bit strides take five. Factor and addend are hidden from the compiler, or it takes them apart
// again.
template <class S>
class RowPointers {
  using Byte = std::conditional_t<std::is_const_v<S>, const char, char>;
  static constexpr uint32_t kSize = sizeof(S);
  size_t entry_;
  uint32_t first_, stride_;

 public:
  __device__ __forceinline__ RowPointers(void* data, int64_t batch_stride, int64_t step_stride, int batch, int first,
                                         int column)
      : first_(first * kSize), stride_(static_cast<uint32_t>(step_stride)) {
    const Byte* at = static_cast<Byte*>(data) + static_cast<uint64_t>(column * kSize) +
                     static_cast<uint64_t>(batch * kSize) * static_cast<uint32_t>(batch_stride);
#if defined(__CUDACC__)
    entry_ = __cvta_generic_to_global(at);
    asm("" : "+l"(entry_), "+r"(stride_));
#else
    entry_ = reinterpret_cast<size_t>(at);
#endif
  }
  __device__ __forceinline__ S* operator[](int row) const {
    const uint64_t at = entry_ + static_cast<uint64_t>(first_ + row * kSize) * stride_;
#if defined(__CUDACC__)
    return static_cast<S*>(__cvta_global_to_generic(at));
#else
    return reinterpret_cast<S*>(at);
#endif
  }
};

// The place of a step of a tile among all (batch, length).
__device__ __forceinline__ int64_t token_of(const Problem<float>& p, const Tile& tile, int step) {
  return batch_of(p, tile) * p.length + tile.begin + step;
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

}  // namespace
